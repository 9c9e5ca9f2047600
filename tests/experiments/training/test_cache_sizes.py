"""What reading a cache takes, caches of a limited size, and runs on their speakers alone."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.librispeech import LibriSpeechDataModule
from datamodules.shards import unfinished_folder
from datamodules.speaker_choice import speaker_order
from datamodules.target_cache import MARKER, SPEAKERS, VALIDATION, TargetCache, kept_speakers
from experiments.cli import run
from experiments.training.cache_sizes import reading_needs, storage_for
from tests.cached_runs import SaveAt, data_of, options, rounded, train
from tests.datamodules.corpora import write_audio
from tests.helpers import make_data, make_module, save_corpus, save_teacher

SPEAKERS_OF_CORPUS = [str(number) for number in range(1, 9)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus of eight speakers, and its caches: ``whole``, and ``half``, limited to half of the bytes."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"dev": 3})
    for speaker in SPEAKERS_OF_CORPUS:
        for number in range(3):
            path = folder / "corpus" / "train" / speaker / "1" / f"{speaker}-1-{number}.flac"
            write_audio(path, 4000 + 700 * number + 150 * int(speaker))
    run(["cache-targets", *options(folder), "--output", str(folder / "whole")])
    run(["cache-targets", *options(folder), "--output", str(folder / "half"), "--max_gb", str(half_of(folder))])
    return folder


def half_of(home: Path) -> float:
    return size_of(home / "whole") / 2e9


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.targets"))


def ready(home: Path, **settings: Any) -> LibriSpeechDataModule:
    data = data_of(home, **settings)
    data.prepare_data()
    data.setup()
    return data


def test_reading_is_told_in_rates_and_in_storage_that_has_them() -> None:
    """Three targets of HuBERT Base in bf16, at 50 frames a second."""
    assert reading_needs(230_400 * 3600, 3600.0) == (
        "reading: 230 kB per audio second, so 2.1 GB/s at 9,000 audio seconds per second (any NVMe disk) and 11 GB/s "
        "at 47,000 (memory)"
    )
    rates = {0.05: "network storage", 0.4: "a SATA SSD", 2.9: "any NVMe", 6.9: "a fast NVMe", 7.1: "memory"}
    for rate, name in rates.items():
        assert storage_for(rate).startswith(name)


def test_a_limited_cache_has_whole_speakers_in_their_order(home: Path) -> None:
    kept = kept_speakers(str(home / "half"))
    assert kept is not None
    assert kept == speaker_order(SPEAKERS_OF_CORPUS, seed=0)[: len(kept)]
    assert 1 < len(kept) < 8
    assert size_of(home / "half" / VALIDATION) == size_of(home / "whole" / VALIDATION)
    assert size_of(home / "half") / 1e9 <= half_of(home)
    assert TargetCache(str(home / "half")).settings["data.rows"] == 3 * len(kept)
    assert kept_speakers(str(home / "whole")) is None
    assert kept_speakers(str(home / "nowhere")) is None


@pytest.mark.ci
def test_every_limit_holds(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, numbers = size_of(home / "whole"), []
    for number, part in enumerate((0.25, 0.4, 0.7, 0.95, 1.0)):
        cache, limit = tmp_path / str(number), part * whole / 1e9
        run(["cache-targets", *options(home), "--output", str(cache), "--max_gb", str(limit)])
        told = capsys.readouterr().out.splitlines()[0]
        kept = len(kept_speakers(str(cache)) or SPEAKERS_OF_CORPUS)
        assert told.startswith(f"max_gb={limit:g}: {kept} of 8 speakers, 0.00 h of audio kept, 0.00 h left out")
        assert size_of(cache) <= part * whole
        numbers.append(kept)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 8
    assert not (tmp_path / "4" / SPEAKERS).exists()
    assert TargetCache(str(tmp_path / "4")).settings == TargetCache(str(home / "whole")).settings


@pytest.mark.ci
def test_a_run_trains_on_the_speakers_of_its_cache_alone(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit as on a corpus that has no others, with the teacher on the fly."""
    kept = kept_speakers(str(home / "half")) or []
    with caplog.at_level(logging.INFO, logger="datamodules.librispeech"):
        data = ready(home, targets=str(home / "half"))
    assert f"the speakers of the cache {home / 'half'} alone: {len(kept)} of 8 speakers, 0.00 h" in caplog.text
    assert set(data.train_manifest.speakers) == set(kept)
    assert len(data.train_manifest) == 3 * len(kept)
    whole = ready(home, targets=str(home / "whole"))
    assert data.steps_per_epoch < whole.steps_per_epoch
    assert data.fingerprint()["rows"] == 3 * len(kept)
    assert data.fingerprint()["row_hash"] != whole.fingerprint()["row_hash"]

    for speaker in kept:
        (tmp_path / "corpus" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / "train" / speaker).symlink_to(home / "corpus" / "train" / speaker)
    (tmp_path / "corpus" / "dev").symlink_to(home / "corpus" / "dev")
    cached, _ = train(make_module(home / "teacher"), data_of(home, targets=str(home / "half")), tmp_path / "cached")
    module = make_module(home / "teacher")
    module.targets = rounded(module, "bf16")  # type: ignore[method-assign, assignment]
    alone = make_data(tmp_path / "corpus", tmp_path / "manifests", crop="fixed")
    reference, _ = train(module, alone, tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(cached, reference, strict=True))
    every, _ = train(make_module(home / "teacher"), data_of(home, targets=str(home / "whole")), tmp_path / "every")
    assert not all(torch.equal(a, b) for a, b in zip(cached, every, strict=True))


@pytest.mark.ci
def test_a_resumed_run_continues_exactly(home: Path, tmp_path: Path) -> None:
    def half() -> LibriSpeechDataModule:
        return data_of(home, targets=str(home / "half"), num_workers=1)

    saver = SaveAt(2, tmp_path / "2.ckpt")
    whole, _ = train(make_module(home / "teacher"), half(), tmp_path / "whole", saver)
    resumed, _ = train(make_module(home / "teacher"), half(), tmp_path / "resumed", resume=tmp_path / "2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    other = data_of(home, targets=str(home / "whole"))
    with pytest.raises(ValueError, match=r"data\.rows was \d+, is 24"):
        train(make_module(home / "teacher"), other, tmp_path / "other", resume=tmp_path / "2.ckpt")


def test_other_speakers_of_a_corpus_do_not_matter_and_missing_ones_are_an_error(home: Path, tmp_path: Path) -> None:
    kept = kept_speakers(str(home / "half")) or []
    corpus = tmp_path / "corpus"
    for speaker in kept:
        (corpus / "train").mkdir(parents=True, exist_ok=True)
        (corpus / "train" / speaker).symlink_to(home / "corpus" / "train" / speaker)
    (corpus / "dev").symlink_to(home / "corpus" / "dev")
    write_audio(corpus / "train" / "new" / "1" / "new-1-0.flac", 9000)
    data = make_data(corpus, tmp_path / "manifests", crop="fixed", targets=str(home / "half"))
    train(make_module(home / "teacher"), data, tmp_path / "run")
    (corpus / "train" / kept[1]).unlink()
    data.prepare_data()
    with pytest.raises(ValueError, match=rf"half has the targets of {len(kept)} speakers, of whom .*first: {kept[1]}"):
        data.setup()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("0", r"max_gb is 0(\.0)?; it must be positive"),
        ("-1", r"max_gb is -1(\.0)?; it must be positive"),
        (
            "1e-8",
            r"max_gb leaves 0 GB for the training data, but speaker \d, the first in the order of data\.segment_seed",
        ),
    ],
)
def test_a_limit_that_nothing_fits_in_is_an_error(limit: str, message: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(["cache-targets", *options(home), "--output", str(tmp_path / "cache"), "--max_gb", limit])
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_call_continues_and_a_finished_cache_is_verified(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["cache-targets", *options(home), "--max_gb", str(half_of(home)), "--output", str(tmp_path / "cache")]
    run(call)
    written = (tmp_path / "cache" / "00000.targets").stat().st_mtime_ns
    (tmp_path / "cache").rename(unfinished_folder(tmp_path / "cache"))
    for name in (MARKER, SPEAKERS):
        (unfinished_folder(tmp_path / "cache") / name).unlink()
    run(call)
    assert (tmp_path / "cache" / "00000.targets").stat().st_mtime_ns == written
    assert kept_speakers(str(tmp_path / "cache")) == kept_speakers(str(home / "half"))
    capsys.readouterr()
    run(call)
    assert "is finished, and every file has its checksum" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data\.rows \d+ instead of 24.*: set overwrite"):
        run(["cache-targets", *options(home), "--output", str(tmp_path / "cache")])
    speakers = tmp_path / "cache" / SPEAKERS
    assert json.loads((tmp_path / "cache" / MARKER).read_text())["parts"][SPEAKERS]["bytes"] == speakers.stat().st_size
    speakers.write_text(speakers.read_text()[::-1])
    with pytest.raises(ValueError, match=r"speakers\.txt has changed since the targets were cached"):
        run(call)
    speakers.write_text("1\n")
    with pytest.raises(ValueError, match=r"speakers\.txt has changed its size"):
        ready(home, targets=str(tmp_path / "cache"))


def test_an_older_cache_does_not_limit_the_next(home: Path, tmp_path: Path) -> None:
    more = ["--data.targets", str(home / "half"), "--output", str(tmp_path / "cache")]
    run(["cache-targets", *options(home), *more])
    assert TargetCache(str(tmp_path / "cache")).settings["data.rows"] == 24
