"""Settings of a run, in groups; flags and their help are made from these classes.

Marks of values: [paper], or a part of it: the paper's; [method]: our choice where the paper is silent; [earlier code]:
the baselines' code; [tuned]: chosen on validation images; [calibrated]: on the paper's Random rows.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Data:
    """The data set."""

    data: str = "digits"
    """digits | cifar10 | cifar100 | tiny-imagenet | parquet:PATH | folder:PATH | npz:PATH."""
    image_size: int = 0
    """Side in pixels of the square that every image is resized to, by Pillow's bicubic filter (antialiased): needed for
    images of several sizes; 0: as they are."""
    resize: Literal["crop", "stretch"] = "crop"
    """crop: --image-size is for the short side, and the middle of the long side is kept; stretch: for both sides."""
    label_column: str = ""
    """parquet: column of labels (integers from 0, names of classes, or one-hot lists), such as coarse_label; empty:
    label, fine_label, labels, target, targets, class or classes."""
    image_column: str = ""
    """parquet: column of images; empty: img, image, imgs or images."""
    data_root: str = "data"
    """Folder of the torchvision data sets and of tiny-imagenet-200."""
    download: bool = False
    """Download cifar10 or cifar100 into --data-root if it is missing."""
    normalisation: str = "auto"
    """Mean and std of each channel: computed from the training images | the usual constants of cifar10 | cifar100 |
    tiny-imagenet | auto: those constants for --data of that name, else computed."""
    validation: float = 0.0
    """Fraction of each class of the training set that is held out, drawn by --data-seed."""
    test: float = 0.0
    """Where the data have no test split: fraction of each class of the training set that becomes it, drawn by
    --data-seed, at least one image of each class with two or more; 0: the validation split, or a fifth."""
    data_seed: int = 0
    """Seed of the validation and test splits that are drawn."""


@dataclass(frozen=True)
class Networks:
    """The networks."""

    architectures: tuple[str, ...] = ("convnet-in",)
    """One gradient worker each (Algorithm 1): convnet | vgg11 | resnet18 | resnet34, each with -in (the default suffix)
    | -gn | -ln | -bn | -none; lenet | alexnet; or MODULE:FUNCTION, your own function of ((c, h, w), classes) that
    returns a torch.nn.Module, importable from the current folder (rename the function when the network changes)."""
    width: int = 128
    """Channels of each ConvNet convolution [paper: 128]; others but lenet and your own scale by width / 128."""
    depth: int = 0
    """Blocks of ConvNet; 0 means 3 at 32x32, 4 at 64x64 [paper], 2 at 8x8."""
    augment: Literal["dsa", "none"] = "dsa"
    """Augmentation of experts, distillation and chains [paper: dsa; none in its Table 10]."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the convolutions in expert training, MAP solves and SGD steps. bf16: bfloat16 there, float32 in
    parameters, losses, Psi, Eq. 17 and chains. It changes the last bits of results. vbpc
    and frepo run in fp32 alone. fp32 on a GPU is no TF32, which torch would take for convolutions."""
    memory_budget: str = ""
    """Memory of a process that computes gradients or SGHMC chains, such as 6GB or 800MB: sets --chunk-images by an
    estimate that is the same on all machines. Empty: no bound. Not for BatchNorm, bpc-w, vbpc, frepo."""
    chunk_images: int = 0
    """Most images of one pass of a step or chain; larger batches are passed in chunks, with the same gradient but for
    rounding. 0: as --memory-budget allows, or all at once. It changes the last bits."""


@dataclass(frozen=True)
class Experts:
    """Expert trajectories (App. C.1)."""

    experts: str = ""
    """Folder of the experts of all data sets and networks, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; empty: experts
    in $FBPC_HOME, else in the current folder."""
    expert_count: int = 100
    """Trajectories for each architecture [paper: 100]."""
    expert_epochs: int = 50
    """Epochs of a trajectory, with a snapshot after each [paper: 50]."""
    expert_lr: float = 0.01
    """SGD learning rate, no momentum, no decay [paper: 0.01]."""
    expert_batch_size: int = 256
    """Images per batch [method]."""
    expert_dtype: Literal["float32", "float16"] = "float32"
    """Type of stored weights; float16 halves the disk space and changes Psi^(1/2) by 7e-5."""
    expert_seed: int = 0
    """Seed of the trajectories; runs with different --seed share experts."""


@dataclass(frozen=True)
class Distillation:
    """Algorithm 1. Letters are the paper's."""

    method: Literal["fbpc", "fbpc-isotropic", "bpc-fkl", "bpc-rkl", "bpc-w", "vbpc", "frepo", "random"] = "fbpc"
    """fbpc | fbpc-isotropic (Psi = I, no K steps) | the weight-space baselines bpc-fkl, bpc-rkl, bpc-w, whose defaults
    are those of their own paper | vbpc, frepo (a last layer in closed form; no experts, learned labels) | random (real
    images, nothing is learned)."""
    ipc: int = 1
    """Images per class; m = ipc x classes."""
    steps: int = 1000
    """N: updates of the pseudocoreset [Table 4]."""
    seed: int = 0
    """Seed of the distillation: initial images and every draw."""
    initial_coreset: str = ""
    """Coreset to begin with, its images and, where the method learns labels, its soft labels: a file or a run, as
    `evaluate --coreset` takes it. Empty: real images [Algorithm 1]."""
    alpha: float = 100.0
    """alpha: SGD learning rate of the pixels, in normalised pixel space [Table 4]."""
    momentum: float = 0.5
    """Momentum of that SGD [method]."""
    batch_size: int = 10
    """B: pseudocoreset images in one gradient; all of them where m <= B [Table 4]."""
    start_epoch: int = 1
    """T: experts are sampled from this epoch onwards [Table 4]."""
    start_rule: Literal["from", "before"] = "from"
    """from: epochs T..last [App. C.2]; before: epochs 0..T-1, as in the baselines' code."""
    gamma: float = 0.01
    """gamma: the MAP solve stops at this mean loss, nats per image [Table 4]."""
    map_lr: float = 0.001
    """Adam learning rate of the MAP solve [App. C.2]."""
    map_max_steps: int = 2000
    """Adam steps after which a MAP solve ends above --gamma; the run counts such solves [method]."""
    map_init: Literal["prior", "warm"] = "prior"
    """Start of a MAP solve: prior: a draw of the prior [Algorithm 1]; warm: one of --warm-pool-size earlier solutions,
    in turn: fewer steps, but not the paper's method."""
    warm_pool_size: int = 10
    """With --map-init warm: solutions that the run keeps for each architecture and draw, also in its checkpoint."""
    warm_pool_uses: int = 3
    """With --map-init warm: uses of a solution before one from the prior replaces it; more: faster, less exact."""
    posterior_steps: int = 30
    """K: SGD steps whose logits give Psi, Eq. 16 [App. C.2]."""
    lambda_x: float = 0.05
    """lambda_x: learning rate of the K steps on real images [Table 4]."""
    lambda_u: float = 0.01
    """lambda_u: learning rate of the K steps on the pseudocoreset [Table 4]."""
    real_batch_size: int = 256
    """Real images per step of the K steps; vbpc, frepo: real images of a gradient [method]."""
    mc_samples: int = 30
    """S: Monte-Carlo draws, of logits in Eq. 17 [method], of weights in Eq. 7."""
    learn_labels: bool = False
    """fbpc, bpc: learn soft labels with the images [paper, footnote 1: in principle], by the same divergence; for fbpc,
    d/dp_c KL = E_u[log softmax_c(f_u)] - E_x[log softmax_c(f_u)], and MAP solves end at --gamma above the labels'
    entropy. vbpc, frepo always learn them."""
    label_confidence: float = 0.9
    """With --learn-labels: probability of an image's own class at the start."""
    views: int = 0
    """V: augmentations of u per step, over which the gradient is averaged (fbpc, fbpc-isotropic, bpc-fkl alone); 0: one
    [paper], for bpc-fkl one for each of --mc-samples, as in its authors' code."""
    gamma_window: int = 1
    """Passes over u whose mean loss is compared with --gamma [paper: 1]. With more, a single easy augmentation
    cannot end a solve."""
    alpha_decay: int = 0
    """s: alpha is divided by sqrt(1 + step / s); 0: alpha is constant [paper]. Not for vbpc, frepo."""
    image_average: float = 0.0
    """Decay of the exponential moving average of the images, which becomes the coreset of the run; 1: the mean over all
    steps (Polyak); 0: the images after the last step [paper]."""
    rkl_estimator: Literal["scaled", "authors"] = "scaled"
    """bpc-rkl: scaled: potentials of all N real and m coreset images, augmented, 1 / (S - 1); authors: as in its
    authors' code, gaps of mean losses, no augmentation, 1 / S, for --alpha 1000 --momentum 0 --real-batch-size 1000."""
    syn_steps: int = 50
    """bpc-*: SGD steps on the pseudocoreset from theta_0 to mu_u."""
    inner_lr: float = 0.01
    """bpc-*: learning rate of those steps; bpc-w learns it, from this value."""
    inner_alpha: float = 1e-5
    """bpc-w: learning rate of that learning rate."""
    weight_noise: float = 0.01
    """bpc-fkl, bpc-rkl: standard deviation of the weights under q_x and q_u, Eq. 6."""
    draws_per_step: int = 1
    """M: independent draws of (theta_x, theta_u) for each architecture and step, whose gradients are averaged [paper:
    1]; vbpc, frepo: networks of the pool that a step uses. More draws keep more workers busy."""
    image_lr: float = 0.003
    """vbpc, frepo: Adam learning rate of the pixels, in normalised pixel space [tuned]."""
    label_lr: float = 0.01
    """vbpc, frepo, --learn-labels: Adam learning rate of the soft labels, logits; 0: the labels stay as they begin
    [tuned for vbpc]."""
    lr_decay: int = 200
    """vbpc, frepo: s: both rates are divided by sqrt(1 + step / s), with --learn-labels that of the labels; 0: they are
    constant [tuned for vbpc]."""
    label_scale: float = 1.0
    """vbpc, frepo: factor s of the initial soft labels, the logits s x (one-hot - 1/classes) [tuned]."""
    ridge: float = 0.01
    """lambda, the ridge added to the kernel phi . phi' / h. vbpc: rho x variance of the noise of the
    targets [tuned]; frepo: a share of the mean of |phi|^2 / h over the coreset [FRePo: 1e-6]."""
    prior_precision: float = 1.0
    """vbpc: rho, the precision of the Gaussian prior of a weight of the last layer."""
    kl_weight: float = 1.0
    """vbpc: weight of KL(q || prior) / number of real images; 1 gives the evidence lower bound (ELBO)."""
    mirror: bool = True
    """vbpc, frepo: add each image's mirror image to the coreset, and mirror half of the real images."""
    pool_size: int = 10
    """vbpc, frepo: networks in the pool of each architecture, also in the checkpoint [FRePo: 10]."""
    pool_steps: int = 100
    """vbpc, frepo: gradients after which a network of the pool is replaced by a new one; each but the first follows one
    training step on the coreset [FRePo: 100]."""
    pool_lr: float = 0.0003
    """vbpc, frepo: Adam learning rate of those steps [FRePo: 0.0003]."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Evaluation:
    """SGHMC on a coreset (Eq. 27, App. C.2), or networks trained on it."""

    inference: Literal["sghmc", "last-layer", "mse", "ensemble"] = "sghmc"
    """sghmc (Eq. 27) [paper] | networks trained by squared loss, of which last-layer predicts by the closed-form
    posterior of its last layer, mse by the softmax of its outputs, ensemble by --ensemble-size of these."""
    net_steps: int = 100
    """last-layer, mse, ensemble: Adam steps of a network on the coreset [tuned]."""
    net_lr: float = 0.001
    """last-layer, mse, ensemble: their learning rate [tuned]."""
    net_label_scale: float = 1.0
    """last-layer, mse, ensemble: factor s of the targets s x (one-hot - 1/classes) of a coreset without soft labels
    [tuned]."""
    net_target_scale: float = 1.0
    """last-layer, mse, ensemble: factor of all targets, soft labels too; above 1 the predictions are more confident, as
    by a temperature below 1. Choose it on validation images."""
    net_mirror: bool = True
    """last-layer, mse, ensemble: add each image's mirror image to the coreset."""
    net_ridge: float = 0.01
    """last-layer: lambda, as vbpc's --ridge [tuned]."""
    net_precision: float = 1.0
    """last-layer: rho, as --prior-precision."""
    ensemble_size: int = 5
    """ensemble: networks of each seed."""
    num_chains: int = 3
    """SGHMC chains, or trained networks, for each architecture, with one seed each; results list the scores of each."""
    chain_epochs: int = 1000
    """Epochs of a chain [paper: 1000]."""
    chain_every: int = 100
    """Epochs between two posterior samples [paper: 100]."""
    chain_eta: float = 0.0
    """eta: step size; 0 means 0.0009 m [earlier code], at least 0.009 and at most 0.03 [paper: 0.03]: a coreset of ten
    images needs the smaller one in a wide network [calibrated]."""
    chain_friction: float = 0.1
    """alpha of Eq. 27: friction [paper: 0.1]."""
    chain_d: float = 1e-5
    """d x m of Eq. 27: temperature of the noise, d = this / m [paper: 0.01; calibrated on its Random rows]."""
    chain_noise: Literal["consistent", "gradient", "literal"] = "consistent"
    """Reading of Eq. 27's noise by its variance: 2 alpha eta d | eta^2 2d | 2d (unstable) [method]."""
    chain_weight_decay: float = 0.005
    """Strength of the Gaussian prior: weight decay on the mean loss, times m, so that every ipc has the same prior
    [calibrated: jobs/calibrate_sghmc.py]."""
    chain_init: float = 0.0
    """Standard deviation of N(0, s^2), from which every parameter of a chain starts [earlier code: 0.1]; 0: the
    network's own initialisation [calibrated]."""
    chain_augment: bool = True
    """Use --augment in the chains too."""
    chain_batch_size: int = 256
    """Images per step if m is above --chain-full-batch [method]."""
    chain_full_batch: int = 500
    """Largest m for which a step takes all images at once [method]."""


@dataclass(frozen=True)
class Workers:
    """The machines. These settings change no result, except --device, --threads, --compiled and --compiled-chains in
    the last bits, and --skip-stragglers."""

    backend: Literal["ray", "serial"] = "ray"
    """ray: one actor for each architecture and draw, or as many as fit, here or on a cluster; serial: this process
    alone, to the same bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto | cpu | cuda. auto uses CUDA if the worker has a GPU."""
    threads: int = 0
    """CPU threads of a gradient; 0: half of the cores that this process may use, divided by the number of
    architectures. It changes the last bits of results."""
    compiled: Literal["auto", "on", "off"] = "auto"
    """Compile the networks' passes for the CPU, cached in $FBPC_CACHE or the user's cache folder; auto: if the run is
    long enough to save more time than that takes. It changes the last bits of results."""
    compiled_chains: Literal["auto", "on", "off"] = "auto"
    """The same for the passes and predictions of SGHMC chains."""
    trajectory_cache_gb: float = 20.0
    """Gigabytes of each node's disk for a cache of the K steps from each theta_x, which runs on the same experts share;
    0: none."""
    address: str = ""
    """Ray cluster: empty joins RAY_ADDRESS or a running cluster, else starts one here; local always starts one here."""
    gpus_per_actor: float = 0.0
    """GPUs of a gradient worker on a cluster with GPUs; 0 means 1 if the cluster has one for each worker, else a
    fraction such that at most four workers share a GPU."""
    cpus_per_actor: float = 0.0
    """CPUs of a gradient worker; 0 means one for each of its threads, or one if it has a GPU."""
    autoscale: bool = False
    """The cluster starts nodes on demand: wait --placement-timeout for them instead of failing at once."""
    placement_timeout: float = 300.0
    """Seconds to wait for the first worker, or for a new one after all are lost, before the run fails."""
    prefetch: int = 2
    """Number of later steps whose theta_x and K steps idle workers compute ahead, as far as the object store has room;
    0: none."""
    step_deadline: float = 0.0
    """Seconds after which the run replaces a worker that doesn't answer, computes its gradient again, and allows twice
    the time; 0: 1,800 for the first call, then 20 times the longest so far, at least 300."""
    skip_stragglers: float = 0.0
    """Leave out a gradient that takes this many times its usual time, and scale up the others; 0: wait for it. Above 0
    a run depends on timing, and a repetition gives other bits."""


@dataclass(frozen=True)
class Output:
    """The output."""

    out: str = ""
    """Run directory: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; empty: a new folder in outputs, in $FBPC_HOME,
    else in the current folder."""
    tracking: bool = True
    """Log to MLflow: MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in $FBPC_HOME, else in the current folder."""
    experiment: str = "fbpc"
    """MLflow experiment."""
    val_every: int = 0
    """Steps between two evaluations on the validation split (val/nll and val/accuracy), by chains of a fifth of
    --chain-epochs; 0 means none, or in a sweep a quarter of --steps. Needs --validation."""
