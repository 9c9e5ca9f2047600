"""TrainingMetrics: the loss terms of whole optimizer steps, averaged over accumulation steps and ranks."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.distillation import DistillationModule


class TrainingMetrics(Callback):
    """Log ``train/...`` for the first step and every ``log_every_n_steps`` after.

    A micro-batch is a share of a global batch; its loss alone says little. The terms of one accumulation window are
    summed on the device and reduced over the ranks only at the steps that are logged, so nothing waits in between.

    Attributes:
        epoch_loss: mean of ``train/loss`` over the optimizer steps of the last finished epoch (global batches).
    """

    def __init__(self) -> None:
        self.epoch_loss: float | None = None
        self._window: dict[str, Tensor] = {}
        self._epoch: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window, self._epoch = {}, []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        accumulate = trainer.accumulate_grad_batches
        for name, value in outputs["terms"].items():
            self._window[name] = self._window.get(name, 0) + value / accumulate
        if (batch_idx + 1) % accumulate:
            return
        window, self._window = self._window, {}
        self._epoch.append(window["loss"])
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step != 1 and step % every:
            return
        values = trainer.strategy.reduce(torch.stack(list(window.values())), reduce_op="mean").tolist()
        metrics = {f"train/{name}": value for name, value in zip(window, values, strict=True)}
        metrics |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "growth/depth": pl_module.student.depth,
            "epoch": trainer.current_epoch,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._epoch:
            losses = torch.stack(self._epoch)
            mean = losses[losses.isfinite()].mean()  # skipped steps changed nothing
            self.epoch_loss = float(trainer.strategy.reduce(mean, reduce_op="mean"))
