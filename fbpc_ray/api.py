"""From Python: a data set and networks -> a coreset -> posterior samples -> predictions that say how sure they are.

    from fbpc_ray.api import dataset, distill, posterior

    data = dataset((images, labels))                   # or a name as --data takes it, or any torch Dataset
    coreset = distill(data, [build, "convnet-in"], ipc=1, width=32, steps=200)
    samples = posterior(coreset, build)
    prediction = samples.predict(test_images)
    prediction.probabilities, prediction.entropy, prediction.mutual_information

Networks are named as --architectures names them, or given as functions of ((channels, height, width), classes) that
build an nn.Module (vision/contract.py says what it must hold to). Other settings are those of the command line
(config.py), by the same names: the same ones give the same coreset, to the bit. All runs in this process unless
`backend="ray"` is asked for; neither Ray nor MLflow need be there. What is wrong is a UserError of one line. Ctrl-C is
a KeyboardInterrupt; experts that are trained by then are kept. TQDM_DISABLE=1 hides the progress bars.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fbpc_ray.core import config, presets
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError, closest
from fbpc_ray.core.progress import progress
from fbpc_ray.core.signals import Interruption
from fbpc_ray.core.storage import place
from fbpc_ray.core.threads import torch_threads
from fbpc_ray.data import arrays, datasets
from fbpc_ray.data import coreset as coresets
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset
from fbpc_ray.distillation.loop import Checkpointer, Step, follow
from fbpc_ray.evaluation import chains, ensemble
from fbpc_ray.evaluation import evaluate as scoring
from fbpc_ray.evaluation.ensemble import Ensemble, Prediction
from fbpc_ray.execution import validation
from fbpc_ray.execution.serial import Serial
from fbpc_ray.execution.session import network_specs, open_backend, open_session
from fbpc_ray.inference.uncertainty import auroc
from fbpc_ray.models import custom
from fbpc_ray.models.functional import Network
from fbpc_ray.models.passes import Passes
from fbpc_ray.tracking import model_export

__all__ = [
    "Coreset", "Dataset", "Ensemble", "Prediction", "UserError",
    "auroc", "dataset", "distill", "evaluate", "load_coreset", "load_posterior", "posterior", "save",
    "save_model",
]  # fmt: skip

Architecture = str | Callable[[tuple[int, int, int], int], nn.Module]
"""A name, or a function of (image_shape, classes)."""


def dataset(
    train: Any,
    test: Any = None,
    validation: Any = 0.0,
    *,
    classes: Sequence[str] | None = None,
    normalisation: str = "auto",
    name: str = "own",
    seed: int = 0,
    root: str | Path = "data",
    download: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Images and labels with a test split, ready to be distilled.

    Args:
        train: a name, as --data takes it (digits, cifar10, folder:PATH, ...); or (images, labels), arrays or tensors;
            or a torch Dataset of (image, label). Pixels are uint8, or floats in 0..1 without normalisation, which is
            done here; a Dataset's transforms are applied once.
        test: as `train`; without it a fifth of each class, drawn by `seed`, is held out.
        validation: as `train`, or the share of each class that is held out.
        classes: names in the order of the labels.
        name: of own data, in the folder of its experts.
        root, download: of named data. log: is told what was assumed.
    """
    if isinstance(train, str):
        if test is not None or classes is not None or not isinstance(validation, float | int):
            raise UserError(f"{train} brings its test images and classes: give no other")
        found = datasets.load(
            train, root=root, download=download, normalisation=normalisation, validation=validation, seed=seed
        )
    else:
        share = validation if isinstance(validation, float | int) else 0.0
        source = arrays.read(train, test, None if validation is share else validation, classes)
        found = datasets.assemble(source, name, normalisation, share, seed)
    for note in found.notes:
        log(f"note: {note}")
    return found


def distill(
    data: Any,
    architectures: Architecture | Sequence[Architecture] | None = None,
    *,
    ipc: int | None = None,
    method: str | None = None,
    preset: str = "",
    backend: str = "serial",
    log: Callable[[str], None] = print,
    on_step: Callable[[dict[str, float], int], None] | None = None,
    **settings: Any,
) -> Coreset:
    """The pseudocoreset of `data`, as `fbpc distill` with the same settings makes it.

    Args:
        data: from `dataset`, or what that takes first.
        architectures: one network or several, distilled on at once; None: those of the preset, else convnet-in.
        ipc: images a class.
        method: fbpc | fbpc-isotropic | bpc-fkl | bpc-rkl | bpc-w | vbpc | frepo | random (real images).
        preset: a row of the paper's Table 4, or `digits`, which is small; `settings` change it.
        backend: serial, or ray: a worker for each network, here or on the cluster at `address`.
        log: is told what happens.  on_step: is called after each step with its metrics and its number.
        settings: width, steps, seed, alpha, expert_count, experts (the folder that keeps the expert trajectories;
            without it ./experts) ...: all flags but those of data and output.

    A network that changed needs another name, or another folder of experts.
    """
    source = data if isinstance(data, Dataset) else dataset(data, log=log)
    _check_names(settings, "distill", config.Data, config.Output)
    base = presets.default(source.name, None if ipc is None else str(ipc), preset, method)
    given = {"ipc": ipc, "architectures": None if architectures is None else _names(architectures)}
    chosen = base.updated(**{k: v for k, v in given.items() if v is not None}, backend=backend, **settings)
    chosen = validation.validate(chosen)
    if backend == "ray" and (local := [name for name in chosen.networks.architectures if not custom.importable(name)]):
        raise UserError(f"{local[0]} is known to this process alone: put it into a module, or leave out backend='ray'")
    session = open_session(chosen, log, source)
    state, d = session.initial[0], chosen.distillation
    if session.num_steps:
        interruption = Interruption(())
        with open_backend(chosen, interruption, log) as workers, progress("distil", d.steps, "step") as bar:
            session.train_experts(workers, log)

            def report(step: Step) -> None:
                if on_step:
                    on_step(step.metrics(), step.state.step)
                bar.update()

            steps = session.steps(state, workers)
            state = follow(steps, Checkpointer(None, state, [], d), [report], interruption)
    return session.coreset(state)


def posterior(
    coreset: Coreset,
    architecture: Architecture = "convnet-in",
    *,
    seed: int = 0,
    num_chains: int = 1,
    width: int = 128,
    depth: int = 0,
    augment: str = "dsa",
    device: str = "auto",
    **settings: Any,
) -> Ensemble:
    """Sample a Bayesian network on `coreset` by SGHMC: the samples that `fbpc evaluate` scores.

    Args:
        architecture: any network, not only those that it was distilled on.
        num_chains: chains, of seeds `seed`, `seed` + 1, ...; each gives a sample every `chain_every` of `chain_epochs`
            epochs. `chains`, its earlier name, is still taken.
        width, depth, augment, device: as for `distill`.
        settings: those of the chains, chain_epochs, chain_every, chain_eta ...

    Raises UserError for a chain that left the finite numbers.
    """
    num_chains = settings.pop("chains", num_chains)
    _check_names(settings, "posterior", *(group for group in config.GROUPS if group is not config.Evaluation))
    (name,) = _names(architecture)
    chosen = Config().updated(architectures=(name,), width=width, depth=depth, augment=augment, **settings)
    validation.check(chosen)
    if wrong := coresets.problem(coreset):
        raise UserError(f"not a coreset ({wrong}): give what distill or load returns")
    (spec,) = network_specs(chosen, coreset)
    network = Network(spec, Serial(device, Interruption(())).device)
    images, labels = coreset.images.to(network.device), coreset.likelihood_labels.to(network.device)
    e, samples = chosen.evaluation, []
    with progress("sample", num_chains * (e.chain_epochs // e.chain_every), "sample") as bar, torch_threads(1):
        for number in range(seed, seed + num_chains):
            for params in chains.sampling(Passes(network), images, labels, e, augment, number):
                if not ensemble.finite([params]):
                    raise UserError(
                        f"the chain of seed {number} on {spec.architecture} diverged: lower chain_eta, or use "
                        "chain_noise='consistent'"
                    )
                samples.append(params)
                bar.update()
    return ensemble.gathered(network, samples, coreset)


def evaluate(
    coreset: Coreset,
    data: Any,
    architectures: Architecture | Sequence[Architecture] = "convnet-in",
    *,
    inference: str = "sghmc",
    split: str = "test",
    backend: str = "serial",
    log: Callable[[str], None] = print,
    **settings: Any,
) -> dict[str, dict[str, list[float | None]]]:
    """Score `coreset` on a split of `data`, as `fbpc evaluate` does: {network: {score: [one value a seed]}}.

    Args:
        data: from `dataset`, or what that takes first.
        inference: sghmc | last-layer | mse | ensemble.
        split: test | validation.
        settings: num_chains, net_steps, chain_epochs, width, ...: all flags but those of data, experts and output.

    None is the value of a chain that left the finite numbers. Raises UserError.
    """
    source = data if isinstance(data, Dataset) else dataset(data, log=log)
    _check_names(settings, "evaluate", config.Data, config.Experts, config.Distillation, config.Output)
    chosen = Config().updated(architectures=_names(architectures), inference=inference, backend=backend, **settings)
    chosen = validation.validate(chosen)
    if wrong := coresets.problem(coreset):
        raise UserError(f"not a coreset ({wrong}): give what distill or load_coreset returns")
    source = source._replace(mean=coreset.mean, std=coreset.std)
    with open_backend(chosen, Interruption(()), log) as workers:
        specs = network_specs(chosen, coreset)
        return scoring.evaluate({"coreset": coreset}, specs, source, split, chosen, workers, log).to_json()["coresets"][
            "coreset"
        ]


def save(what: Coreset | Ensemble, path: str | Path) -> None:
    """Write a coreset or posterior samples to one safetensors file, a path, s3:// or gs://. What is there is
    replaced."""
    if isinstance(what, Ensemble):
        ensemble.save(what, place(str(path)))
    else:
        coresets.save(what, place(str(path)))


def save_model(samples: Ensemble, folder: str | Path, images: Any, **facts: Any) -> str:
    """Write posterior samples as an MLflow model to a new `folder`, with some uint8 `images` (n, c, h, w) as its input
    example and `facts` as metadata; gives the command that serves it. Raises UserError."""
    return model_export.save(samples, model_export.target(str(folder)), facts, np.asarray(images))


def load_coreset(path: str | Path) -> Coreset:
    """The coreset that `save` or `fbpc distill` (RUN/coreset/coreset.safetensors) wrote. Raises UserError."""
    return coresets.load(place(str(path)))


def load_posterior(path: str | Path, architecture: Architecture | None = None, *, device: str = "auto") -> Ensemble:
    """The posterior samples that `save` wrote; those of a network of your own with that `architecture` again, for a
    file alone runs no code. Raises UserError."""
    name = "" if architecture is None else _names(architecture)[0]
    return ensemble.load(place(str(path)), name, Serial(device, Interruption(())).device)


def _names(architectures: Architecture | Sequence[Architecture]) -> tuple[str, ...]:
    custom.search_current_folder()
    several = [architectures] if isinstance(architectures, str) or callable(architectures) else architectures
    return tuple(each if isinstance(each, str) else custom.register(each) for each in several)


def _check_names(settings: dict[str, Any], function: str, *others: type) -> None:
    """Raise UserError for a setting that `function` has no use for."""
    others_names = {f.name for group in others for f in fields(group)}
    known = [name for name in Config().flat() if name not in others_names]
    for name in config.current_names(settings):
        if name not in known:
            raise UserError(f"{function} has no setting '{name}': {closest(name, known)}")
