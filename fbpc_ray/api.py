"""Public functions: data set and networks -> coreset -> posterior samples -> predictions.

    from fbpc_ray.api import dataset, distill, posterior

    data = dataset((images, labels))                   # or a name as --data takes it, or any torch Dataset
    coreset = distill(data, [build, "convnet-in"], ipc=1, width=32, steps=200)
    samples = posterior(coreset, build)
    prediction = samples.predict(test_images)
    prediction.probabilities, prediction.entropy, prediction.mutual_information

A network is a name, as in --architectures, or a function of ((channels, height, width), classes) that builds an
nn.Module (models/checks.py lists the requirements). Other settings have the names of the command line's flags
(docs/settings.md), and the same settings give the same coreset, to the bit. Everything runs in this process unless
`backend="ray"`; Ray is needed for that alone, MLflow for `save_model` alone. Bad input raises UserError with a message
of one line (`auroc`: ValueError). Ctrl-C raises KeyboardInterrupt; experts trained by then stay on disk. TQDM_DISABLE=1
hides the progress.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fbpc_ray.core import config
from fbpc_ray.core.argument_names import names_arguments
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.progress import progress
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset as coresets
from fbpc_ray.data import coreset_reader, sources
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.coreset_reader import Pixels
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.loop import Checkpointer, Step, follow
from fbpc_ray.distillation.state import State
from fbpc_ray.evaluation import chains, ensemble
from fbpc_ray.evaluation.ensemble import Ensemble, Prediction
from fbpc_ray.evaluation.evaluate import check_split_name
from fbpc_ray.evaluation.evaluate import evaluate as evaluate_coresets
from fbpc_ray.execution import advice, keyword_settings, memory_budget, memory_estimate, validation
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.keyword_settings import Architecture
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import Session, network_specs, open_session
from fbpc_ray.inference.uncertainty import auroc
from fbpc_ray.models.functional import Network
from fbpc_ray.reporting import value_pictures  # noqa: F401  registers `plot`
from fbpc_ray.tracking import model_export

__all__ = [
    "Coreset", "Dataset", "Ensemble", "Prediction", "UserError",
    "auroc", "dataset", "distill", "evaluate", "load_coreset", "load_posterior", "posterior", "save",
    "save_model",
]  # fmt: skip


@names_arguments
def dataset(
    train: Any,
    test: Any = None,
    validation: Any = 0.0,
    *,
    classes: Sequence[str] | None = None,
    image_size: int = 0,
    resize: str = "crop",
    label_column: str = "",
    image_column: str = "",
    normalisation: str = "auto",
    name: str = "own",
    seed: int = 0,
    root: str | Path = "data",
    download: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Read or convert images and labels into a data set with train, validation and test splits.

    Args:
        train: a name, as in --data (digits, cifar10, folder:PATH, ...); or (images, labels), arrays or tensors; or a
            torch Dataset of (image, label). Tensors are (n, c, h, w), arrays that or (n, h, w, c). Pixels are uint8, or
            floats in 0..1, not normalised. Image files get three channels, grey ones too. A Dataset's transforms are
            applied once. Labels are integers from 0, names of classes, or one-hot rows.
        test: as `train`, or the share of each class that becomes the test split, at least one image of each class of
            two or more, drawn with `seed`; by default a fifth.
        validation: as `train`, or the share of each class that becomes the validation split.
        classes: names in the order of the labels.
        image_size: side of the square that every image is resized to, by Pillow's bicubic filter, antialiased; a
            Dataset, or a list of images, may then have several sizes. 0: as they are.
        resize: crop (the short side is resized, the middle of the long one stays) or stretch.
        label_column: column of labels of parquet:PATH; empty: the usual ones.
        image_column: as `label_column`.
        normalisation: auto, computed, or the name of a data set with usual constants.
        name: name of the user's own data, part of the path of its experts.
        seed: draws the splits.
        root: folder of named data.
        download: fetch named data that is missing.
        log: called with each note about an assumption.

    Raises:
        UserError: an argument or a file is wrong.
    """
    options = config.Config().updated(
        data=name, image_size=image_size, resize=resize, label_column=label_column, image_column=image_column,
        normalisation=normalisation, data_seed=seed, data_root=str(root), download=download,
    )  # fmt: skip
    loaded = sources.load(train, test, validation, classes, options.data)
    for note in loaded.notes:
        log(f"note: {note}")
    return loaded


@names_arguments
def distill(
    data: Any,
    architectures: Architecture | Sequence[Architecture] | None = None,
    *,
    ipc: int | None = None,
    method: str | None = None,
    preset: str = "",
    time_budget: str | float = "",
    initial_coreset: Coreset | str | Path | None = None,
    backend: str = "serial",
    log: Callable[[str], None] = print,
    on_step: Callable[[dict[str, float], int], None] | None = None,
    **settings: Any,
) -> Coreset:
    """Distil a pseudocoreset of `data`, as `fbpc distill` does with the same settings.

    After a change to your network, give it another name, or another folder of experts.

    Args:
        data: a data set of `dataset`, or its first argument.
        architectures: one network, or several to distil on at once. None: those of the preset, else convnet-in.
        ipc: images per class.
        method: fbpc | fbpc-isotropic | bpc-fkl | bpc-rkl | bpc-w | vbpc | frepo | random (real images).
        preset: quick | laptop | gpu (sizes chosen from the data) | paper | a row of Table 4 | digits; `settings`
            override it. Empty: paper for the names of Table 4, digits for digits, else laptop, or gpu where torch has
            one.
        time_budget: such as 20m, or a number of minutes: choose the largest sizes that take no longer, evaluation
            included, by timing this machine.
        initial_coreset: a coreset, or its path as `fbpc evaluate --coreset` takes it, whose images the steps begin
            with, and its soft labels where the method learns labels. None: real images, as in Algorithm 1.
        backend: serial, or ray (a worker for each network, on this machine or on the cluster at `address`).
        log: called with each line of the log.
        on_step: called after each step with its metrics, {name: number}, such as loss, and its number, from 1.
        **settings: width, depth, augment, device, steps, seed, alpha, expert_count, experts (the folder of expert
            trajectories; by default experts in $FBPC_HOME, else in the current folder), ...: all of docs/settings.md
            but those of data and output. `--recipe improved` is views=8, learn_labels=True.

    Raises:
        UserError: an argument is wrong, or a gradient failed.
    """
    if not isinstance(initial_coreset, Coreset | str | Path | None):
        raise UserError(f"initial_coreset is a {type(initial_coreset).__name__}: give a coreset or its path")
    source = data if isinstance(data, Dataset) else dataset(data, log=log)
    keyword_settings.check_names(settings, "distill", without=(config.Data, config.Output))
    given = initial_coreset if isinstance(initial_coreset, Coreset) else None
    path = str(initial_coreset) if isinstance(initial_coreset, Path) else initial_coreset
    changes: dict[str, Any] = {"ipc": ipc, "architectures": architectures, "initial_coreset": None if given else path}
    changes = settings | {name: value for name, value in changes.items() if value is not None}
    chosen = keyword_settings.of_distillation(source, changes, method, preset, time_budget, backend, log)
    session = replace(open_session(chosen, log, source), given=given)
    if given:
        _check_coreset(given)
        validation.check_initial_coreset(chosen.distillation.method)
    for note in advice.notes(session):
        log(note)
    return session.coreset(_run_steps(session, log, on_step) if session.num_steps else session.initial[0])


def _run_steps(
    session: Session, log: Callable[[str], None], on_step: Callable[[dict[str, float], int], None] | None
) -> State:
    """Train the missing experts and take all steps; return the last state. Nothing is saved but experts."""
    chosen, state = session.config, session.initial[0]
    interruption, d = Interruption(()), chosen.distillation
    with open_backend(chosen, interruption, log) as workers:
        session.train_experts(workers, log)
        with progress("distil", d.steps, "step", log=log) as bar:

            def report(step: Step) -> None:
                if on_step:
                    on_step(step.metrics(), step.state.step)
                bar.update(loss=f"{step.metrics()['loss']:.3f}")

            return follow(session.steps(state, workers), Checkpointer(None, state, [], d), [report], interruption)


@names_arguments
def posterior(
    coreset: Coreset,
    architecture: Architecture | None = None,
    *,
    seed: int = 0,
    num_chains: int = 1,
    width: int | None = None,
    depth: int | None = None,
    augment: str | None = None,
    preset: str = "",
    device: str = "auto",
    **settings: Any,
) -> Ensemble:
    """Sample a Bayesian network on `coreset` by SGHMC: the samples that `fbpc evaluate` scores.

    A setting that is not given is that of the coreset's distillation, if its metadata has it, else the default.

    Args:
        coreset: the images to train on.
        architecture: any network, not only those that the coreset was distilled on. None: the first of those.
        seed: seed of the first chain.
        num_chains: chains, with the seeds `seed`, `seed` + 1, ...; each gives a sample every `chain_every` of its
            `chain_epochs` epochs. `chains`, the earlier name of this argument, still works.
        width: channels of each ConvNet convolution.
        depth: blocks of ConvNet; 0: by the image size.
        augment: dsa | none.
        preset: paper, a row of Table 4 or digits, whose settings stand in for those of the coreset.
        device: auto | cpu | cuda.
        **settings: those of the chains: chain_epochs, chain_every, chain_eta, ...

    Raises:
        UserError: an argument is wrong, or a chain diverged.
    """
    num_chains = settings.pop("chains", num_chains)
    keyword_settings.check_names(settings, "posterior", prefix="chain_")
    _check_coreset(coreset)
    networks = {"width": width, "depth": depth, "augment": augment}
    changes = settings | {name: value for name, value in networks.items() if value is not None}
    chosen = keyword_settings.of_evaluation(coreset, architecture, preset, changes)
    first = chosen.networks.architectures[:1]
    if architecture is not None and len(chosen.networks.architectures) > 1:
        raise UserError(
            f"architecture: must be one network, got {len(chosen.networks.architectures)}; call it for each"
        )
    chosen = chosen.updated(architectures=first, inference="sghmc", num_chains=num_chains, seed=seed)
    validation.check(chosen)
    (spec,) = network_specs(chosen, coreset)
    memory_estimate.check(chosen, [spec], ["evaluation"], coreset=len(coreset.labels), source="coreset")
    network = Network(spec, Serial(device, Interruption(())).device)
    return chains.sample_posterior(network, coreset, chosen.evaluation, chosen.networks.augment, seed)


@names_arguments
def evaluate(
    coreset: Coreset,
    data: Any,
    architectures: Architecture | Sequence[Architecture] | None = None,
    *,
    inference: str | None = None,
    split: str = "test",
    preset: str = "",
    backend: str = "serial",
    log: Callable[[str], None] = print,
    **settings: Any,
) -> dict[str, dict[str, list[float | None]]]:
    """Score `coreset` on a split of `data`, as `fbpc evaluate` does.

    A setting that is not given is that of the coreset's distillation, if its metadata has it, else the default.

    Args:
        coreset: the images to train on.
        data: a data set of `dataset`, or its first argument.
        architectures: one network or several. None: those that the coreset was distilled on.
        inference: sghmc | last-layer | mse | ensemble. None: that of the distillation, sghmc where it is unknown.
        split: test | validation.
        preset: as for `posterior`.
        backend: serial | ray.
        log: called with each line of the log.
        **settings: num_chains, net_steps, chain_epochs, width, ...: all settings but those of data, experts and output.

    Returns:
        {network: {score: [one value per seed]}}; None for a chain that diverged. Scores: accuracy and ece in 0..1,
        brier in 0..2, nll, batch_nll and mean_sample_nll in nats per image (docs/formats.md#resultjson).

    Raises:
        UserError: an argument is wrong.
    """
    check_split_name(split)
    source = data if isinstance(data, Dataset) else dataset(data, log=log)
    others = (config.Data, config.Experts, config.Distillation, config.Output)
    keyword_settings.check_names(settings, "evaluate", without=others)
    _check_coreset(coreset)
    changes = settings | {"backend": backend} | ({} if inference is None else {"inference": inference})
    chosen = keyword_settings.of_evaluation(coreset, architectures, preset, changes)
    chosen = validation.validate(chosen)
    source = source._replace(mean=coreset.mean, std=coreset.std)
    with open_backend(chosen, Interruption(()), log) as workers:
        specs = network_specs(chosen, coreset)
        images, m = len(source.train.labels), len(coreset.labels)
        chosen = memory_budget.with_chunks(chosen, specs, images=images, coreset=m, distils=False)
        chains = len(specs) * chosen.evaluation.num_chains
        memory_estimate.check(chosen, specs, ["evaluation"], coreset=m, chains=chains, source="coreset")
        result = evaluate_coresets({"coreset": coreset}, specs, source, split, chosen, workers, log)
    return result.to_json()["coresets"]["coreset"]


@names_arguments
def save(item: Coreset | Ensemble, path: str | Path) -> None:
    """Write a coreset or posterior samples to one safetensors file, replacing an existing file.

    Args:
        item: the coreset or the samples.
        path: a path, s3://... or gs://...

    Raises:
        UserError: `item` is neither, or `path` is a folder.
    """
    target = place(str(path))
    if isinstance(target, Path) and target.is_dir():
        raise UserError(f"{target} is a folder: name a file in it")
    if isinstance(item, Ensemble):
        ensemble.save(item, target)
    else:
        _check_coreset(item)
        coresets.save(item, target)


@names_arguments
def save_model(samples: Ensemble, folder: str | Path, images: Any, **facts: Any) -> str:
    """Write posterior samples as an MLflow model.

    Args:
        samples: posterior samples.
        folder: a new folder.
        images: the model's input example, (n, c, h, w) uint8, not normalised.
        **facts: metadata of the model.

    Returns:
        The command that serves the model.

    Raises:
        UserError: `images` are no example, the folder exists, or the model can't be written.
    """
    if not isinstance(samples, Ensemble):
        raise UserError(f"not posterior samples (a {type(samples).__name__}): give what posterior returns")
    example, shape = np.asarray(images), samples.spec.image_shape
    if example.dtype != np.uint8 or example.shape[1:] != shape or not len(example):
        raise UserError(f"images are {example.dtype} {example.shape}: give uint8 (n, c, h, w) = n x {shape}")
    return model_export.save(samples, model_export.target(str(folder)), facts, example)


@names_arguments
def load_coreset(
    path: str | Path, data: Any = None, *, pixels: Pixels = "auto", log: Callable[[str], None] = print
) -> Coreset:
    """Read a coreset, of this package or another, as `fbpc evaluate --coreset` does.

    Args:
        path: a run, or what `save` or `fbpc export` wrote, a file or a folder; or a coreset of another program in one
            of these formats (docs/formats.md#exports). Of s3://... and gs://... a run or a file.
        data: the data set of the coreset, as made by `dataset`, or the first argument of `dataset`. A coreset that
            does not fit it is refused. None will do where the file says its classes and its normalisation, as all do
            that this package wrote.
        pixels: floats of a file that doesn't say its normalisation are normalised, as `data` is | unit, in 0..1 |
            auto: unit if all are in 0..1.
        log: called with each note about an assumption.

    Raises:
        UserError: an argument or the file is wrong.
    """
    if pixels not in (known := get_args(Pixels)):
        raise UserError(f"pixels: got {pixels!r:.80}; known: {', '.join(known)}")
    source = place(str(path))
    loaded = coreset_reader.load(
        source, data if data is None or isinstance(data, Dataset) else dataset(data, log=log), pixels
    )
    for note in loaded.notes:
        log(f"note: {note}")
    return loaded.coreset._replace(facts=coreset_reader.facts_of(source))


@names_arguments
def load_posterior(path: str | Path, architecture: Architecture | None = None, *, device: str = "auto") -> Ensemble:
    """Read posterior samples that `save` wrote.

    Args:
        path: a path, s3://... or gs://...
        architecture: the user's own network, if the samples are of one: a file alone imports no code.
        device: auto | cpu | cuda.

    Raises:
        UserError: the file is not one of posterior samples, or is damaged.
    """
    name = "" if architecture is None else keyword_settings.network_names(architecture)[0]
    return ensemble.load(place(str(path)), name, Serial(device, Interruption(())).device)


def _check_coreset(coreset: Coreset) -> None:
    is_coreset = isinstance(coreset, Coreset)
    if wrong := coresets.problem(coreset) if is_coreset else f"a {type(coreset).__name__}":
        raise UserError(f"not a coreset ({wrong}): give what distill or load_coreset returns")
