"""The data module: alone, and inside a trainer that is stopped and resumed."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.audio import BadAudioError
from datamodules.librispeech import AudioBatch, LibriSpeechDataModule
from datamodules.loading import SKIPPED_FILE
from tests.datamodules.corpora import truncate, utterance, write_audio, write_corpus, write_transcripts

LENGTHS = [4000 + 300 * number for number in range(30)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", {"train": LENGTHS, "dev": LENGTHS[:7]})


def unprepared(corpus: Path, **settings: Any) -> LibriSpeechDataModule:
    defaults: dict[str, Any] = {
        "train_splits": ["train"],
        "val_splits": ["dev"],
        "batch_size": 8,
        "num_workers": 0,
        "cache_dir": str(corpus.parent / "cache"),
    }
    return LibriSpeechDataModule(str(corpus), **defaults | settings)


def data_of(corpus: Path, **settings: Any) -> LibriSpeechDataModule:
    data = unprepared(corpus, **settings)
    data.prepare_data()
    data.setup()
    return data


def test_utterances_without_text_are_counted_where_others_have_some(corpus: Path) -> None:
    assert data_of(corpus).without_transcript == 0
    write_transcripts(corpus, [0, 1, 2])
    assert data_of(corpus).without_transcript == 27
    write_transcripts(corpus, [0], "dev")
    assert data_of(corpus).without_transcript == 27 + 6
    for split in ("train", "dev"):
        write_transcripts(corpus, [], split)
    assert data_of(corpus).without_transcript is None


class Recorder(L.LightningModule):
    """Remembers what it was shown; its one parameter makes the trainer happy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int], float]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: AudioBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.index.tolist(), float(batch.waveforms.sum())))
        return self.weight.sum() * batch.waveforms.mean()

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        self.validated.append(batch.index.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveOften(L.Callback):
    """After every optimizer step and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop._accumulated_batches_reached():
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / "end.ckpt")


def fit(
    data: LibriSpeechDataModule,
    checkpoints: Path | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[SaveOften(checkpoints)] if checkpoints else [],
        **{"max_epochs": 3, "accumulate_grad_batches": 2} | settings,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def test_an_epoch_is_every_utterance_once(corpus: Path) -> None:
    data = data_of(corpus)
    assert data.steps_per_epoch == 4
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    assert sorted(row for batch in batches for row in batch.index.tolist()) == list(range(30))
    for batch in batches:
        assert batch.num_samples.unique().tolist() == [batch.waveforms.shape[1]]
        assert batch.global_num_samples.tolist() == batch.num_samples.tolist()


def test_padding_is_masked_by_lengths(corpus: Path) -> None:
    for batch in data_of(corpus, length="pad", max_samples=9000).train_dataloader():
        assert batch.waveforms.shape[1] == batch.num_samples.max() <= 9000
        for waveform_T, num_samples in zip(batch.waveforms, batch.num_samples, strict=True):
            assert not waveform_T[num_samples:].any()
            assert waveform_T[:num_samples].abs().mean() > 0.05


def test_seconds_instead_of_utterances(corpus: Path) -> None:
    data = data_of(corpus, batch_size=None, batch_seconds=2.0)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == data.steps_per_epoch
        assert max(batch.waveforms.numel() for batch in batches) <= 32_000


def test_virtual_epochs(corpus: Path) -> None:
    data = data_of(corpus, batches_per_epoch=3)
    assert data.steps_per_epoch == len(data.train_dataloader()) == 3
    assert data_of(corpus, batches_per_epoch=9).steps_per_epoch == 9


def test_validation_is_the_same_every_time(corpus: Path) -> None:
    data = data_of(corpus, val_batch_size=3)
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert [batch.index.tolist() for batch in first] == [[0, 1], [2, 3], [4, 5, 6]]
    assert all(torch.equal(one.waveforms, two.waveforms) for one, two in zip(first, second, strict=True))


def test_the_example_batch_is_around_the_median_and_needs_no_random_numbers(corpus: Path) -> None:
    data = data_of(corpus)
    before = torch.get_rng_state()
    batch = data.example_batch(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert batch.index.tolist() == [13, 14, 15, 16]
    assert batch.waveforms.shape == (4, LENGTHS[13])
    assert torch.equal(batch.waveforms, data.example_batch(4).waveforms)
    assert len(data.example_batch(99).index) == 30


def test_the_fingerprint_tells_what_changes_the_data(corpus: Path, tmp_path: Path) -> None:
    elsewhere = write_corpus(tmp_path / "elsewhere", {"train": LENGTHS, "dev": LENGTHS})
    fingerprint = data_of(corpus).fingerprint()
    assert fingerprint == data_of(elsewhere, num_workers=1).fingerprint()
    assert fingerprint["rows"] == 30
    changes = {
        "seed": 1,
        "batch_size": 4,
        "length": "pad",
        "batches_per_epoch": 2,
        "max_samples": 5000,
        "crop": "fixed",
    }
    for name, value in changes.items():
        assert data_of(corpus, **{name: value}).fingerprint() != fingerprint
    write_audio(utterance(corpus, 30), 4000)
    assert data_of(corpus).fingerprint() != fingerprint


def test_fixed_segments_are_part_of_the_fingerprint_and_do_not_follow_the_seed(corpus: Path) -> None:
    settings: dict[str, Any] = {"crop": "fixed", "max_samples": 6000}
    fixed, reseeded, moved = (data_of(corpus, **settings, **more) for more in ({}, {"seed": 1}, {"segment_seed": 1}))
    assert "crop" not in data_of(corpus).fingerprint()
    assert fixed.fingerprint() != moved.fingerprint()

    def audio_by_row(data: LibriSpeechDataModule, epoch: int) -> dict[int, float]:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        return {
            row: float(waveform_T.sum())
            for batch in loader
            for row, waveform_T in zip(batch.index.tolist(), batch.waveforms, strict=True)
        }

    assert audio_by_row(fixed, 0) == audio_by_row(fixed, 3) == audio_by_row(reseeded, 0)
    assert audio_by_row(fixed, 0) != audio_by_row(moved, 0)


def test_a_trainer_sees_every_accumulation_step(corpus: Path) -> None:
    module = fit(data_of(corpus), max_epochs=2)
    assert [epoch for epoch, _, _ in module.seen] == [0] * 8 + [1] * 8
    for epoch in range(2):
        rows = [row for seen, index, _ in module.seen if seen == epoch for row in index]
        assert sorted(rows) == list(range(30))
    assert [len(part) for part in module.validated] == [4, 3] * 2
    assert sorted(module.validated[0] + module.validated[1]) == list(range(7))
    assert module.validated[:2] == module.validated[2:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_resumed_run_sees_what_it_would_have_seen(corpus: Path, tmp_path: Path, step: int, num_workers: int) -> None:
    data = data_of(corpus, num_workers=num_workers)
    whole = fit(data, tmp_path).seen
    rest = fit(data_of(corpus, num_workers=num_workers), resume=tmp_path / f"{step}.ckpt").seen
    assert rest == whole[2 * step :]
    assert rest != whole[2 * step - 1 : -1]


def test_a_resume_after_a_limited_epoch_starts_the_next(corpus: Path, tmp_path: Path) -> None:
    settings = {"limit_train_batches": 4, "limit_val_batches": 0}
    whole = fit(data_of(corpus), **settings).seen
    fit(data_of(corpus), tmp_path, **settings | {"max_epochs": 1})
    rest = fit(data_of(corpus), resume=tmp_path / "end.ckpt", **settings).seen
    assert rest == whole[4:]
    assert rest[:4] != whole[:4]


def test_validation_may_be_absent(corpus: Path) -> None:
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        module = fit(data_of(corpus, val_splits=[]), max_epochs=1)
    assert len(module.seen) == 8
    assert module.validated == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_seconds": 10.0}, "batch_size=8 and data.batch_seconds=10.0: set exactly one"),
        ({"batch_size": None}, "set exactly one"),
        ({"length": "stretch"}, "length is 'stretch'; it may be crop or pad"),
        ({"crop": "none"}, "crop is 'none'; it may be random or fixed"),
        ({"on_bad_audio": "ignore"}, "on_bad_audio is 'ignore'"),
        ({"batch_size": 0}, "batch_size is 0; it must be positive"),
        ({"segments_per_utterance": 0}, "segments_per_utterance is 0; it must be positive"),
        ({"segments_per_utterance": 2}, "segments_per_utterance=2 needs data.crop=fixed: random crops"),
        ({"max_samples": 300}, r"max_samples \(300\) is below data.min_samples \(400\)"),
        ({"train_splits": []}, "train_splits is empty"),
    ],
)
def test_settings_that_contradict_each_other(corpus: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unprepared(corpus, **settings)


def test_loaders_before_setup_are_an_error(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"call prepare_data\(\) and setup\(\) first"):
        unprepared(corpus).train_dataloader()


def test_bad_audio_is_an_error_before_training(corpus: Path) -> None:
    write_audio(utterance(corpus, 30), 5000, channels=2)
    with pytest.raises(BadAudioError, match=r"0030\.flac: has 2 channels; set resample: true"):
        data_of(corpus)


def test_skipped_audio_is_counted_and_listed(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = write_audio(utterance(corpus, 30), 5000, channels=2)
    truncated = truncate(utterance(corpus, 29), keep=0.3)
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        data = data_of(corpus, on_bad_audio="skip", run_dir=str(run), num_workers=2)
    assert f"train data: 1 bad files skipped, listed in {run / SKIPPED_FILE}" in caplog.text
    assert data.fingerprint()["skipped"] == 1
    for _ in range(2):
        rows = [row for batch in data.train_dataloader() for row in batch.index.tolist()]
    assert (len(rows), 29 in rows) == (30, False)
    lines = (run / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(bad), str(truncated)]


def test_real_speech(real_data: Path, tmp_path: Path) -> None:
    roots = [str(real_data / name) for name in ("LibriSpeech", "LibriSpeech_many_speakers")]
    data = LibriSpeechDataModule(
        roots, ["train-clean-100"], ["dev-clean"], batch_size=16, num_workers=0, cache_dir=str(tmp_path)
    )
    data.prepare_data()
    data.setup()
    assert data.fingerprint()["rows"] == 144 + 125
    assert data.steps_per_epoch == 17
    batch = next(iter(data.train_dataloader()))
    assert 0.001 < batch.waveforms.std() < 0.5


@pytest.mark.ci
def test_importing_the_package_is_light() -> None:
    name = "datamodules.LibriSpeechDataModule.__name__"
    code = f"import sys, datamodules; print('lightning' in sys.modules, {name})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "LibriSpeechDataModule"]
