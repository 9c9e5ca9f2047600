"""A run that comes no further than a given step, for tests that kill it at a random moment before its end."""

import time
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
