"""The benchmark of the data path: every variant goes through the loader and is reported."""

import json
from pathlib import Path

import pytest

from datamodules.corpus import CorpusSettings
from datamodules.packing import pack_split
from experiments.bench.data import Turn, _row, bench_data, table
from tests.datamodules.corpora import write_corpus


def test_every_variant_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, packed, cache = write_corpus(tmp_path / "corpus", {"train": [8000] * 8}), tmp_path / "packed", str(tmp_path)
    pack_split(CorpusSettings((str(corpus),), ("train",), min_samples=1), packed, 10**6, cache_dir=cache)
    output = tmp_path / "data.json"
    bench_data(str(corpus), str(packed), ["train"], 2.0, 3, [0, 1], 1, cache, str(output))
    result = json.loads(output.read_text())
    names = ["files, 0 workers", "soundfile alone", "files, 1 workers", "packed, 0 workers", "packed, 1 workers"]
    assert [row["variant"] for row in result["variants"]] == names
    assert all(row["audio_s_per_s"] > 0 for row in result["variants"])
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert "3 batches of 2.0 s" in table(result)


def test_rates_are_medians_of_audio_over_time() -> None:
    turns = [Turn(100.0, 2.0, 4.0), Turn(100.0, 1.0, 4.0), Turn(100.0, 4.0, 4.0)]
    row = _row("one", turns)
    assert (row["audio_s_per_s"], row["audio_s_per_cpu_s"]) == (50.0, 25.0)
    assert row["spread"] == pytest.approx(37.5)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        bench_data("/nowhere", rounds=0)
