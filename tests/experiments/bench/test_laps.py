"""Laps of steps are read when nothing waits for them any more."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from experiments.bench import laps
from experiments.bench.laps import PARTS, StepLaps
from lightning_modules.stopwatch import milliseconds
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher


class Reads(Callback):
    """Counts the time points that were read by the end of each batch."""

    def __init__(self) -> None:
        self.so_far = 0
        self.at_batch_ends: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.at_batch_ends.append(self.so_far)


def test_no_step_reads_a_time_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, recorder = Reads(), StepLaps()

    def counted(*points: Any) -> float:
        reads.so_far += 1
        return milliseconds(*points)

    monkeypatch.setattr(laps, "milliseconds", counted)
    data = make_data(save_corpus(tmp_path / "corpus", {"train": 12, "dev": 1}), tmp_path / "cache")
    trainer = make_trainer(tmp_path, make_stacking(), recorder, reads)
    trainer.fit(make_module(save_teacher(tmp_path / "teacher")), datamodule=data)
    each = 6  # the step, four parts and the teacher
    assert reads.at_batch_ends == [0] * 3 + [each * 2] * 3 + [each * 5] * 3 + [each * 8] * 3
    assert [step["depth"] for step in recorder.steps] == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for step in recorder.steps:
        assert sum(step[part] for part in PARTS) == pytest.approx(step["step_ms"])
