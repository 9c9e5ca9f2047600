"""TrainingMetrics: logs the loss terms of training and validation against the optimizer steps done."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from callbacks.lookup import find_callback
from callbacks.throughput import ThroughputCallback
from lightning_modules.distillation import DistillationModule


class TrainingMetrics(Callback):
    """Logs ``train/...`` for the first step and then every ``log_every_n_steps`` steps, and ``val/...``.

    Lightning would log a validation after step N at step N - 1, beside the training row of step N.

    The terms of one accumulation window are averaged, since a micro-batch is only a share of a global batch. They are
    summed on the device and reduced over the ranks only at logged steps, so no other step waits.

    Resumes: the sum over the epoch so far and the last ``epoch_loss`` are in the checkpoint.

    Attributes:
        epoch_loss: mean of ``train/loss`` over the optimizer steps of the last finished epoch (global batches).
    """

    def __init__(self) -> None:
        self.epoch_loss: float | None = None
        self._window: dict[str, Tensor] = {}
        self._epoch = torch.zeros(2)  # sum of the losses of this epoch's steps, and their number
        self._rate = 0.0
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window, self._epoch = {}, self._epoch.to(pl_module.device)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._rate = optimizer.param_groups[0]["lr"]  # at the end of the batch the scheduler has changed it

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        for name, value in outputs["terms"].items():
            self._window[name] = self._window.get(name, 0) + value
        summed = batch_idx % trainer.accumulate_grad_batches + 1
        if summed < trainer.accumulate_grad_batches and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        window, self._window = {name: value / summed for name, value in self._window.items()}, {}
        made = window["loss"].isfinite()  # skipped steps changed nothing
        self._epoch = self._epoch + torch.stack([window["loss"].where(made, 0.0), made.to(window["loss"].dtype)])
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (step != 1 and step % every):
            return
        values = trainer.strategy.reduce(torch.stack(list(window.values())), reduce_op="mean").tolist()
        metrics = {f"train/{name}": value for name, value in zip(window, values, strict=True)}
        metrics |= {
            "train/lr": self._rate,
            "growth/depth": pl_module.student.depth,
            "epoch": trainer.current_epoch,
        }
        if (clock := find_callback(trainer, ThroughputCallback)) is not None:
            # In this row too: W&B draws one metric against another only where a row has both.
            metrics["perf/train_seconds"] = clock.train_seconds
        _log(trainer, metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values:
            _log(trainer, values | {"epoch": trainer.current_epoch})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reduce(trainer)
        total, steps = self._epoch.tolist()
        self.epoch_loss = total / steps if steps else None
        self._window, self._epoch = {}, torch.zeros_like(self._epoch)

    def _reduce(self, trainer: L.Trainer) -> None:
        """Give every rank the mean over all ranks; repeating it does not change the mean."""
        self._epoch = cast(Tensor, trainer.strategy.reduce(self._epoch, reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        assert self._trainer is not None  # set before any checkpoint
        self._reduce(self._trainer)  # only rank zero's state is written, but all ranks call this
        return {"epoch_loss": self.epoch_loss, "epoch_so_far": self._epoch.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch_loss, self._epoch = state_dict["epoch_loss"], torch.tensor(state_dict["epoch_so_far"])


def _log(trainer: L.Trainer, metrics: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
