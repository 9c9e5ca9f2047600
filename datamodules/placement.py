"""What a loader should do for the device that its batches go to: pinned memory, and how many workers."""

import os

import lightning as L

MOST_WORKERS = 8


def trains_on_cuda(trainer: L.Trainer | None) -> bool:
    """Whether batches go to a CUDA device; that a machine has one says nothing of this run."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def workers_for(setting: int | None, trainer: L.Trainer | None) -> int:
    """Loader processes of each rank: the user's number, or by the device and the cores that this process may use.

    A CPU's cores are busy with training itself. A GPU leaves them to the loader, and takes in more than two workers
    deliver (7,200 seconds of audio per second: see benchmarks/README.md).
    """
    if setting is not None:
        return setting
    if trainer is None or not trains_on_cuda(trainer):
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(MOST_WORKERS, cores // trainer.num_devices - 1))
