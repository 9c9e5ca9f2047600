"""Numeric precision of a frozen encoder: bf16 where it is safe, and how much that changes its outputs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["32", "bf16"]
BF16_TOLERANCE = 0.02
"""Largest relative error of targets in bf16; seen: see docs/performance.md."""


def best_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that has it; a CPU may emulate it slowly, so there it must be asked for."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "32"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to bf16, or no autocast, whatever the caller's own precision is."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference by that of the reference."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())


def float32_mode() -> str:
    """``tf32`` where CUDA may round the factors of float32 products or convolutions to TF32, else ``ieee``."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    return "tf32" if any(backend.fp32_precision == "tf32" for backend in backends) else "ieee"
