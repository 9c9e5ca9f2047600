"""The benchmark of the data path: every variant goes through the loader and is reported."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.cached_records import CachedRecords
from datamodules.corpus import CorpusSettings
from datamodules.packing import pack_split
from datamodules.target_cache import TargetCache
from experiments.bench.data import Turn, _row, bench_data, forget, table
from experiments.training.cache_targets import TargetsTrainer
from tests.datamodules.corpora import write_corpus
from tests.helpers import make_data, make_module, save_teacher


def test_every_variant_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, packed, cache = write_corpus(tmp_path / "corpus", {"train": [8000] * 8}), tmp_path / "packed", str(tmp_path)
    pack_split(CorpusSettings((str(corpus),), ("train",), min_samples=1), packed, 10**6, cache_dir=cache)
    output = tmp_path / "data.json"
    bench_data(str(corpus), str(packed), ["train"], 2.0, 3, [0, 1], 1, cache, output=str(output))
    result = json.loads(output.read_text())
    names = ["files, 0 workers", "soundfile alone", "files, 1 workers", "packed, 0 workers", "packed, 1 workers"]
    assert [row["variant"] for row in result["variants"]] == names
    assert all(row["audio_s_per_s"] > 0 for row in result["variants"])
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert "3 batches of 2.0 s" in table(result)


@pytest.mark.parametrize("features", [False, True])
def test_cached_targets_are_read_with_the_audio_or_with_features(
    features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, teacher = write_corpus(tmp_path / "corpus", {"train": [8000] * 8}), save_teacher(tmp_path / "teacher")
    settings: dict[str, Any] = {"batch_size": None, "batch_seconds": 2.0, "val_splits": []}
    writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data = make_data(corpus, tmp_path / "cache", crop="fixed", **settings)
    module = make_module(teacher, front_end="frozen")
    writer.cache_targets(module, data, str(tmp_path / "targets"), features=features)
    read, carried = TargetCache.read, []

    def reading(self: TargetCache, rows_B: np.ndarray) -> CachedRecords:
        carried.append((records := read(self, rows_B)).features_BFC is not None)
        return records

    monkeypatch.setattr(TargetCache, "read", reading)
    output = tmp_path / "data.json"
    where = str(tmp_path / "cache"), str(tmp_path / "targets")
    bench_data(str(corpus), None, ["train"], 2.0, 3, [0], 1, *where, output=str(output))
    rows = json.loads(output.read_text())["variants"]
    assert [row["variant"] for row in rows] == [
        "files, 0 workers",
        "soundfile alone",
        "features, 0 workers" if features else "files, targets, 0 workers",
    ]
    assert set(carried) == {features}
    with pytest.raises(ValueError, match=r"data\.batch_seconds was 2\.0, is 1\.0"):
        bench_data(str(corpus), None, ["train"], 1.0, 3, [0], 1, str(tmp_path), str(tmp_path / "targets"))


def test_rates_are_medians_of_audio_over_time() -> None:
    turns = [Turn(100.0, 2.0, 4.0), Turn(100.0, 1.0, 4.0), Turn(100.0, 4.0, 4.0)]
    row = _row("one", turns)
    assert (row["audio_s_per_s"], row["audio_s_per_cpu_s"]) == (50.0, 25.0)
    assert row["spread"] == pytest.approx(37.5)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        bench_data("/nowhere", rounds=0)


def test_files_are_dropped_from_memory_before_each_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[str] = []

    def advise(descriptor: int, first: int, length: int, advice: int) -> None:
        assert (first, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    corpus = write_corpus(tmp_path / "corpus", {"train": [8000] * 4})
    files = {path.name for path in corpus.rglob("*") if path.is_file()}
    for cold in (False, True):
        dropped.clear()
        settings: dict[str, Any] = {
            "splits": ["train"],
            "batch_seconds": 2.0,
            "batches": 1,
            "workers": [0],
            "rounds": 1,
        }
        output = tmp_path / "data.json"
        bench_data(str(corpus), **settings, cold=cold, cache_dir=str(tmp_path / "cache"), output=str(output))
        assert json.loads(output.read_text())["cold"] is cold
        assert set(dropped) == (files if cold else set())
        assert len(dropped) == (4 * len(files) if cold else 0)  # two variants, two turns


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="finds mapped files by /proc")
def test_mapped_files_are_closed_since_they_could_not_be_dropped(tmp_path: Path) -> None:
    corpus, packed = write_corpus(tmp_path / "corpus", {"train": [8000] * 4}), tmp_path / "packed"
    pack_split(CorpusSettings((str(corpus),), ("train",), min_samples=1), packed, 10**6, cache_dir=str(tmp_path))
    settings: dict[str, Any] = {"batch_size": None, "batch_seconds": 2.0, "val_splits": []}
    writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data = make_data(packed, tmp_path / "cache", crop="fixed", **settings)
    writer.cache_targets(make_module(save_teacher(tmp_path / "teacher")), data, str(tmp_path / "targets"))
    bench_data(str(corpus), str(packed), ["train"], 2.0, 1, [0], 1, str(tmp_path / "cache"), str(tmp_path / "targets"))

    def mapped() -> set[str]:
        words = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        return {Path(word[-1]).suffix for word in words if word[-1].startswith(str(tmp_path))}

    assert {".pcm", ".targets"} <= mapped()
    forget([str(packed), str(tmp_path / "targets")])
    assert not {".pcm", ".targets"} & mapped()
