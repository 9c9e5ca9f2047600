"""Resident memory of this process, from ``/proc``: Linux only."""

import ctypes
import gc
from pathlib import Path


def resident_megabytes(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def start_memory_peak() -> float | None:
    """Let the peak start at what is in use now, and return that in MB; ``None`` where there is no ``/proc``.

    What was used before and is free again goes back to the system first (glibc): the C library keeps it otherwise, and
    whoever takes it next would seem to need nothing.
    """
    control = Path("/proc/self/clear_refs")
    if not control.exists():
        return None
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    control.write_text("5")
    return resident_megabytes("VmRSS")
