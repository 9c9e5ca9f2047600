"""Resident memory of this process, read from ``/proc`` (Linux only)."""

import ctypes
import gc
import math
from pathlib import Path


def resident_megabytes(field: str) -> float:
    """Read ``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in MB; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:")), math.nan)


def start_memory_peak() -> float | None:
    """Reset the peak to the memory in use now, and return that in MB; ``None`` without ``/proc``.

    Freed memory is returned to the system first (glibc). The C library would keep it otherwise, and later use of it
    would not raise the resident memory.
    """
    control = Path("/proc/self/clear_refs")
    if not control.exists():
        return None
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    control.write_text("5")
    return resident_megabytes("VmRSS")
