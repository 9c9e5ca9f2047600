"""``interstack pack``."""

from pathlib import Path

import pytest

from experiments.cli import run
from tests.datamodules.corpora import write_corpus


def test_splits_are_packed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus", {"train": [16_000] * 3, "dev": [8000]})
    common = ["pack", "--root", str(tmp_path / "corpus"), "--output", str(tmp_path / "packed")]
    common += ["--cache_dir", str(tmp_path / "cache")]
    run([*common, "--splits", "[train, dev]"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("train: 3 utterances, 0.00 h, 0.00 GB in 1 files; 0 bad files left out")
    assert (tmp_path / "packed" / "dev" / "00000.pcm").stat().st_size == 16_000
    with pytest.raises(ValueError, match="shard_megabytes is 0"):
        run([*common, "--splits", "[train]", "--shard_megabytes", "0"])
