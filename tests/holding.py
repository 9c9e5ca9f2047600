"""Callbacks that tests give to the program: one holds a run at a step, one notes where each start of it began."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from callbacks.checkpointing import RunCheckpoint
from callbacks.lookup import find_callback


class Hold(Callback):
    """Wait, until killed or told to stop, before the first batch after optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        checkpoint = find_callback(trainer, RunCheckpoint)
        while trainer.global_step >= self.step and not (checkpoint and checkpoint.signals.received):
            time.sleep(0.1)


class NoteBeginning(Callback):
    """Note the optimizer step at which a run, or a resume, begins to train.

    A run from scratch ends as the resumed one does, bit for bit: only this tells them apart.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "began.txt").open("a") as file:
                file.write(f"{trainer.global_step}\n")


NOTE_BEGINNING = "--trainer.callbacks+=tests.holding.NoteBeginning"


def beginnings(run: Path) -> list[int]:
    """Optimizer steps at which the run in this folder has begun to train, in order."""
    return [int(line) for line in (run / "began.txt").read_text().split()]
