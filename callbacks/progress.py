"""DistillationProgressBar: shows depth, loss and throughput."""

import logging
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.lookup import find_callback
from callbacks.throughput import ThroughputCallback

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5


class DistillationProgressBar(TQDMProgressBar):
    """Shows a bar on a terminal; elsewhere it logs one line per epoch, and in long epochs one per minute.

    It shows the student's depth, the loss of the last batch and the seconds of audio trained on per second. They
    are read only when they are shown, at most twice a second, because reading a loss waits for the GPU.

    Args:
        seconds_between_lines: seconds between two lines within an epoch, where there is no bar.
        bar: show a bar on a terminal; without it lines are logged there too.
    """

    def __init__(self, seconds_between_lines: float = 60.0, bar: bool = True) -> None:
        super().__init__()
        self.seconds_between_lines, self.bar = seconds_between_lines, bar
        self._on_terminal = True
        self._shown = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._on_terminal = self.bar and sys.stdout.isatty()
        if not self._on_terminal:
            self.disable()

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self._shown = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        waited = time.monotonic() - self._shown
        if self._on_terminal and (last or waited >= REFRESH_SECONDS):
            self._shown = time.monotonic()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif not self._on_terminal and not last and waited >= self.seconds_between_lines:
            self._log_line(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self._on_terminal:
            self._log_line(trainer, pl_module)

    def _log_line(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._shown = time.monotonic()
        if trainer.is_global_zero:
            metrics = ", ".join(f"{name} {_short(value)}" for name, value in self.get_metrics(trainer, module).items())
            epoch, epochs, step = trainer.current_epoch + 1, trainer.max_epochs, trainer.global_step
            log.info("epoch %d of %s, step %d: %s", epoch, epochs, step, metrics)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Depth, loss and audio seconds per second, then the module's other metrics, without a version number."""
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        shown: dict[str, int | str | float | dict[str, float]] = {}
        depth = getattr(getattr(pl_module, "student", None), "depth", None)
        if depth is not None:
            shown["depth"] = depth
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            shown["loss"] = float(loss)
        clock = find_callback(trainer, ThroughputCallback)
        if clock is not None and (rate := clock.audio_seconds_per_second) is not None:
            shown["audio_s/s"] = f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
        return {**shown, **others}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
