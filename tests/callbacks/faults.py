"""Things that go wrong at a chosen micro-batch, as callbacks that tests put into a run."""

import os
import signal
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class SendSignal(Callback):
    """Send this process a real signal before a micro-batch of an epoch, or at its validation's start."""

    def __init__(
        self,
        epoch: int,
        batch: int | Literal["validation"],
        signal_name: str = "SIGTERM",
        rank: int = 0,
    ) -> None:
        self.epoch, self.batch, self.rank = epoch, batch, rank
        self.signal = signal.Signals[signal_name]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._send(trainer, batch_idx)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._send(trainer, "validation")

    def _send(self, trainer: L.Trainer, now: int | str) -> None:
        if (trainer.current_epoch, now, trainer.global_rank) == (self.epoch, self.batch, self.rank):
            os.kill(os.getpid(), self.signal)


class AskToStop(Callback):
    """Set ``trainer.should_stop`` once, in a hook of an epoch; of batches, at the one of that number."""

    def __init__(self, epoch: int, hook: str, batch: int = 0, rank: int = 0) -> None:
        self.place = (epoch, rank, batch)
        setattr(self, hook, self._ask)

    def _ask(self, trainer: L.Trainer, *arguments: Any) -> None:
        batch = arguments[-1] if isinstance(arguments[-1], int) else self.place[2]
        if (trainer.current_epoch, trainer.global_rank, batch) == self.place:
            trainer.should_stop = True


class PoisonLoss(Callback):
    """Make the loss of some micro-batches (counted over the run) NaN, or infinite with finite gradients."""

    def __init__(self, batches: set[int], kind: Literal["nan", "infinite"] = "nan", rank: int = 0) -> None:
        self.batches, self.kind, self.rank, self.count = batches, kind, rank, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        original = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> dict[str, Any]:
            outputs = original(batch, batch_idx)
            if self.count in self.batches and trainer.global_rank == self.rank:
                bad = outputs["loss"] * torch.nan if self.kind == "nan" else outputs["loss"] + torch.inf
                outputs = outputs | {"loss": bad}
            self.count += 1
            return outputs

        pl_module.training_step = training_step
