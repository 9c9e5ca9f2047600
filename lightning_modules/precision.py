"""Numeric precision: bf16 for a frozen encoder where it is safe and fast, and CUDA's process-wide switches."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from datamodules.files import read_text

logger = logging.getLogger(__name__)

Precision = Literal["32", "bf16"]
BF16_TOLERANCE = 0.02
"""Largest accepted relative error of targets in bf16. For measured errors see docs/performance.md."""

BF16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of a processor that multiplies bf16 numbers: x86's two and ARM's."""
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Features that decide how fast a step is on a CPU, under Linux's names: vectors and bf16 of x86, then of ARM."""


@dataclass(frozen=True)
class CudaSettings:
    """Numeric settings of CUDA; a run on another device does not change them.

    Args:
        float32: ``tf32`` rounds the inputs of float32 matrix products and convolutions to 10 bits of mantissa, the
            format of the tensor cores; ``ieee`` computes in full precision. torch's own default is TF32 in
            convolutions only, a mixture of the two.
        attention: ``flash`` excludes cuDNN's attention, which torch prefers on Hopper GPUs and which builds a new plan
            for every new shape of a batch; ``cudnn`` lets torch choose among all implementations.
    """

    float32: Literal["tf32", "ieee"] = "tf32"
    attention: Literal["flash", "cudnn"] = "flash"

    def apply(self, device: torch.device) -> None:
        """Apply both settings to this process if ``device`` is a CUDA device.

        It uses torch's older switches, since the getters that Lightning and inductor call refuse a mix with newer ones.
        """
        if device.type != "cuda":
            return
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.float32 == "tf32"
        torch.backends.cuda.enable_cudnn_sdp(self.attention == "cudnn")


def float32_mode() -> str:
    """Mode of float32 on CUDA in this process: ``tf32``, ``ieee``, or the mode of each part if they differ."""
    products, convolutions = (
        "tf32" if tf32 else "ieee" for tf32 in (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    )
    return products if products == convolutions else f"{products} in matrix products, {convolutions} in convolutions"


def best_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that supports it, else 32. A CPU may emulate bf16 slowly, so there it must be set explicitly."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "32"


@cache
def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of ``CPU_FEATURES`` that the first processor of ``cpuinfo`` has; none where the system does not say."""
    if not cpuinfo.is_file():
        return ()
    lines = (line.partition(":") for line in read_text(cpuinfo).splitlines())
    flags = next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), [])
    return tuple(feature for feature in CPU_FEATURES if feature in flags)


@rank_zero_only
@cache  # once for each setting, however many students and teachers are prepared
def warn_if_bf16_is_slow(device: torch.device, setting: str, instead: str) -> None:
    """Warn that ``setting`` asks for bf16 on a CPU without units for it, and name the value to set ``instead``.

    torch computes bf16 there by converting: the forward pass of a front end took 4.95 s instead of 0.47 s on AVX2.
    """
    features = cpu_features()
    if device.type == "cpu" and features and not BF16_UNITS & set(features):
        name = setting.partition("=")[0]
        logger.warning(
            "%s is slower than float32 on this CPU, which has no units for bf16 (AVX512-BF16 or AMX): set %s=%s",
            *(setting, name, instead),
        )


def chosen_precision(asked: Literal["auto", "32", "bf16"], device: torch.device) -> Precision:
    """Precision of a teacher on ``device``; warns if bf16 is asked for where it is slow."""
    if asked == "auto":
        return best_precision(device)
    if asked == "bf16":
        warn_if_bf16_is_slow(device, "model.teacher.init_args.precision=bf16", "32")
    return asked


def trainer_precision(accelerator: str) -> str:
    """Default training precision under Lightning's name: bf16-mixed on a GPU that supports bf16, else 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and best_precision(torch.device("cuda")) == "bf16" else "32-true"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Context with autocast to bf16 or without autocast, whatever the caller's precision is."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference, divided by the L2 norm of the reference."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())


@torch.no_grad()
def is_safe_in_bf16(targets: Callable[[Precision], Mapping[str, Tensor]], device: torch.device) -> bool:
    """Whether bf16 changes no target of a teacher by more than the tolerance; logs the errors.

    Args:
        targets: computes the targets, by name, of a fixed input in a precision.
        device: device of the teacher, for the message.
    """
    exact, half = targets("32"), targets("bf16")
    errors = {name: relative_error(half[name], target_BFD) for name, target_BFD in exact.items()}
    if safe := all(error <= BF16_TOLERANCE for error in errors.values()):  # false for NaN
        message = "teacher computes in bf16 on %s: relative errors of its targets are %s"
    else:
        message = f"teacher computes in float32 on %s: bf16 has relative errors of %s, above {BF16_TOLERANCE}"
    found = ", ".join(f"{error:.2g} ({name})" for name, error in errors.items())
    logger.log(logging.INFO if safe else logging.WARNING, message, device, found)
    return safe
