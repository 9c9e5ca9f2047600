"""``interstack bench together``: runs apart and together take turns; the saving is set beside the prediction."""

import json
from pathlib import Path

import pytest

from experiments.bench.compare import Place
from experiments.bench.together import line, summarise
from experiments.cli import run
from tests.helpers import save_teacher


@pytest.mark.slow  # 8 s
def test_both_ways_take_turns_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, output = save_teacher(tmp_path / "teacher", layers=12), tmp_path / "together.json"
    small = {"model.student.hidden_size": 16, "model.student.intermediate_size": 24, "model.student.num_heads": 2}
    run(
        [
            *("bench", "together", "--configs", '["full_l2l", "midas_equal"]', "--batch_size", "1", "--seconds", "0.3"),
            *("--rounds", "1", "--accelerator", "cpu", "--teacher", str(teacher), "--output", str(output)),
            *("--overrides", json.dumps(small)),
        ]
    )
    result = json.loads(output.read_text())
    (turn,) = result["turns"]
    assert (result["steps"], result["configs"]) == (8, ["full_l2l", "midas_equal"])
    assert 0 < turn["apart_teacher_seconds"] < turn["apart_seconds"]
    assert turn["together_seconds"] > 0
    assert result["predicted_ratio"] > 1
    assert "times as fast" in capsys.readouterr().out


def test_the_prediction_spares_all_teachers_but_one(tmp_path: Path) -> None:
    turns = [{"apart_seconds": 30.0, "apart_teacher_seconds": 9.0, "together_seconds": 25.0}] * 2
    turns += [{"apart_seconds": 30.0, "apart_teacher_seconds": 9.0, "together_seconds": 20.0}]
    result = summarise(["a", "b", "c"], turns, Place(tmp_path, "some/teacher", 4, 5.0, 2, "cpu"))
    assert result["predicted_ratio"] == 30 / (30 - 6)
    assert result["ratio"] == 30 / 25
    assert "1.20 times as fast (1.20 to 1.35), predicted 1.25" in line(result)
