"""A run that comes no further than a given step, for tests that kill it at a random moment before its end."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Hold(Callback):
    """Wait, until killed, before the first batch after optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        while trainer.global_step >= self.step:
            time.sleep(1)
