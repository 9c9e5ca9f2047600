import csv
import logging
import math
import multiprocessing
import re
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from datamodules.errors import InputError
from experiments.records.csv_logger import AppendingCSVLogger
from experiments.records.loggers import ResilientWandbLogger, WandbSettings, build_loggers
from tests.processes import ended, fork


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.linear(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.linear(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(run: Path, max_epochs: int, loggers: list[L.pytorch.loggers.Logger]) -> L.Trainer:
    return L.Trainer(
        default_root_dir=run,
        max_epochs=max_epochs,
        logger=loggers,
        accelerator="cpu",
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)


# -- metrics.csv ---------------------------------------------------------------------------------------------


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    logger = AppendingCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,epoch\n1,0.5,0\n"


def test_a_new_logger_keeps_rows_and_columns(tmp_path: Path) -> None:
    AppendingCSVLogger(tmp_path).log_metrics({"train/loss": 0.5, "epoch": 0}, step=1)
    AppendingCSVLogger(tmp_path).log_metrics({"epoch": 1, "train/loss": 0.25}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,epoch\n1,0.5,0\n2,0.25,1\n"


def test_a_new_column_rewrites_the_header(tmp_path: Path) -> None:
    logger = AppendingCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"val/loss": 0.75}, step=1)
    AppendingCSVLogger(tmp_path).log_metrics({"growth/depth": 6, "train/loss": float("nan")}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,train/loss,val/loss,growth/depth\n1,0.5,,\n1,,0.75,\n2,nan,,6\n"
    )
    assert not (tmp_path / "metrics.csv.tmp").exists()


@pytest.mark.parametrize("torn", ["3", "3,0.1", "3,0.125,"])
def test_half_a_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.csv"
    whole = "step,train/loss,epoch\n1,0.5,0\n2,0.25,0\n"
    path.write_text(whole + torn)
    AppendingCSVLogger(tmp_path).log_metrics({"train/loss": 0.125, "epoch": 0}, step=3)
    assert path.read_text() == whole + "3,0.125,0\n"


@pytest.mark.parametrize("text", ["", "step,train/lo"])
def test_a_file_without_a_whole_header_starts_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    AppendingCSVLogger(tmp_path).log_metrics({"train/loss": 0.5}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n1,0.5\n"


def test_a_metric_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val/loss were logged without a step"):
        AppendingCSVLogger(tmp_path).log_metrics({"val/loss": 1.0})


def test_a_killed_writer_loses_no_row_and_the_next_goes_on(tmp_path: Path) -> None:
    logged, log = multiprocessing.Pipe(duplex=False)

    def write() -> None:
        logger = AppendingCSVLogger(tmp_path)
        for step in range(10**9):
            logger.log_metrics({"train/loss": step / 8, f"new/{step % 50}": 1}, step=step)
            log.send(step)

    process = fork(write)
    seen = [logged.recv() for _ in range(120)][-1]
    process.kill()
    assert ended(process) == -signal.SIGKILL
    AppendingCSVLogger(tmp_path).log_metrics({"train/loss": -1}, step=seen)
    written = rows(tmp_path)
    assert [int(row["step"]) for row in written[:-1]] == list(range(len(written) - 1))
    assert len(written) - 1 > seen
    assert all(float(row["train/loss"]) == int(row["step"]) / 8 for row in written[:-1])
    assert written[-1]["train/loss"] == "-1"


def test_two_fits_into_one_folder_append(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = make_trainer(tmp_path, 1, build_loggers(tmp_path, "run", WandbSettings("disabled")))
        trainer.fit(Tiny(), loader(), loader())
        assert trainer.log_dir == str(tmp_path)
    written = rows(tmp_path)
    assert [row["step"] for row in written if row["train/loss"]] == ["0", "1", "0", "1"]
    assert [row["step"] for row in written if row["val/loss"]] == ["1", "1"]
    assert all(math.isfinite(float(row["train/loss"])) for row in written if row["train/loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


# -- Weights & Biases ----------------------------------------------------------------------------------------


def wandb_logger(run: Path, settings: WandbSettings, run_id: str | None = "abc123") -> WandbLogger:
    logger = build_loggers(run, "run", settings, run_id=run_id, config={"a": 1})[1]
    assert isinstance(logger, WandbLogger)
    return logger


@pytest.mark.usefixtures("no_key")
def test_without_a_key_auto_is_offline_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "experiments.records.loggers"):
        logger = wandb_logger(tmp_path / "run", WandbSettings())
    assert logger._wandb_init["mode"] == "offline"
    assert len(caplog.records) == 1
    assert "wandb login" in caplog.text


@pytest.mark.usefixtures("no_key")
def test_a_key_makes_auto_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_logger(tmp_path, WandbSettings())._wandb_init["mode"] == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_logger(tmp_path, WandbSettings())._wandb_init["mode"] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert wandb_logger(tmp_path, WandbSettings())._wandb_init["mode"] == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_logger(tmp_path, WandbSettings())._wandb_init["mode"] == "offline"


@pytest.mark.usefixtures("no_key")
def test_settings_reach_wandb(tmp_path: Path) -> None:
    settings = WandbSettings("offline", project="p", entity="e", group="g", tags=["t"])
    init = wandb_logger(tmp_path, settings)._wandb_init
    wanted = {"project": "p", "entity": "e", "group": "g", "tags": ["t"], "id": "abc123", "resume": "allow"}
    assert wanted.items() <= init.items()
    assert init["dir"] == str(tmp_path)
    assert wandb_logger(tmp_path, WandbSettings("offline", id="mine"))._wandb_init["id"] == "mine"


@pytest.mark.parametrize("name", ["init_timeout_seconds", "finish_timeout_seconds"])
def test_no_limit_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"wandb\.{name}=0 must be more than 0"):
        WandbSettings(**{name: 0})


@pytest.mark.usefixtures("no_key")
def test_offline_runs_lie_in_the_run_folder_and_keep_their_id(tmp_path: Path) -> None:
    import wandb

    for _ in range(2):
        loggers = build_loggers(tmp_path, "run", WandbSettings("offline"), run_id="abc123")
        trainer = make_trainer(tmp_path, 1, loggers)
        trainer.fit(Tiny(), loader(), loader())
        assert wandb.run is None  # or the next run of this process would be written into this one
    folders = [path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir()]
    assert folders
    # Two runs within a second: W&B numbers the second one's folder.
    assert all(re.search(r"-abc123(-\d+)?$", path.name) for path in folders)
    assert len(rows(tmp_path)) == 6


@pytest.mark.usefixtures("no_key")
def test_an_unreachable_server_means_offline_after_a_bounded_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(ResilientWandbLogger, "unreachable", False)
    logger = wandb_logger(tmp_path, WandbSettings("online", init_timeout_seconds=2))
    assert logger._wandb_init["settings"].init_timeout == 2
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"train/loss": 0.25}, step=2)
    assert logger.experiment.offline
    assert logger.experiment.id == "abc123"
    # A second run beside it does not ask again: that would end the first.
    other = wandb_logger(tmp_path, WandbSettings("online", id="second"))
    assert other.experiment.offline
    assert other.experiment.id == "second"
    logger.log_metrics({"train/loss": 0.125}, step=3)
    for each in (other, logger):
        each.finalize("success")
    assert [record.levelname for record in caplog.records if record.name == "experiments.records.loggers"] == [
        "WARNING"
    ]
    assert list((tmp_path / "wandb").glob("offline-run-*-abc123"))
    assert not list((tmp_path / "wandb").glob("run-*"))  # of the attempt to start online
