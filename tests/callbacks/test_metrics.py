"""TrainingMetrics: means over steps that were made, and the learning rate that a step was made with."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.metrics import TrainingMetrics
from callbacks.throughput import ThroughputCallback
from experiments.records.csv_logger import AppendingCSVLogger
from tests.helpers import make_data, make_module, make_stacking, make_trainer


def test_a_skipped_step_is_not_in_the_mean_loss(tmp_path: Path, inputs: Path) -> None:
    metrics, trainer, module = TrainingMetrics(), make_trainer(tmp_path), make_module(inputs / "teacher")
    for number, loss in enumerate([1.0, torch.nan, 3.0]):
        metrics.on_train_batch_end(trainer, module, {"terms": {"loss": torch.tensor(loss)}}, None, number)
    metrics.on_train_epoch_end(trainer, module)
    assert metrics.epoch_loss == 2.0


def test_a_window_that_the_epochs_end_cuts_off_is_a_step_too(tmp_path: Path, inputs: Path) -> None:
    metrics, clock = TrainingMetrics(), ThroughputCallback()
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_epochs": 1, "log_every_n_steps": 1}
    own = (metrics, clock, RecordLosses())
    trainer = make_trainer(tmp_path, *own, logger=AppendingCSVLogger(tmp_path), **settings)
    trainer.fit(make_module(inputs / "teacher"), datamodule=make_data(inputs / "corpus", inputs / "cache"))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 2]
    first, second, third = own[2].losses
    assert metrics.epoch_loss == pytest.approx(((first + second) / 2 + third) / 2)
    assert clock.utterances == 1.5 * 4  # of two global batches
    assert [row["perf/train_seconds"] != "" for row in rows if row["train/loss"]] == [True, True]


class RecordLosses(Callback):
    """Loss of each micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["terms"]["loss"]))


class Rates(Callback):
    """Learning rate of each optimizer step when it is made."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_of_a_row_is_that_of_its_step(accumulate: int, tmp_path: Path, inputs: Path) -> None:
    rates = Rates()
    trainer = make_trainer(
        tmp_path,
        *(make_stacking(lr_after_growth="rewarm", rewarm_steps=2), TrainingMetrics(), rates),
        logger=AppendingCSVLogger(tmp_path),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(make_module(inputs / "teacher"), datamodule=make_data(inputs / "corpus", inputs / "cache"))
    text = (tmp_path / "metrics.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row["train/lr"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [float(row["train/lr"]) for row in rows] == rates.rates
    assert len(set(rates.rates)) > 6  # they differ from step to step


def test_a_validation_is_logged_at_the_steps_done_before_it(tmp_path: Path, inputs: Path) -> None:
    parts = make_stacking(), TrainingMetrics()
    trainer = make_trainer(tmp_path, *parts, logger=AppendingCSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(make_module(inputs / "teacher"), datamodule=make_data(inputs / "corpus", inputs / "cache"))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in ("train/loss", "val/loss")}
    assert steps == {"train/loss": list(range(1, 13)), "val/loss": [3, 6, 9, 12]}
    assert {row["epoch"] for row in rows if row["val/loss"]} == {"0", "1", "2", "3"}
