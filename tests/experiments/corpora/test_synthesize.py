from pathlib import Path

import pytest

from experiments.cli import run

pytest.importorskip("espeakng_loader")


def test_command_line(tmp_path: Path) -> None:
    run(["synthesize", f"--output={tmp_path}", "--minutes=0.5", "--voices=3"])
    assert len(list(tmp_path.glob("LibriSpeech/*/*/*/*.trans.txt"))) == 3
    with pytest.raises(ValueError, match="made with seed 0 instead of 1"):
        run(["synthesize", f"--output={tmp_path}", "--minutes=0.5", "--voices=3", "--seed=1"])
