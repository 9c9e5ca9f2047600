"""The phone probe as a command: what it writes."""

import json
from pathlib import Path

from experiments.cli import run
from tests.helpers import save_teacher


def test_the_probe_writes_its_result(tmp_path: Path) -> None:
    run(["synthesize", "--output", str(tmp_path), "--minutes", "0.5", "--voices", "3"])
    arguments = ["--upstream", str(save_teacher(tmp_path / "model")), "--root", str(tmp_path / "LibriSpeech")]
    run(["probe-phones", *arguments, "--output", str(tmp_path / "probe"), "--steps", "2"])
    result = json.loads((tmp_path / "probe" / "result.json").read_text())
    assert result["task"] == "phones"
    assert 0 < result["metrics"]["per"] <= 200
    assert len(result["layer_weights"]) == 5
