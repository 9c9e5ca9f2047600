"""Numeric precision: bf16 of a frozen encoder where it is safe, and CUDA's process-wide switches."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["32", "bf16"]
BF16_TOLERANCE = 0.02
"""Largest relative error of targets in bf16; seen: see docs/performance.md."""


@dataclass(frozen=True)
class CudaSettings:
    """How CUDA computes; a run on another device leaves them alone.

    Args:
        float32: ``tf32`` rounds the inputs of float32 matrix products and convolutions to 10 bits of mantissa, as the
            tensor cores take them; ``ieee`` computes in full. torch by itself has TF32 in convolutions only, so that
            a step is neither.
        attention: ``flash`` leaves out cuDNN's attention, which Hopper GPUs would prefer and which is planned anew
            for every new shape of a batch; ``cudnn`` lets torch choose among all.
    """

    float32: Literal["tf32", "ieee"] = "tf32"
    attention: Literal["flash", "cudnn"] = "flash"

    def apply(self, device: torch.device) -> None:
        """Set both for this process, where ``device`` is a CUDA device.

        By torch's older switches: the getters that Lightning and inductor call refuse a mix with the newer ones.
        """
        if device.type != "cuda":
            return
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.float32 == "tf32"
        torch.backends.cuda.enable_cudnn_sdp(self.attention == "cudnn")


def float32_mode() -> str:
    """What float32 means on CUDA in this process: ``tf32``, ``ieee``, or which part is which."""
    products, convolutions = (
        "tf32" if tf32 else "ieee" for tf32 in (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    )
    return products if products == convolutions else f"{products} in matrix products, {convolutions} in convolutions"


def best_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that has it; a CPU may emulate it slowly, so there it must be asked for."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "32"


def trainer_precision(accelerator: str) -> str:
    """Lightning's name of the precision to train in where none is asked for: bf16-mixed on a GPU that has bf16."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and best_precision(torch.device("cuda")) == "bf16" else "32-true"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to bf16, or no autocast, whatever the caller's own precision is."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference by that of the reference."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())
