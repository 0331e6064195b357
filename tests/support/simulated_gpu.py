"""A simulated GPU: its tensors compute on the CPU, and refuse what those of CUDA refuse.

It shows, where there is no GPU, that code for `--device cuda` mixes no tensors of the two devices and runs no operation
whose bits differ from one time to the next, and how often it waits for the GPU. The values are those of the CPU, to the
bit. Speed, memory and CUDA's own kernels need a real one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
TAKES_INDICES_ON_THE_CPU = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
)  # fmt: skip
WAITS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
"""Operations whose result the program needs before it can go on."""
NOT_DETERMINISTIC = ("grid_sampler", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample")
"""Parts of the names of operations whose gradient CUDA sums in any order, `use_deterministic_algorithms` or not."""


class GpuTensor(Tensor):
    """A tensor on the simulated GPU."""

    on_cpu: Tensor
    """Its values."""

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "GpuTensor":
        empty = torch.empty_strided(on_cpu.shape, on_cpu.stride(), dtype=on_cpu.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, empty, False, device_for_backend_keys=GPU)
        tensor.on_cpu = on_cpu
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        return _run(func, args, kwargs or {})[0]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore


class SimulatedGpu(TorchDispatchMode):
    """Sends tensors to the simulated GPU and back, while it is entered."""

    def __init__(self):
        super().__init__()
        self.waits = 0
        """How often the program waited for a result: a number, a decision, or a copy to the CPU."""
        self.varying: set[str] = set()
        """Operations that were run though CUDA doesn't repeat their bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, waits = _run(func, args, kwargs or {})
        self.waits += waits
        name = str(func)
        if "backward" in name and any(part in name for part in NOT_DETERMINISTIC):
            self.varying.add(name)
        return result


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Run an operation of torch; return its result, and whether the program waits for the GPU. Raises RuntimeError."""
    if operation is torch.ops.prim.device.default:
        return GPU, False
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
    to_gpu = _to_gpu(operation, args, kwargs, bool(on_gpu))
    if on_gpu and operation not in COPIES and any(_is_misplaced(tensor, operation, args) for tensor in tensors):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, got cuda:0 and cpu")
    if to_gpu and kwargs.get("generator") is not None:
        raise RuntimeError(f"{operation}: expected a 'cuda' device type for generator, got 'cpu'")
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = pytree.tree_map_only(GpuTensor, lambda tensor: tensor.on_cpu, (args, kwargs))
    result = operation(*plain_args, **plain_kwargs)
    waits = bool(on_gpu) and (operation in WAITS or not to_gpu)
    if not to_gpu:
        return result, waits
    # An operation in place returns the tensor that it was given.
    wrapped = pytree.tree_map_only(
        Tensor, lambda tensor: on_gpu[id(tensor)] if id(tensor) in on_gpu else GpuTensor(tensor), result
    )
    return wrapped, waits


def _is_misplaced(tensor: Tensor, operation: Any, args: Any) -> bool:
    """Return whether `tensor` is on the CPU where CUDA takes it from the GPU alone, being no number and no index."""
    if isinstance(tensor, GpuTensor) or not tensor.ndim:
        return False
    may_index = operation in TAKES_INDICES_ON_THE_CPU and isinstance(args[0], GpuTensor)
    return not (may_index and any(tensor is index for index in args[1]))


def _to_gpu(operation: Any, args: Any, kwargs: dict[str, Any], has_gpu_tensor: bool) -> bool:
    """Return whether the result is on the GPU."""
    if (device := kwargs.get("device")) is not None:
        return torch.device(device).type in ("cuda", "meta")  # meta: torch's own name for where a GpuTensor is
    if operation is aten.copy_.default or operation in TAKES_INDICES_ON_THE_CPU:
        return isinstance(args[0], GpuTensor)
    return has_gpu_tensor


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Have a simulated GPU as CUDA's only device within the block."""
    torch._C._ensureCUDADeviceGuardSet()
    facts = {
        "_lazy_init": None, "is_available": True, "is_bf16_supported": True, "synchronize": None,
        "get_device_name": "simulated GPU",
    }  # fmt: skip
    with mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=value) for name, value in facts.items()}):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes by here, not by CUDA's start
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with SimulatedGpu() as gpu:
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(False)


def enter() -> None:
    """Have a simulated GPU in this process for good: `worker_process_setup_hook` of Ray's workers."""
    _ENTERED.enter_context(simulated_gpu())


_ENTERED = ExitStack()
