import io
import logging
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import Tensor, nn

from callbacks.progress import DistillationProgressBar
from callbacks.throughput import ThroughputCallback
from tests.helpers import make_data, make_module, make_trainer


class Batch(NamedTuple):
    waveforms: Tensor
    global_num_samples: Tensor


class Stack(nn.Module):
    depth = 6


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.student = Stack()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.linear(batch.waveforms).square().mean()
        self.log("train/loss", loss, logger=False, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fit(folder: Path, bar: DistillationProgressBar, num_batches: int = 50) -> None:
    batches = [Batch(torch.ones(3, 2), torch.tensor([16_000]))] * num_batches
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=2,
        callbacks=[ThroughputCallback(), bar],
        logger=CSVLogger(folder),
        accelerator="cpu",
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Tiny(), loader)


def test_on_a_terminal_the_bar_shows_depth_loss_and_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    fit(tmp_path, DistillationProgressBar())
    text = terminal.getvalue()
    assert re.search(r"50/50 .*depth=6, loss=[\d.e+-]+, audio_s/s=\d+", text)
    assert "v_num" not in text
    assert text.count("\r") < 40  # 100 batches


def test_elsewhere_there_is_one_line_per_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    with caplog.at_level(logging.INFO, "callbacks.progress"):
        fit(tmp_path, DistillationProgressBar())
    lines = [record.message for record in caplog.records if record.name == "callbacks.progress"]
    assert len(lines) == 2
    assert re.fullmatch(r"epoch 1 of 2, step 50: depth 6, loss [\d.e-]+, audio_s/s [\d.e+]+", lines[0])
    assert lines[1].startswith("epoch 2 of 2, step 100: ")
    assert output.getvalue() == ""


def test_long_epochs_have_lines_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with caplog.at_level(logging.INFO, "callbacks.progress"):
        fit(tmp_path, DistillationProgressBar(seconds_between_lines=0), num_batches=3)
    lines = [record.message for record in caplog.records if record.name == "callbacks.progress"]
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["1", "2", "3", "4", "5", "6"]


def test_a_module_without_a_student_has_no_depth(tmp_path: Path) -> None:
    bar, module = DistillationProgressBar(), Tiny()
    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, accelerator="cpu", callbacks=bar, enable_checkpointing=False
    )
    assert bar.get_metrics(trainer, module) == {"depth": 6}
    del module.student
    assert bar.get_metrics(trainer, module) == {}


@pytest.mark.ci
def test_no_step_reads_a_number_for_the_progress_bar(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning reads what is logged with ``prog_bar=True`` after every batch, also without a bar: a GPU would wait."""
    read: list[Any] = []
    original = result.convert_tensors_to_scalars
    monkeypatch.setattr(result, "convert_tensors_to_scalars", lambda value: read.append(value) or original(value))
    trainer = make_trainer(tmp_path, max_epochs=1)
    data = make_data(inputs / "corpus", inputs / "cache")
    trainer.fit(make_module(inputs / "teacher"), datamodule=data)
    assert read == []
    assert trainer.callback_metrics["train/loss"] > 0
    trainer = make_trainer(tmp_path, ReadsForTheBar(), max_epochs=1)
    trainer.fit(make_module(inputs / "teacher"), datamodule=data)
    assert len(read) >= trainer.global_step  # control


class ReadsForTheBar(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("seen", torch.ones(()), prog_bar=True, logger=False)
