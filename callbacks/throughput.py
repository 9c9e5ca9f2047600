"""ThroughputCallback: measures the training speed of a run and the time of each part of a step.

There are two clocks:

* ``perf/train_seconds`` is wall-clock time, the cost of a run. It runs from the start of training to its end,
  growth and the start of data loaders included, but not while validation runs, a checkpoint is written or the loss
  before and after a growth is measured.
* ``perf/*_ms`` are the times of parts of a step on the device. On a GPU they come from CUDA events, which are
  read only when a row is logged, so no step waits for the device. Elsewhere they come from the host's clock.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.speech_data import speech_data
from lightning_modules.lengths import global_lengths
from lightning_modules.stopwatch import Section, StepStopwatch, TimePoint, milliseconds, synchronize, time_point


class Lap(NamedTuple):
    """Time points of one micro-batch; ``previous_end`` is ``None`` if more than a wait for data came before it."""

    previous_end: TimePoint | None
    start: TimePoint
    sections: list[Section]
    optimizer: TimePoint | None
    end: TimePoint


class ThroughputCallback(Callback):
    """Logs ``perf/...`` every N optimizer steps and at the end of training, without changing the training.

    Metrics, each over the optimizer steps since the last row:

    * ``perf/audio_seconds_per_second``: seconds of audio of all ranks per second of wall-clock time.
    * ``perf/step_ms``: one optimizer step with all its micro-batches; the sum of the next four.
    * ``perf/data_ms``: wait for data on the device, from the end of a micro-batch to the start of the next. The first
      batch of an epoch is left out, since growth and the start of workers come before it.
    * ``perf/teacher_ms`` and any other section of the module's ``stopwatch``.
    * ``perf/optimizer_ms``: clipping, the update and the learning-rate schedule.
    * ``perf/student_ms``: the rest, that is forward, losses, backward and the exchange of gradients.
    * ``perf/memory_gb``: peak memory of this process in 10^9 bytes; on a GPU the memory of tensors, else
      resident main memory.
    * ``perf/train_seconds``, ``perf/audio_seconds``: totals of the run, kept over resumes.

    Times and memory are those of rank zero. Audio is counted once per optimizer step from
    ``global_num_samples`` of its last micro-batch, which lists the items of all ranks and accumulation steps.
    A wait for data in which validation ran or a checkpoint was written is not counted, since its share is
    unknown.

    Resumes: the totals are in the checkpoint; steps that were lost by a kill are not counted twice.

    Args:
        every_n_steps: optimizer steps between rows; default: the trainer's ``log_every_n_steps``.

    Attributes:
        train_seconds: wall-clock training time up to the last batch.
        audio_seconds: audio that was trained on, of all ranks.
        utterances: utterances that were trained on, of all ranks, each time that they were.
        students: number of students trained side by side in this process. ``train_seconds`` of each includes the
            shared time of teacher and loading, but not the time of the other students.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.students = 1
        self.train_seconds = 0.0
        self.audio_seconds = 0.0
        self.utterances = 0.0
        self._running_since: float | None = None
        self._steps = 0
        self._last_rate: float | None = None
        self._previous_end: TimePoint | None = None
        self._start: TimePoint = 0.0
        self._optimizer: TimePoint | None = None
        self._open_window()

    @property
    def audio_seconds_per_second(self) -> float | None:
        """Rate of the last logged window, or of all steps so far; ``None`` before the first step."""
        if self._last_rate is not None:
            return self._last_rate
        seconds = self.train_seconds - self._window_seconds
        return (self.audio_seconds - self._window_audio) / seconds if seconds > 0 else None

    # -- wall-clock ------------------------------------------------------------------------------------------

    def _bank(self) -> None:
        if self._running_since is not None:
            now = time.perf_counter()
            self.train_seconds += now - self._running_since
            self._running_since = now

    def _resume(self) -> None:
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def _pause(self, device: torch.device) -> None:
        if self._running_since is None:
            return
        synchronize(device)  # submitted training work must not count as part of what comes next
        self._bank()
        self._running_since = self._previous_end = None

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """Pause both clocks during the block, for work on ``device`` that is not part of this run."""
        running, in_epoch = self._running_since is not None, self._previous_end is not None
        self._pause(device)
        yield
        if running:
            self._resume()
        if in_epoch:
            self._previous_end = time_point(device)

    def charge(self, seconds: float) -> None:
        """Add the time of shared work that another run on this device did, so that equal work has equal cost."""
        if self._running_since is not None:
            self.train_seconds += seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps, self._last_rate = trainer.global_step, None
        self._open_window()
        self._resume()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resume()
        self._previous_end = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module.device)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module.device)
        if self._laps:
            self._log(trainer, self._close_window(pl_module.device))

    # -- one micro-batch -------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resume()
        self._start, self._optimizer = time_point(pl_module.device), None
        if isinstance(stopwatch := getattr(pl_module, "stopwatch", None), StepStopwatch):
            stopwatch.start(pl_module.device)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._optimizer = time_point(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._bank()
        end = time_point(pl_module.device)
        stopwatch = getattr(pl_module, "stopwatch", None)
        sections = stopwatch.stop() if isinstance(stopwatch, StepStopwatch) else []
        self._laps.append(Lap(self._previous_end, self._start, sections, self._optimizer, end))
        self._previous_end = end
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._window_steps += 1
        data, accumulate = speech_data(trainer), trainer.accumulate_grad_batches
        lengths = global_lengths(batch, trainer.world_size * accumulate)
        share = (batch_idx % accumulate + 1) / accumulate  # below 1 in a window that the epoch's end cuts off
        self.audio_seconds += share * int(lengths.sum()) / (SAMPLE_RATE if data is None else data.sample_rate)
        self.utterances += share * len(lengths)
        every_n_steps = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every_n_steps:  # nothing is logged, so no lap is kept
            self._laps.clear()
        elif self._steps % every_n_steps == 0:
            self._log(trainer, self._close_window(pl_module.device))

    # -- rows ------------------------------------------------------------------------------------------------

    def _open_window(self) -> None:
        self._laps: list[Lap] = []
        self._window_steps = 0
        self._window_seconds, self._window_audio = self.train_seconds, self.audio_seconds

    def _close_window(self, device: torch.device) -> dict[str, float]:
        """The metrics since the last row; on a GPU this waits for the last step."""
        end = self._laps[-1].end
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        metrics = step_parts(self._laps, max(self._window_steps, 1))
        seconds = self.train_seconds - self._window_seconds
        self._last_rate = (self.audio_seconds - self._window_audio) / seconds
        self._open_window()
        return {
            "audio_seconds_per_second": self._last_rate,
            **metrics,
            "memory_gb": peak_memory_gb(device),
            "train_seconds": self.train_seconds,
            "audio_seconds": self.audio_seconds,
        }

    @rank_zero_only
    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        row = {"epoch": trainer.current_epoch, **{f"perf/{name}": value for name, value in metrics.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self._steps)

    def state_dict(self) -> dict[str, Any]:
        totals = ("train_seconds", "audio_seconds", "utterances")
        return {name: getattr(self, name) for name in totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds, self.audio_seconds = state_dict["train_seconds"], state_dict["audio_seconds"]
        self.utterances = state_dict.get("utterances", math.nan)  # older versions did not count them


def step_parts(laps: list[Lap], num_steps: int) -> dict[str, float]:
    """Milliseconds of one optimizer step, in total and by part, as a mean over ``num_steps`` steps in ``laps``."""
    busy = sum(milliseconds(lap.start, lap.end) for lap in laps)
    updates = [milliseconds(lap.optimizer, lap.end) for lap in laps if lap.optimizer is not None]
    parts = {"optimizer_ms": sum(updates)}
    for lap in laps:
        for section in lap.sections:
            name = f"{section.name}_ms"
            parts[name] = parts.get(name, 0.0) + milliseconds(section.start, section.end)
    parts["student_ms"] = busy - sum(parts.values())
    waits = [milliseconds(lap.previous_end, lap.start) for lap in laps if lap.previous_end is not None]
    if waits:
        parts["data_ms"] = sum(waits) / len(waits) * len(laps)
    means = {name: value / num_steps for name, value in parts.items()}
    return {"step_ms": sum(means.values()), **means}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10^9 bytes: tensors on a GPU, else resident main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
