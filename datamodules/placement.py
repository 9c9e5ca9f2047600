"""Settings of a loader that depend on the device: pinned memory and the number of workers."""

import os

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

MOST_WORKERS = 8


def trains_on_cuda(trainer: L.Trainer | None) -> bool:
    """Whether batches go to a CUDA device; a run may use the CPU on a machine that has one."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def workers_for(setting: int | None, trainer: L.Trainer | None) -> int:
    """Number of loader processes per rank: ``setting``, or a number for the device and the available cores.

    A CPU's cores are busy with training itself. With a GPU they are free for the loader, and the GPU needs more than
    two workers deliver (7,200 seconds of audio per second: see benchmarks/README.md).
    """
    if setting is not None:
        return setting
    if trainer is None or not trains_on_cuda(trainer):
        return 2
    return max(2, min(MOST_WORKERS, _own_cores(trainer.num_devices) - 1))


def _own_cores(num_devices: int) -> int:
    """Cores of this process, of which there is one per device: those that SLURM bound it to, or its part of all."""
    every = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return cores if SLURMEnvironment.detect() and cores < every else cores // num_devices
