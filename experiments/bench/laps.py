"""StepLaps: time the parts of every optimizer step of a Trainer, forward and backward separately.

``ThroughputCallback`` gives means over a window of a run; a benchmark needs every single step, for a spread.
"""

from typing import Any, NamedTuple

import lightning as L
import torch
from torch.optim import Optimizer

from callbacks.lookup import find_callback
from callbacks.stacking import StackingCallback
from lightning_modules.distillation import DistillationModule
from lightning_modules.stopwatch import Section, TimePoint, milliseconds, time_point

PARTS = ("data_ms", "teacher_ms", "forward_ms", "backward_ms", "optimizer_ms")


class _Lap(NamedTuple):
    """Time points of one step."""

    depth: int
    previous_end: TimePoint
    marks: dict[str, TimePoint]
    sections: list[Section]
    end: TimePoint

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part; the work of the step must be done."""
        marks = self.marks
        teacher = sum(milliseconds(s.start, s.end) for s in self.sections if s.name == "teacher")
        return {
            "depth": self.depth,
            "step_ms": milliseconds(self.previous_end, self.end),
            "data_ms": milliseconds(self.previous_end, marks["start"]),
            "teacher_ms": teacher,
            "forward_ms": milliseconds(marks["start"], marks["backward"]) - teacher,
            "backward_ms": milliseconds(marks["backward"], marks["update"]),
            "optimizer_ms": milliseconds(marks["update"], self.end),
        }


class StepLaps(L.Callback):
    """Record the parts of each step without accumulation; training is not changed.

    Time points are read at the end of the epoch only. Reading a GPU's time point waits for the GPU, and a host that
    waits after every step submits no work ahead, unlike in an ordinary run.

    Attributes:
        steps: depth and milliseconds per part, which add up to ``step_ms``, of each step but the first of a fit. The
            first one creates the optimizer's state, and its wait for data is the start of the loader.
        growths_ms: milliseconds of each growth. Other work between two epochs (checkpoints, validation, the start of
            the loader) is in neither.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.growths_ms: list[float] = []
        self._laps: list[_Lap] = []
        self._marks: dict[str, TimePoint] = {}
        self._previous_end: TimePoint | None = None
        self._new_epoch = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._previous_end = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._new_epoch = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._marks["start"] = time_point(pl_module.device)
        if self._new_epoch and self._previous_end is not None:
            self._previous_end = self._marks["start"]
        self._new_epoch = False
        _module(pl_module).stopwatch.start(pl_module.device)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._marks["backward"] = time_point(pl_module.device)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._marks["update"] = time_point(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        end, sections = time_point(pl_module.device), _module(pl_module).stopwatch.stop()
        if self._previous_end is not None:
            depth = _module(pl_module).student.depth
            self._laps.append(_Lap(depth, self._previous_end, dict(self._marks), sections, end))
        self._previous_end = end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(self._previous_end, torch.cuda.Event):
            self._previous_end.synchronize()
        self.steps += [lap.parts() for lap in self._laps]
        self._laps.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stacking = find_callback(trainer, StackingCallback)
        self.growths_ms = [event.seconds * 1000 for event in stacking.events] if stacking else []


def _module(pl_module: L.LightningModule) -> DistillationModule:
    assert isinstance(pl_module, DistillationModule)
    return pl_module
