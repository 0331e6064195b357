"""Number formats of passes: float32, or bfloat16 by autocast.

Parameters, losses and gradients are float32 in both.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from fbpc_ray.core.errors import UserError


def autocast(precision: str, device: str) -> AbstractContextManager:
    """Run convolutions and linear layers of the block in bfloat16 for "bf16"; do nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


def supports_bf16(device: str) -> bool:
    """Return whether the device has bfloat16 instructions; torch emulates them elsewhere, slowly."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def require(precision: str, device: str) -> None:
    """Raise UserError for bf16 on a device without bfloat16 instructions."""
    if precision == "bf16" and not supports_bf16(device):
        kind = "GPU" if torch.device(device).type == "cuda" else "CPU (neither avx512_bf16 nor AMX)"
        raise UserError(f"--precision bf16: this {kind} has no bfloat16 instructions; use --precision fp32")
