"""Tables from the results alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.runner.results import by_row, results_table


def distilled(row: str, seed: int, seconds: float) -> dict[str, Any]:
    result = {"train_seconds": seconds, "student_seconds": seconds / 2, "flops": 10 * seconds, "val_output": 0.5}
    return {"kind": "distil", "row": row, "seed": seed, "task": "", "result": result}


def test_speed_ups_are_against_the_baseline_of_the_same_seed(tmp_path: Path) -> None:
    jobs = [
        distilled("full", 0, 10.0),
        distilled("full", 1, 20.0),
        distilled("grown", 0, 5.0),
        distilled("grown", 1, 10.0),
    ]
    jobs.append({"kind": "evaluate", "row": "grown", "seed": 0, "task": "pr", "result": {"metrics": {"per": 9.5}}})
    jobs.append({"kind": "evaluate", "row": "full", "seed": 0, "task": "pr", "result": None})
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"study": {"baseline": "full"}, "jobs": jobs}))
    rows = by_row(path)
    assert rows["grown"]["speed_up"] == [2.0, 2.0]
    assert rows["full"]["speed_up"] == [1.0, 1.0]
    assert rows["grown"]["pr/per"] == [9.5]
    assert "pr/per" not in rows["full"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table(path, {"full": "Full", "lost": "Lost", "grown": "Grown"}))
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert "15.0 +- 7.1" in lines["Full"]
    assert lines["Lost"].count(" - ") == 7
    assert "9.500" in lines["Grown"]


def test_without_a_baseline_there_is_no_speed_up(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"study": {"baseline": "full"}, "jobs": [distilled("grown", 0, 5.0)]}))
    assert by_row(path)["grown"]["train_seconds"] == [pytest.approx(5.0)]
    assert "speed_up" not in by_row(path)["grown"]
