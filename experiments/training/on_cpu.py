"""What a process that computes on a CPU sets: memory that the C library keeps, and a warning where bf16 is slow."""

import ctypes
import logging
import os
import platform

import lightning as L

from lightning_modules.precision import warn_if_bf16_is_slow

log = logging.getLogger(__name__)

# Numbers and values of glibc's <malloc.h>, each an int. The end of the heap is never given back, and it grows by 256 MB
# at a time, which take no memory until they are used. A buffer above 32 MB, the most that glibc before 2.35 accepts,
# may still be mapped on its own where the heap has no room for it: without any mapping, batches of many lengths
# fragment the heap (+29 % of memory after 60 steps, and growing).
MALLOPT = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 2**28)}


def prepare_cpu(trainer: L.Trainer) -> None:
    """Prepare this process for the steps of ``trainer``, if its device is a CPU."""
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if str(trainer.precision).startswith("bf16"):
        warn_if_bf16_is_slow(trainer.strategy.root_device, f"trainer.precision={trainer.precision}", "32-true")


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, since each step would fault the same pages in again.

    Nothing is set without glibc, or where the user has set the C library's memory (``MALLOC_...`` or
    ``GLIBC_TUNABLES``). Returns whether all is set.
    """
    by_user = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if by_user or any(name.startswith("MALLOC_") for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    refused = [name for name, (number, value) in MALLOPT.items() if mallopt(number, value) != 1]
    if refused:
        log.warning("the C library refuses %s, so steps on this CPU may be slower", ", ".join(refused))
    return not refused
