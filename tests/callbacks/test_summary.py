"""RunSummary and the mean loss in it: written once the run is over, whenever that turns out to be."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpointing import RunCheckpoint
from callbacks.metrics import TrainingMetrics
from callbacks.summary import RunSummary
from callbacks.summary_record import Summary
from callbacks.throughput import ThroughputCallback
from tests.callbacks.faults import SendSignal
from tests.helpers import make_data, make_module, make_stacking, make_trainer


def fit(
    folder: Path,
    inputs: Path,
    *callbacks: Callback,
    step: int | None = None,
    trainer_settings: dict[str, Any] = {},  # noqa: B006
    **settings: object,
) -> dict[str, Any]:
    """Train 4 epochs of 3 steps, growing, from the checkpoint of ``step`` on; returns the summary."""
    own = (make_stacking(), TrainingMetrics(), ThroughputCallback(), RunSummary())
    own = (*own, RunCheckpoint(1, keep=100), *callbacks)
    trainer = make_trainer(folder, *own, enable_checkpointing=True, **trainer_settings)
    start = None if step is None else str(folder / "checkpoints" / f"step={step:09d}.ckpt")
    data = make_data(inputs / "corpus", inputs / "cache", **settings)
    trainer.fit(make_module(inputs / "teacher"), datamodule=data, ckpt_path=start)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary.pop("train_seconds") > 0
    return summary


def test_a_run_that_was_killed_before_its_summary_gets_it_when_it_is_continued(tmp_path: Path, inputs: Path) -> None:
    whole = fit(tmp_path, inputs)
    assert whole["val_loss"] > 0
    assert whole["train_loss"] > 0
    assert whole["loss_function"] == "mse to hidden states of layer 4 (normalize_targets: none)"
    assert list(json.loads((tmp_path / "summary.json").read_text())) == [field.name for field in fields(Summary)]
    (tmp_path / "summary.json").unlink()
    assert fit(tmp_path, inputs, step=12) == whole


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_losses_of_a_run_without_validation_are_null(tmp_path: Path, inputs: Path) -> None:
    summary = fit(tmp_path, inputs, val_splits=[])
    assert (summary["val_loss"], summary["val_output"]) == (None, None)
    assert summary["train_loss"] > 0
    assert summary["without_transcript"] == 0
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_summary_is_read_as_it_was_written_and_an_older_one_with_defaults() -> None:
    old = {"name": "a", "policy": "none", "steps": 4, "hardware": "CPU"}
    summary = Summary.from_plain(old | {"note": "of another version"})
    assert (summary.steps, summary.students, summary.val_output) == (4, 1, None)
    assert Summary.from_plain(summary.to_plain()) == summary != Summary.from_plain(old | {"steps": 5})


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("data", [{}, {"val_splits": []}])
@pytest.mark.parametrize("interval", [1, 1.0])
def test_an_interrupted_run_has_none(interval: float, data: dict[str, Any], tmp_path: Path, inputs: Path) -> None:
    """It stops at once, after a validation that is due, if there are data for one."""
    with pytest.raises(SIGTERMException):
        fit(tmp_path, inputs, SendSignal(3, 1), trainer_settings={"val_check_interval": interval}, **data)
    assert not (tmp_path / "summary.json").exists()
    assert max(path.name for path in (tmp_path / "checkpoints").glob("step=*")) == "step=000000011.ckpt"


@pytest.mark.ci
@pytest.mark.parametrize("step", [10, 11])
def test_the_mean_loss_is_that_of_the_whole_epoch_after_a_resume(
    step: int, tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path, inputs)
    assert fit(tmp_path, inputs, step=step)["train_loss"] == whole["train_loss"]
    monkeypatch.setattr(TrainingMetrics, "load_state_dict", lambda *_: None)  # control
    assert abs(fit(tmp_path, inputs, step=step)["train_loss"] - whole["train_loss"]) > 1e-4


class Validations(Callback):
    """Steps after which there was a validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ({"check_val_every_n_epoch": 3}, [9, 12]),
        ({"val_check_interval": 2}, [2, 5, 8, 11, 12]),
        pytest.param({"check_val_every_n_epoch": None, "val_check_interval": 5}, [5, 10, 12], marks=pytest.mark.ci),
        pytest.param(
            {"check_val_every_n_epoch": None, "val_check_interval": "00:01:00:00"}, [12], marks=pytest.mark.ci
        ),
    ],
)
def test_the_last_step_is_validated_in_any_case(
    interval: dict[str, Any], steps: list[int], tmp_path: Path, inputs: Path
) -> None:
    """Its losses are the run's result, and not those of the step that happened to be validated last."""
    often, when = fit(tmp_path / "often", inputs), Validations()
    seldom = fit(tmp_path / "seldom", inputs, when, trainer_settings=interval)
    assert when.steps == steps
    assert (seldom["val_loss"], seldom["val_output"]) == (often["val_loss"], often["val_output"])
    (tmp_path / "seldom" / "summary.json").unlink()
    resumed = fit(tmp_path / "seldom", inputs, step=10, trainer_settings=interval)  # in the last epoch
    assert (resumed["val_loss"], resumed["val_output"]) == (often["val_loss"], often["val_output"])
