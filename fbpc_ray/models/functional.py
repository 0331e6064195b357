"""Networks as pure functions of their parameters.

BatchNorm: distillation uses batch statistics throughout; a posterior sample that predicts on test data uses statistics
re-estimated on the pseudocoreset, so that predictions don't depend on which test images share a batch.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import seeded_globally
from fbpc_ray.core.types import Params
from fbpc_ray.models.registry import ARCHITECTURES, Spec, build, canonical, specify

__all__ = ["ARCHITECTURES", "Network", "Spec", "build", "canonical", "equal_batches", "specify"]

STATISTICS_BATCH = 256
"""Most images of a batch over which BatchNorm's statistics are averaged."""


class Network:
    """A network as pure functions of its parameters, on one device."""

    def __init__(self, spec: Spec, device: str | torch.device = "cpu"):
        self.spec = spec._replace(architecture=canonical(spec.architecture))
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):  # these initial parameters are never used
            self._predicting = build(spec).to(self.device).eval()
        self._training = _with_batch_statistics(self._predicting)
        self._estimating = _with_averaged_statistics(self._predicting)
        self._buffers = dict(self._predicting.named_buffers())
        self.shapes = {name: value.shape for name, value in self._predicting.named_parameters()}
        self.buffer_names = self._buffers.keys()
        self._tied = _shares_tensors(self._predicting)

    def init(self, source: torch.Generator) -> Params:
        """Draw theta_0 of Algorithm 1 from the prior pi_0: PyTorch's default initialisation."""
        return {name: value.detach() for name, value in self.module(source).named_parameters()}

    def module(self, source: torch.Generator) -> nn.Module:
        """Build an nn.Module with new initial parameters, in training mode, on the device."""
        with seeded_globally(source):
            return build(self.spec).to(self.device).train()

    def forward(self, params: Params, images: Tensor) -> Tensor:
        """Return logits (b, d) of normalised images (b, c, h, w); BatchNorm uses the statistics of this batch."""
        return self._call(self._training, params, images)

    def features(self, params: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last linear layer's inputs (b, h) and logits (b, d); BatchNorm as in `forward`.

        Raises UserError for a network that doesn't end in a linear layer.
        """
        return self._features(self._training, params, images)

    @torch.no_grad()
    def predict_features(self, params: Params, statistics: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return `features`, each image on its own: BatchNorm uses `statistics`."""
        return self._features(self._predicting, {**params, **statistics}, images)

    def _features(self, module: nn.Module, tensors: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(arguments[0])
            outputs.append(output)

        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            logits = self._call(module, tensors, images)
        finally:
            for handle in handles:
                handle.remove()
        if not outputs or outputs[-1] is not logits or inputs[-1].ndim != 2:
            raise UserError(
                f"--architectures {self.spec.architecture}: its logits are not the output of a linear layer, which "
                "last-layer inference and --method vbpc and frepo need; end it in nn.Linear, or take another method"
            )
        return inputs[-1], logits

    @torch.no_grad()
    def statistics(self, params: Params, batches: Iterable[Tensor]) -> Params:
        """Average BatchNorm's mean and variance over `batches` of images, for `predict`; {} without BatchNorm."""
        buffers = {name: value.clone() for name, value in self._buffers.items()}
        for images in batches if buffers else ():
            self._call(self._estimating, {**params, **buffers}, images)  # changes `buffers` in place
        return buffers

    @torch.no_grad()
    def predict(self, params: Params, statistics: Params, images: Tensor) -> Tensor:
        """Return logits (b, d), each image on its own: BatchNorm uses `statistics`.

        Raises:
            ValueError: `statistics` are not those of `Network.statistics`.
        """
        if statistics.keys() != self._buffers.keys():
            raise ValueError(f"{self.spec.architecture}: predict needs the return value of `statistics`")
        return self._call(self._predicting, {**params, **statistics}, images)

    def _call(self, module: nn.Module, tensors: Params, images: Tensor) -> Tensor:
        """Call `module` with `tensors`; looking for tied ones takes as long as some layers of a small network."""
        return functional_call(module, tensors, (images,), tie_weights=self._tied)

    def parameters_of(self, snapshot: dict[str, Tensor]) -> Params:
        """Take the parameters out of a module's state dict, onto the device.

        Raises:
            UserError: the state is another network's.
        """
        for name, shape in self.shapes.items():
            if name not in snapshot or snapshot[name].shape != shape:
                raise UserError(
                    f"the experts of {self.spec.architecture} belong to another network ({name} differs): "
                    "give another --experts folder, or rename the network"
                )
        return {name: snapshot[name].to(self.device) for name in self.shapes}

    @property
    def has_batchnorm(self) -> bool:
        """Whether a layer computes statistics of a batch."""
        return any(isinstance(layer, _BatchNorm) for layer in self._predicting.modules())

    @property
    def parameter_count(self) -> int:
        return sum(value.numel() for value in self._predicting.parameters())


def equal_batches(images: Tensor, most: int = STATISTICS_BATCH) -> list[Tensor]:
    """Deal images (n, c, h, w) out, one by one, to the fewest batches of at most `most`, for `Network.statistics`.

    The average weighs batches equally, so their sizes differ by one at most; and each has images of all classes, where
    a run of a coreset, which is sorted by class, would not.
    """
    count = -(-len(images) // most)
    return [images[number::count] for number in range(count)]


def _shares_tensors(module: nn.Module) -> bool:
    """Return whether two layers share a parameter or buffer."""
    names = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return len({id(tensor) for _, tensor in names}) < len(names)


def _with_batch_statistics(module: nn.Module) -> nn.Module:
    """Copy a module; BatchNorm layers of the copy always use the statistics of the batch."""
    module = deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def _with_averaged_statistics(module: nn.Module) -> nn.Module:
    """Copy a module in training mode; BatchNorm layers of the copy average over batches."""
    module = deepcopy(module).train()
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = None
    return module
