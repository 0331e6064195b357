"""Sizes of a run, chosen from its data and machine: networks, experts, rates, steps, chains.

A `Rung` of `LADDER` fixes what costs time; `choose` takes the largest rung whose estimated seconds fit the limit, and
fits the other settings to the data. All functions are pure: equal facts give equal settings.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fbpc_ray.core.durations import describe_seconds
from fbpc_ray.core.tables import text_table


class Training(NamedTuple):
    """The training of an expert."""

    batch: int
    """Images of an SGD step."""
    per_epoch: int
    """SGD steps of an epoch."""
    epochs: int


class TrainedNetworks(NamedTuple):
    """What an --inference without chains trains on a coreset for one seed."""

    networks: int
    steps: int
    """Of each network."""
    batch: int
    """Images of a step."""


class Facts(NamedTuple):
    """What the sizes depend on."""

    images: int
    """Training images."""
    classes: int
    image_shape: tuple[int, int, int]
    """(c, h, w)."""
    test_images: int
    ipc: int = 1
    method: str = "fbpc"
    architectures: tuple[str, ...] = ("convnet-in",)
    cores: int = 2
    """CPU cores of this machine that the run may use."""
    overrides: Mapping[str, Any] = MappingProxyType({})
    """{setting on the command line: value}; the choice leaves these alone, and fits the others to them."""
    views: int = 1
    """Augmentations of u in a step of fbpc."""
    draws: int = 1
    """--draws-per-step: gradients of each network in a step."""
    trained: TrainedNetworks | None = None
    """Of each seed of the evaluation; None: it runs chains."""


class Rung(NamedTuple):
    """The sizes that cost time."""

    width: int
    expert_count: int
    sgd_steps: int
    """Least SGD steps of an expert; whole epochs make them more."""
    real_batch_size: int
    steps: int
    num_chains: int
    chain_epochs: int


LADDER = (
    Rung(16, 2, 100, 16, 30, 2, 200),
    Rung(16, 3, 120, 32, 60, 3, 300),
    Rung(32, 3, 120, 32, 60, 3, 500),
    Rung(32, 5, 150, 32, 100, 3, 500),
    Rung(32, 5, 300, 64, 150, 3, 1000),
    Rung(64, 5, 600, 64, 200, 3, 1000),
    Rung(64, 10, 1000, 128, 300, 3, 1000),
    Rung(128, 10, 2000, 256, 500, 3, 1000),
    Rung(128, 20, 5000, 256, 1000, 5, 1000),
)
"""From the smallest to the largest run; the paper's is larger than all."""

STEPS = {"vbpc": 10, "frepo": 10, "bpc-fkl": 2, "bpc-rkl": 2, "bpc-w": 2, "random": 0}
"""{method: its steps, as a multiple of a rung's}; others take those of the rung."""


class Level(NamedTuple):
    """A preset that chooses sizes."""

    seconds: float
    """Limit on the estimated seconds of a run."""
    device: str
    """cpu | cuda: whose speed the estimate is for."""


LEVELS = {"quick": Level(60, "cpu"), "laptop": Level(240, "cpu"), "gpu": Level(3600, "cuda")}
"""{--preset: its limit and device}."""

MOST_CORES = 8
"""Cores that an estimate counts at most: a chain or an expert keeps one core busy, and a run has few of them."""


class Machine(NamedTuple):
    """The speed of a device: of a CPU core, half of what a server's does [measured]; of a GPU, a guess."""

    pass_seconds: float
    """Of a forward and backward pass, whatever its size."""
    channel_seconds: float
    """Of a pixel in each of the width's channels: what memory costs."""
    flops: float
    """Floating-point operations a second of convolutions."""


MACHINES = {"cpu": Machine(3e-3, 2e-8, 6e10), "cuda": Machine(4e-3, 4e-11, 1e13)}

MACS_OF_CONVNET = {"vgg11": 3.0, "alexnet": 3.0, "resnet18": 11.0, "resnet34": 23.0, "lenet": 0.1}
"""{network: its multiply-accumulates, as a multiple of a ConvNet's of the same width}; others count as a ConvNet."""


class Seconds(NamedTuple):
    """Estimated seconds of each part of a run."""

    experts: float
    distillation: float
    chains: float

    @property
    def total(self) -> float:
        return sum(self)


class Choice(NamedTuple):
    """A chosen setting."""

    value: int | float
    reason: str


class SizeRequest(NamedTuple):
    """What a command asks of the choice."""

    preset: str = ""
    """A key of `LEVELS`; empty: gpu where the run uses one, else laptop."""
    flags: frozenset[str] = frozenset()
    """Settings on the command line."""
    budget: float = 0.0
    """Seconds of --time-budget; 0: those of the preset."""


class Sizes(NamedTuple):
    """The settings that `choose` chose."""

    choices: dict[str, Choice]
    limit: float
    """Seconds that the run should take at most."""
    seconds: Seconds
    """The estimate."""
    serial: float = 0.0
    """The estimated seconds of the run in one process."""

    def settings(self) -> dict[str, Any]:
        """Return {setting: value}."""
        return {name: choice.value for name, choice in self.choices.items()}


def choose(facts: Facts, level: Level, rung: Rung | None = None) -> Sizes:
    """Choose the settings of a run on data of `facts`.

    Args:
        rung: taken instead of the largest rung whose estimate fits `level.seconds`.
    """
    ladder = rungs(facts)
    if rung is None:
        fitting = (one for one in reversed(ladder) if estimate(facts, one, level.device).total <= level.seconds)
        rung = next(fitting, ladder[0])
    seconds = estimate(facts, rung, level.device)
    interval = sample_interval(facts, rung)
    choices = {
        "width": Choice(rung.width, _width_reason(level, seconds, rung == ladder[0])),
        **(_of_method(facts, rung, level.device) if facts.method != "random" else {}),
        "num_chains": Choice(rung.num_chains, "chains, or trained networks, of each coreset: their spread is the +-"),
        "chain_epochs": Choice(rung.chain_epochs, f"{rung.chain_epochs // interval} posterior samples per chain"),
        "chain_every": Choice(interval, "epochs from one sample to the next"),
    }
    choices = {name: choice for name, choice in choices.items() if name not in facts.overrides}
    return Sizes(choices, level.seconds, seconds, estimate(facts._replace(cores=1), rung, level.device).total)


def rungs(facts: Facts) -> list[Rung]:
    """Return `LADDER` with the sizes of the command line."""
    fixed_values = {name: value for name, value in facts.overrides.items() if name in Rung._fields}
    if facts.method in STEPS:
        fixed_values.pop("steps", None)  # the ladder counts fbpc's
    least = facts.overrides.get("chain_every", 1)
    return [one._replace(**{"chain_epochs": max(one.chain_epochs, least), **fixed_values}) for one in LADDER]


def _width_reason(level: Level, seconds: Seconds, smallest: bool) -> str:
    if seconds.total > level.seconds and smallest:
        return "channels; the least that is offered"
    return f"channels; with the counts below, the largest that fit {describe_seconds(level.seconds)}"


def _of_method(facts: Facts, rung: Rung, device: str) -> dict[str, Choice]:
    m, n = facts.ipc * facts.classes, facts.images
    if facts.method in ("vbpc", "frepo"):
        real = min(max(128, rung.real_batch_size), n)
        return {
            "steps": Choice(num_steps(facts, rung), "ten times fbpc's: such a step costs a tenth"),
            "real_batch_size": Choice(real, f"of {n:,} real images per step"),
        }
    batch, per_epoch, epochs = training(facts, rung, device)
    start, sgd_steps = start_epoch(facts, epochs, per_epoch), per_epoch * epochs
    experts = {
        "expert_count": Choice(rung.expert_count, "trajectories of each network"),
        "expert_epochs": Choice(epochs, f"{sgd_steps:,} SGD steps per expert, {per_epoch:,} per epoch"),
        "expert_batch_size": Choice(batch, f"of {n:,} images: an epoch needs more than a step or two"),
        "expert_lr": Choice(0.05 if sgd_steps < 5000 else 0.01, f"for {sgd_steps:,} SGD steps; the paper's take 9,800"),
    }
    if facts.method.startswith("bpc-"):
        return experts | {
            "start_epoch": Choice(max(1, epochs // 2), "theta_0 comes from the first half of a trajectory"),
            "steps": Choice(num_steps(facts, rung), "updates of the images, twice fbpc's"),
        }
    many_classes = facts.classes >= 100
    rates = f"the paper's for {'100' if many_classes else '10'} classes"
    pixels = facts.image_shape[1] * facts.image_shape[2]
    size = min(m, most_in_batch(facts, rung, device))
    return experts | {
        "start_epoch": Choice(
            start, f"an expert has taken {start * per_epoch:,} SGD steps by then: it knows something"
        ),
        "steps": Choice(rung.steps, "updates of the images; the first 50 matter most"),
        "alpha": Choice(alpha(m, pixels, rung.steps), f"for {m:,} images of {pixels:,} pixels, {rung.steps:,} steps"),
        "batch_size": Choice(size, "all coreset images" if size == m else f"of {m:,} coreset images: memory"),
        "gamma": Choice(gamma(facts), "fewer images are fitted closer, or a MAP solve ends at once"),
        "map_lr": Choice(map_lr(rung), "a narrow network takes larger steps" if rung.width < 32 else "the paper's"),
        "lambda_x": Choice(0.1 if many_classes else 0.05, rates),
        "lambda_u": Choice(0.1 if many_classes else 0.01, rates),
        "real_batch_size": Choice(min(rung.real_batch_size, n), f"of {n:,} real images in each of the K steps"),
    }


def training(facts: Facts, rung: Rung, device: str) -> Training:
    """Choose the batches and epochs of an expert.

    The batch is a power of two near a sixteenth of the images: 4 to 64, on a GPU to 256. The epochs, 2 to 50, make at
    least `rung.sgd_steps` SGD steps, and reach beyond the --start-epoch of the command line.
    """
    near = 2 ** round(math.log2(max(1.0, facts.images / 16)))
    batch = facts.overrides.get("expert_batch_size", max(4, min(near, 256 if device == "cuda" else 64)))
    per_epoch = -(-facts.images // max(1, batch))
    least = max(2, facts.overrides.get("start_epoch", 0) + 1)
    epochs = facts.overrides.get("expert_epochs", max(least, min(50, -(-rung.sgd_steps // per_epoch))))
    return Training(batch, per_epoch, max(1, epochs))


def start_epoch(facts: Facts, epochs: int, per_epoch: int) -> int:
    """Return T: a quarter of the epochs, or half from 10 images per class on, after 30 SGD steps where that is half."""
    learned = min(-(-30 // per_epoch), epochs // 2)
    return facts.overrides.get("start_epoch", max(1, learned, round(epochs / (2 if facts.ipc >= 10 else 4))))


def most_in_batch(facts: Facts, rung: Rung, device: str) -> int:
    """Return the coreset images whose gradient fits in memory."""
    pixels = facts.image_shape[1] * facts.image_shape[2]
    return max(1, min(500 if device == "cuda" else 100, int(3e7 / (rung.width * pixels))))


def alpha(m: int, pixels: int, steps: int) -> float:
    """Return the learning rate of the pixels: 10 per image of 32x32 as the paper, or 20 in a short run."""
    value = (20 if steps < 300 else 10) * m * pixels / 1024
    return float(f"{min(1000.0, max(1.0, value)):.1g}")


def gamma(facts: Facts) -> float:
    """Return the loss at which a MAP solve stops."""
    return 0.2 if facts.ipc >= 50 else 0.1 if facts.ipc * facts.classes >= 10 else 0.01


def map_lr(rung: Rung) -> float:
    """Return Adam's learning rate of the MAP solve."""
    return 0.002 if rung.width < 32 else 0.001


def map_steps(gamma: float) -> int:
    """Return the usual Adam steps of a MAP solve [measured at 10 images, width 32]."""
    return 40 if gamma >= 0.1 else 80


def sample_interval(facts: Facts, rung: Rung) -> int:
    """Return the epochs from one sample of a chain to the next."""
    return facts.overrides.get("chain_every", max(1, rung.chain_epochs // 10))


def num_steps(facts: Facts, rung: Rung) -> int:
    """Return the steps of the distillation."""
    steps = STEPS.get(facts.method, 1) * rung.steps
    return facts.overrides.get("steps", steps) if steps else 0


def snapshots_met(steps: float, snapshots: int) -> float:
    """Return the expected different snapshots in `steps` draws: each costs its K steps once."""
    return snapshots * (1 - (1 - 1 / snapshots) ** steps)


def estimate(facts: Facts, rung: Rung, device: str) -> Seconds:
    """Estimate the seconds of a run, without a start of Ray and compilation."""
    cores = max(1, min(facts.cores, MOST_CORES)) if device == "cpu" else 1
    networks = len(facts.architectures)
    at_once = min(cores, networks * facts.draws)
    m = facts.ipc * facts.classes
    tasks = rung.expert_count * networks
    _, per_epoch, epochs = training(facts, rung, device)
    expert = epochs * (per_epoch * MACHINES[device].pass_seconds + _images(facts, rung, device, facts.images))
    u_pass = _pass(facts, rung, device, m)
    gradients = num_steps(facts, rung) * facts.draws  # of each network
    if facts.method in ("vbpc", "frepo", "random"):
        expert = 0.0
        distillation = gradients * (_pass(facts, rung, device, 2 * m) + _images(facts, rung, device, 128))
    else:
        like_fbpc = gradients / STEPS.get(facts.method, 1)
        num_snapshots = snapshots_met(
            like_fbpc, max(1, rung.expert_count * (epochs - start_epoch(facts, epochs, per_epoch) + 1))
        )
        k_steps = 30 * _pass(facts, rung, device, min(rung.real_batch_size, facts.images))
        views = facts.views if facts.method.startswith("fbpc") else 1
        on_u = (map_steps(gamma(facts)) + 30 + 20 * views) * u_pass
        distillation = like_fbpc * on_u + num_snapshots * k_steps
    prediction = _images(facts, rung, device, facts.test_images) / 3
    if facts.trained is None:
        num_samples = rung.chain_epochs // sample_interval(facts, rung)
        chain = rung.chain_epochs * u_pass + num_samples * prediction
    else:
        count, net_steps, batch = facts.trained
        chain = count * (net_steps * _pass(facts, rung, device, batch) + prediction)
    chains = (1 if facts.method == "random" else 2) * networks * rung.num_chains
    return Seconds(
        math.ceil(tasks / cores) * expert, distillation * networks / at_once, math.ceil(chains / cores) * chain,
    )  # fmt: skip


def _pass(facts: Facts, rung: Rung, device: str, images: int) -> float:
    return MACHINES[device].pass_seconds + _images(facts, rung, device, images)


def _images(facts: Facts, rung: Rung, device: str, images: int) -> float:
    """Return the seconds that forward and backward passes over `images` take, the mean over the networks."""
    machine, (channels, height, width) = MACHINES[device], facts.image_shape
    pixels, macs, inputs = height * width, 0.0, channels
    for block in range(_depth(height)):
        macs += 9 * inputs * rung.width * pixels / 4**block
        inputs = rung.width
    factors = [MACS_OF_CONVNET.get(name.partition("-")[0], 1.0) for name in facts.architectures]
    factor = sum(factors) / len(factors)
    return images * factor * (pixels * rung.width * machine.channel_seconds + 6 * macs / machine.flops)


def _depth(size: int) -> int:
    return max(2, round(size / 8).bit_length())


def describe_device(device: str, cores: int) -> str:
    """Write a device in words."""
    return "a GPU" if device == "cuda" else f"{cores} CPU core{'s' if cores > 1 else ''}"


def describe(sizes: Sizes, paper: Mapping[str, Any]) -> str:
    """Return the table of the settings that differ from the values of `paper`, and a line of the others, by flags."""
    rows, equal = [], list[str]()
    for name, choice in sizes.choices.items():
        flag = f"--{name.replace('_', '-')}"
        if choice.value == paper[name]:
            equal.append(f"{flag} {choice.value:g}")
        else:
            rows.append((flag, f"{choice.value:g}", f"{paper[name]:g}", choice.reason))
    table = text_table(("setting", "value", "paper", "why"), rows) if rows else ""
    return "\n".join(part for part in (table, f"as the paper: {', '.join(equal)}" if equal else "") if part)
