"""A run that waits at a step of its own for each start of its SLURM job, so that tests choose what it meets there."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from callbacks.checkpointing import RunCheckpoint
from callbacks.lookup import find_callback


class HoldInAttempt(Callback):
    """Wait, until ended or told to stop, before the first batch after the step of this start, if it has one.

    Args:
        steps: optimizer steps, one for each start of the job.
    """

    def __init__(self, steps: list[int]) -> None:
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.step = steps[attempt] if attempt < len(steps) else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.step is None or trainer.global_step < self.step:
            return
        checkpoint = find_callback(trainer, RunCheckpoint)
        assert checkpoint is not None
        (Path(trainer.default_root_dir) / f"held_{self.step}_{trainer.global_rank}").touch()
        while not checkpoint.signals.received:
            time.sleep(0.1)


class HoldUntil(Callback):
    """Wait, until ended or until ``path`` exists, before the first batch after optimizer step ``step``.

    Args:
        path: the file.
        step: the step.
    """

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = Path(path), step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        while trainer.global_step >= self.step and not self.path.exists():
            (Path(trainer.default_root_dir) / "held").touch()
            time.sleep(0.1)
