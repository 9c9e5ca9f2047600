import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from callbacks.throughput import Lap, ThroughputCallback, peak_memory_gb, step_parts
from datamodules.speech_data import SpeechDataModule
from lightning_modules.stopwatch import Section, StepStopwatch

PARTS = ["data_ms", "teacher_ms", "student_ms", "optimizer_ms"]


class Batch(NamedTuple):
    waveforms: Tensor
    global_num_samples: Tensor


class Tiny(L.LightningModule):
    """A module that sleeps: 4 ms in the teacher, 2 ms in the student, 3 ms in the optimizer."""

    def __init__(self, sleep: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.stopwatch = StepStopwatch()
        self.sleep = sleep
        self.losses: list[float] = []

    def wait(self, seconds: float) -> None:
        if self.sleep:
            time.sleep(seconds)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.stopwatch.section("teacher"):
            self.wait(0.004)
        self.wait(0.002)
        loss = (self.linear(batch.waveforms) - torch.rand(1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.wait(0.003)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Tiny):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self.stopwatch.section("teacher"):
            self.wait(0.2)


class Clock:
    """Only ``sleep`` moves it, beside a microsecond per look: what it measures is exact on a busy machine too."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands in for ``time`` where time is measured, and here, where it is spent."""
    clock = Clock()
    for name in ("callbacks.throughput", "lightning_modules.stopwatch", __name__):
        monkeypatch.setattr(f"{name}.time", clock)
    return clock


def about(milliseconds: float) -> Any:
    return pytest.approx(milliseconds, abs=0.1)  # a few looks at the clock


class Rows(CSVLogger):
    """Keeps rows in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})


class SlowCheckpoint(Callback):
    """Saves after every batch, slowly, as a large model on a slow disk would."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
        time.sleep(0.2)


def batches(count: int = 4, seconds: float = 0.0) -> torch.utils.data.DataLoader:
    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Batch:
            time.sleep(seconds)
            return Batch(torch.full((3, 2), float(index)), torch.tensor([8000, 4000, 4000]))

    return torch.utils.data.DataLoader(Batches(), batch_size=None)


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> tuple[L.Trainer, Rows]:
    rows = Rows(folder)
    defaults: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=rows,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **defaults | settings,
    )
    return trainer, rows


def test_without_rows_nothing_is_kept(tmp_path: Path) -> None:
    kept: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.append(len(clock._laps))

    for every, expected in ((0, [0] * 5), (2, [1, 0, 1, 0, 1])):
        kept.clear()
        clock = ThroughputCallback()
        trainer, logger = make_trainer(tmp_path, clock, Count(), log_every_n_steps=every)
        trainer.fit(Tiny(), batches(5))
        assert kept == expected
        assert bool(logger.rows) == bool(every)
        assert clock.audio_seconds > 0


def test_a_row_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    trainer, logger = make_trainer(tmp_path, ThroughputCallback())
    trainer.fit(Tiny(), batches(5))
    names = ["audio_seconds_per_second", "step_ms", *PARTS, "memory_gb", "train_seconds", "audio_seconds"]
    assert [row["step"] for row in logger.rows] == [2, 4, 5]
    for row in logger.rows[:2]:
        assert set(row) == {"step", "epoch", *(f"perf/{name}" for name in names)}
        assert row["perf/step_ms"] == pytest.approx(sum(row[f"perf/{part}"] for part in PARTS))
    assert [row["perf/audio_seconds"] for row in logger.rows] == [2, 4, 5]


def test_a_window_that_the_epochs_end_cuts_off_has_a_part_of_its_audio(tmp_path: Path) -> None:
    clock = ThroughputCallback()
    trainer, _ = make_trainer(tmp_path, clock, accumulate_grad_batches=2)
    trainer.fit(Tiny(), batches(5))
    assert (trainer.global_step, clock.audio_seconds, clock.utterances) == (3, 2.5, 7.5)
    older = ThroughputCallback()
    older.load_state_dict({"train_seconds": 1.0, "audio_seconds": 2.0})
    assert math.isnan(older.utterances)  # so that no part of a run passes for the whole


@pytest.mark.usefixtures("clock")
def test_parts_are_told_apart(tmp_path: Path) -> None:
    trainer, logger = make_trainer(tmp_path, ThroughputCallback(every_n_steps=4))
    trainer.fit(Tiny(), batches(4, seconds=0.02))
    (row,) = logger.rows
    parts = {name: row[f"perf/{name}"] for name in PARTS}
    assert parts == {"data_ms": about(20), "teacher_ms": about(4), "student_ms": about(2), "optimizer_ms": about(3)}
    assert row["perf/step_ms"] == about(29)


@pytest.mark.usefixtures("clock")
def test_what_others_do_meanwhile_is_in_no_clock_and_what_they_share_is(tmp_path: Path) -> None:
    callback = ThroughputCallback(every_n_steps=4)

    class TakesTurns(torch.utils.data.DataLoader):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                with callback.aside(torch.device("cpu")):
                    time.sleep(0.3)
                callback.charge(10.0)
                yield batch

    trainer, logger = make_trainer(tmp_path, callback)
    trainer.fit(Tiny(), TakesTurns(batches(4).dataset, batch_size=None))
    (row,) = logger.rows
    assert row["perf/train_seconds"] == pytest.approx(40 + 4 * 0.009, abs=1e-3)
    assert (row["perf/step_ms"], row["perf/data_ms"]) == (about(9), about(0))
    callback.charge(10.0)  # outside training nothing is counted
    assert callback.train_seconds < 41


def test_rows_agree_with_each_other(tmp_path: Path) -> None:
    callback = ThroughputCallback()
    trainer, logger = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(Tiny(), batches(4))
    seconds = [0.0, *(row["perf/train_seconds"] for row in logger.rows)]
    for row, (before, after) in zip(logger.rows, pairwise(seconds), strict=True):
        assert row["perf/audio_seconds_per_second"] == pytest.approx(2 / (after - before))
    assert callback.audio_seconds_per_second == logger.rows[-1]["perf/audio_seconds_per_second"]
    assert callback.train_seconds >= seconds[-1]


def test_accumulation_counts_audio_once_and_sums_micro_batches(tmp_path: Path) -> None:
    trainer, logger = make_trainer(tmp_path, ThroughputCallback(), accumulate_grad_batches=2)
    trainer.fit(Tiny(), batches(8))
    assert [row["step"] for row in logger.rows] == [2, 4]
    assert logger.rows[-1]["perf/audio_seconds"] == 4
    assert logger.rows[-1]["perf/teacher_ms"] >= 8


def test_the_sample_rate_is_the_data_modules(tmp_path: Path) -> None:
    class Data(SpeechDataModule):
        sample_rate, steps_per_epoch = 8000, 2
        transfer_batch_to_device = L.LightningDataModule.transfer_batch_to_device  # of any batch

        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return batches(2)

    trainer, logger = make_trainer(tmp_path, ThroughputCallback())
    trainer.fit(Tiny(), datamodule=Data())
    assert logger.rows[-1]["perf/audio_seconds"] == 4


def test_validation_sanity_checks_and_checkpoints_are_not_training_time(tmp_path: Path, clock: Clock) -> None:
    callback = ThroughputCallback()
    trainer, logger = make_trainer(tmp_path, callback, SlowCheckpoint(), num_sanity_val_steps=1, val_check_interval=2)
    trainer.fit(Validated(), batches(4), batches(1))
    # Three validation batches and four checkpoints of 0.2 s each lie outside.
    assert clock.now == pytest.approx(7 * 0.2 + 4 * 0.009, abs=1e-3)
    assert callback.train_seconds == pytest.approx(4 * 0.009, abs=1e-3)
    assert all("perf/data_ms" not in row for row in logger.rows)  # no wait was without a checkpoint
    assert all(row["perf/teacher_ms"] == about(4) for row in logger.rows)  # validation's is not in it


@pytest.mark.usefixtures("clock")
def test_work_between_batches_is_training_time(tmp_path: Path) -> None:
    """Negative control of the test above: what is neither validation nor a checkpoint counts."""

    class Growth(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            time.sleep(0.2)

    callback = ThroughputCallback()
    trainer, logger = make_trainer(tmp_path, callback, Growth(), max_epochs=2)
    trainer.fit(Tiny(), batches(2))
    assert callback.train_seconds == pytest.approx(2 * 0.2 + 4 * 0.009, abs=1e-3)
    assert all(row["perf/data_ms"] == about(0) for row in logger.rows)


def test_totals_go_on_after_a_resume(tmp_path: Path) -> None:
    trainer, logger = make_trainer(tmp_path, ThroughputCallback())
    trainer.fit(Tiny(), batches(4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = logger.rows[-1]
    resumed = ThroughputCallback()
    trainer, logger = make_trainer(tmp_path, resumed, max_epochs=2)
    trainer.fit(Tiny(), batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert [row["step"] for row in logger.rows] == [6, 8]
    assert logger.rows[0]["perf/train_seconds"] > before["perf/train_seconds"]
    assert [row["perf/audio_seconds"] for row in logger.rows] == [6, 8]
    seconds = logger.rows[1]["perf/train_seconds"] - logger.rows[0]["perf/train_seconds"]
    assert logger.rows[1]["perf/audio_seconds_per_second"] == pytest.approx(2 / seconds)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    losses = []
    for callbacks in ([ThroughputCallback()], []):
        module = Validated(sleep=False)
        trainer, _ = make_trainer(tmp_path, *callbacks, max_epochs=2)
        trainer.fit(module, batches(4), batches(1))
        losses.append(module.losses)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 8


def test_a_module_without_a_stopwatch_has_no_teacher(tmp_path: Path) -> None:
    class Plain(Tiny):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.linear(batch.waveforms).mean()

    module = Plain()
    module.stopwatch = None
    trainer, logger = make_trainer(tmp_path, ThroughputCallback())
    trainer.fit(module, batches(2))
    assert "perf/teacher_ms" not in logger.rows[0]
    assert "perf/student_ms" in logger.rows[0]


def test_parts_of_known_laps() -> None:
    teacher = Section("teacher", 1.001, 1.003)
    laps = [
        Lap(None, 1.0, [teacher], None, 1.010),
        Lap(1.010, 1.014, [Section("teacher", 1.014, 1.017)], 1.020, 1.026),
    ]
    parts = step_parts(laps, 1)
    # The one wait that is known, 4 ms, stands for both.
    wanted = {"data_ms": 8, "teacher_ms": 5, "optimizer_ms": 6, "student_ms": 22 - 5 - 6, "step_ms": 30}
    assert parts == pytest.approx(wanted)
    assert step_parts(laps, 2) == pytest.approx({name: value / 2 for name, value in wanted.items()})


def test_memory_is_in_gigabytes() -> None:
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 1000


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        ThroughputCallback(every_n_steps=0)


class Event:
    """Stands in for a CUDA event: can be read only once somebody waited for it or for a later one."""

    waits = 0
    done = 0.0

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        Event.waits, Event.done = Event.waits + 1, self.at

    def elapsed_time(self, end: "Event") -> float:
        assert end.at <= Event.done, "read too early"
        return (end.at - self.at) * 1000


def test_events_are_waited_for_once_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("callbacks.throughput", "lightning_modules.stopwatch"):
        monkeypatch.setattr(f"{name}.time_point", lambda device: Event())
    trainer, logger = make_trainer(tmp_path, ThroughputCallback(every_n_steps=5))
    trainer.fit(Tiny(), batches(10))
    assert Event.waits == len(logger.rows) == 2
    for row in logger.rows:
        assert row["perf/teacher_ms"] >= 4
        assert row["perf/step_ms"] == pytest.approx(sum(row[f"perf/{part}"] for part in PARTS))
