"""Caches of several segments of each utterance, and the runs that read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.resume_guard import differences
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.target_cache import TargetCache
from experiments.cli import run
from tests.cached_runs import SaveAt, data_of, options, rounded, train
from tests.helpers import make_module, make_trainer, save_corpus, save_teacher

ROWS = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus and its caches of one segment and of two: ``1``, ``2``; each row alone."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": ROWS, "dev": 3})
    for places in (1, 2):
        more = ["--data.segments_per_utterance", str(places), "--output", str(folder / str(places))]
        run(["cache-targets", *options(folder), *more])
    return folder


def two_places(home: Path, **settings: Any) -> LibriSpeechDataModule:
    return data_of(home, **({"segments_per_utterance": 2, "targets": str(home / "2")} | settings))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.targets"))


def test_a_cache_of_two_places_is_twice_as_large(home: Path) -> None:
    assert size_of(home / "2") == 2 * size_of(home / "1")
    TargetCache(str(home / "2")).verify()


@pytest.mark.ci
@pytest.mark.parametrize("batches_per_epoch", [None, 2], ids=["a pass per epoch", "two thirds of a pass"])
def test_a_run_from_the_cache_is_the_run_on_the_fly(
    batches_per_epoch: int | None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through three growths, with accumulation, while passes take both places in turn."""
    settings = {"batches_per_epoch": batches_per_epoch}
    cached, _ = train(make_module(home / "teacher"), two_places(home, num_workers=1, **settings), tmp_path / "cached")
    module = make_module(home / "teacher")
    module.targets = rounded(module, "bf16")  # type: ignore[method-assign, assignment]
    reference, _ = train(module, two_places(home, targets=None, **settings), tmp_path / "rounded")
    assert all(torch.equal(a, b) for a, b in zip(cached, reference, strict=True))
    one, _ = train(make_module(home / "teacher"), data_of(home, targets=str(home / "1"), **settings), tmp_path / "one")
    assert not all(torch.equal(a, b) for a, b in zip(cached, one, strict=True))
    # Control: the targets of the first place, whatever place a pass takes, are seen.
    read = TargetCache.read
    monkeypatch.setattr(TargetCache, "read", lambda self, segments: read(self, segments % ROWS))
    first, _ = train(make_module(home / "teacher"), two_places(home, **settings), tmp_path / "first")
    assert not all(torch.equal(a, b) for a, b in zip(cached, first, strict=True))


@pytest.mark.parametrize("step", [2, 5])
def test_a_resumed_run_continues_exactly(step: int, home: Path, tmp_path: Path) -> None:
    saver = SaveAt(step, tmp_path / "saved.ckpt")  # in the middle of the first epoch, or of the second
    whole, _ = train(make_module(home / "teacher"), two_places(home), tmp_path / "whole", saver)
    resume = tmp_path / "saved.ckpt"
    resumed, _ = train(make_module(home / "teacher"), two_places(home), tmp_path / "resumed", resume=resume)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    for other, message in (
        (data_of(home, targets=str(home / "1")), r"data\.segments_per_utterance was 2, is not set"),
        (two_places(home, targets=None), r"data\.targets was bf16, is not set"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_module(home / "teacher"), other, tmp_path / "other", resume=resume)


@pytest.mark.parametrize(
    ("cache", "places", "message"),
    [
        ("1", 2, r"data\.segments_per_utterance was 1, is 2"),
        ("2", 1, r"data\.segments_per_utterance was 2, is 1"),
        ("2", 3, r"data\.segments_per_utterance was 2, is 3"),
    ],
)
def test_a_cache_of_another_number_is_refused_by_name(
    cache: str, places: int, message: str, home: Path, tmp_path: Path
) -> None:
    data = data_of(home, targets=str(home / cache), segments_per_utterance=places)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(make_module(home / "teacher"), datamodule=data)


def test_one_segment_is_described_as_before_there_were_several(home: Path) -> None:
    """So that caches and checkpoints of one segment stay valid."""
    one, two = data_of(home), two_places(home, targets=None)
    for data in (one, two):
        data.prepare_data()
        data.setup()
    name = "segments_per_utterance"
    assert name not in one.fingerprint()
    assert f"data.{name}" not in one.segment_settings()
    assert f"data.{name}" not in TargetCache(str(home / "1")).settings
    assert (two.fingerprint()[name], two.segment_settings()[f"data.{name}"]) == (2, 2)
    assert differences(one.fingerprint(), two.fingerprint()) == [f"{name} was not set, is 2"]


def test_every_place_has_its_own_targets(home: Path) -> None:
    """Each equals the teacher's output for the audio of that place."""
    data = two_places(home)
    data.prepare_data()
    module = make_module(home / "teacher")
    make_trainer(home / "unused", max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
    batches: Iterator[Any] = (data.train_dataloader().dataset[batch] for batch in _one_by_one(data))
    cache, seen = TargetCache(str(home / "2")), []
    for number, batch in enumerate(batches):
        expected = rounded(module, "bf16")(batch).output_BFD
        assert torch.equal(_output(cache, number), expected)
        seen.append(torch.equal(_output(cache, (number + ROWS) % (2 * ROWS)), expected))
    assert not all(seen)  # the other place has other targets, unless the utterance is as long as its segment
    assert any(seen)


def _one_by_one(data: LibriSpeechDataModule) -> Iterator[Any]:
    sampler = data.train_dataloader().batch_sampler
    for place in range(2):
        for row in range(ROWS):
            yield sampler.crop.resolve(np.array([row]), place)


def _output(cache: TargetCache, number: int) -> Any:
    """The output (1, F, D) of one segment."""
    return cache.read(np.array([number])).targets.decoded()[0]
