import importlib.util
import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from callbacks.samples import SampleSpectrograms, log_mel
from datamodules.speech_data import SpeechDataModule


class Batch(NamedTuple):
    waveforms: Tensor
    num_samples: Tensor
    global_num_samples: Tensor
    index: Tensor


class Data(SpeechDataModule):
    steps_per_epoch = 2
    transfer_batch_to_device = L.LightningDataModule.transfer_batch_to_device  # of any batch

    def example_batch(self, num_items: int) -> Batch:
        tone_T = torch.sin(torch.arange(16_000) / 16_000 * 2 * torch.pi * 1000)
        num_samples = torch.tensor([16_000, 8_000, 12_000])[:num_items]
        waveforms = tone_T.repeat(len(num_samples), 1)
        return Batch(waveforms, num_samples, num_samples, torch.arange(7, 7 + len(num_samples)))

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.ones(2, 2))


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.linear(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Images(WandbLogger):
    """Keeps what would be uploaded."""

    def __init__(self) -> None:
        super().__init__()
        self._experiment = object()
        self.images: list[tuple[str, list[Any], dict[str, Any]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.append((key, images, kwargs))

    def finalize(self, status: str) -> None:
        pass

    def log_hyperparams(self, params: Any = None) -> None:
        pass


def fit(folder: Path, callback: SampleSpectrograms, data: Any, logger: Any = False) -> None:
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        callbacks=callback,
        logger=logger,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Tiny(), datamodule=data)


@pytest.mark.ci
def test_pictures_are_written_and_uploaded_once(tmp_path: Path) -> None:
    logger = Images()
    fit(tmp_path, SampleSpectrograms(), Data(), logger)
    paths = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in paths] == ["000007.png", "000008.png", "000009.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    ((key, images, kwargs),) = logger.images
    assert key == "samples/log_mel"
    assert images == [str(path) for path in paths]
    assert kwargs["caption"] == ["row 7, 1.0 s", "row 8, 0.5 s", "row 9, 0.8 s"]

    stamps = [path.stat().st_mtime_ns for path in paths]
    fit(tmp_path, SampleSpectrograms(), Data(), logger)
    assert len(logger.images) == 1
    assert [path.stat().st_mtime_ns for path in paths] == stamps


def test_at_most_so_many_items(tmp_path: Path) -> None:
    fit(tmp_path, SampleSpectrograms(num_items=1), Data())
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_without_matplotlib_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "matplotlib" else find_spec(name, *args),
    )
    with caplog.at_level(logging.INFO, "callbacks.samples"):
        fit(tmp_path, SampleSpectrograms(), Data())
    assert [r.name for r in caplog.records if "matplotlib is missing" in r.message] == ["callbacks.samples"]
    assert not (tmp_path / "samples").exists()


def test_data_without_examples_are_left_alone(tmp_path: Path) -> None:
    class Other(L.LightningDataModule):
        train_dataloader = Data.train_dataloader

    class WithoutExamples(Data):
        example_batch = SpeechDataModule.example_batch

    for data in (Other(), WithoutExamples()):
        fit(tmp_path, SampleSpectrograms(), data)
    assert not (tmp_path / "samples").exists()


def random_states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    trainer, module = L.Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False), Tiny()
    trainer.datamodule = Data()
    before = random_states()
    SampleSpectrograms().on_fit_start(trainer, module)
    assert (tmp_path / "samples").is_dir()
    assert random_states() == before
    torch.rand(1)
    assert random_states() != before


def test_a_tone_is_a_line_at_its_height() -> None:
    time_T = np.arange(16_000, dtype=np.float32) / 16_000
    low, high = (log_mel(np.sin(2 * np.pi * hertz * time_T), 16_000) for hertz in (500, 4000))
    assert low.shape == (80, 101)
    assert low.max() == 0
    assert low.min() >= -80
    assert low[:, 50].argmax() < high[:, 50].argmax()
