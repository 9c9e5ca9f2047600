"""Memory that depth takes and a fit gives back; times that add up."""

import gc
import time
import weakref
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from experiments.bench.laps import PARTS, StepLaps
from lightning_modules.stopwatch import synchronize
from tests.gpu.fits import Place


def test_a_fit_gives_its_memory_back(place: Place) -> None:
    place.fit("first")  # libraries keep a workspace
    gc.collect()
    before = torch.cuda.memory_allocated() if place.device == "cuda" else 0
    run: Any = place.fit("freed")
    student = weakref.ref(run.module.student)
    kept = run.trainer  # control: which holds the module
    del run
    gc.collect()
    assert student() is not None
    del kept
    gc.collect()
    assert student() is None
    if place.device == "cuda":
        assert torch.cuda.memory_allocated() <= before + 2**20


class PeakByDepth(Callback):
    """Peak memory in bytes of each epoch, by its depth."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.bytes[pl_module.student.depth] = torch.cuda.max_memory_allocated()


def test_peak_memory_grows_with_depth(cuda: torch.device, place: Place) -> None:
    peaks = PeakByDepth()
    place.fit("peaks", [peaks], module=place.wide())
    assert list(peaks.bytes) == [1, 2, 3, 4]
    assert list(peaks.bytes.values()) == sorted(peaks.bytes.values())
    assert peaks.bytes[4] > 1.5 * peaks.bytes[1]


class Busy(Callback):
    """Some 20 ms of work for the device in each step, so that it and not the host sets the pace."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if loss.is_cuda:
            torch.cuda._sleep(40_000_000)  # cycles


class Wall(Callback):
    """Seconds from the end of the first step of an epoch to that of its last, for the host unless ``synchronize``."""

    def __init__(self, synchronize: bool) -> None:
        self.synchronize, self.seconds, self._since = synchronize, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx and not trainer.is_last_batch:
            return
        if self.synchronize or not batch_idx:
            synchronize(pl_module.device)
        self.seconds, self._since = time.perf_counter() - self._since, time.perf_counter()


def test_the_parts_of_steps_add_up_to_the_wall_time(place: Place) -> None:
    count = 10  # the host is one step ahead at the end, which must show

    def measured(synchronize: bool) -> float:
        """Time of the steps by their parts, as a share of the wall time."""
        wall, laps = Wall(synchronize), StepLaps()
        batches = {"batch_size": 8, "batches_per_epoch": count}
        place.fit(f"times_{synchronize}", [Busy(), wall, laps], module=place.wide(), data=batches)
        last = laps.steps[1 - count :]
        for step in last:
            assert sum(step[part] for part in PARTS) == pytest.approx(step["step_ms"], rel=0.01)
        return sum(step["step_ms"] for step in last) / 1000 / wall.seconds

    assert measured(synchronize=True) == pytest.approx(1, abs=0.05)
    if place.device == "cuda":  # a CPU's host clock is the device's
        assert measured(synchronize=False) > 1.05
