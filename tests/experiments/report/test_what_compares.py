"""What compares in a report: means over the same seeds, trained students, one test set, the same recordings."""

import json
from pathlib import Path

import pytest

from experiments.report.study import build_report, study_values
from experiments.report.study_reading import read_study
from experiments.report.study_tables import result_grid
from tests.experiments.report.made_up_study import ROWS, write_study
from tests.experiments.report.test_study import markdown_row

pytest.importorskip("matplotlib")


def test_a_student_that_was_not_trained_is_best_in_nothing(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", rows=("full_l2l", "full", "interleave_equal"))
    described = json.loads((folder / "study.json").read_text())
    best = []
    for rate in (1e-5, 0.0):
        described["rows"][1]["overrides"] = {"model.optimizer.lr": rate}
        (folder / "study.json").write_text(json.dumps(described))
        grid = result_grid(study_values(read_study(folder)))
        best.append({row[0].text for row in grid.rows if any(cell.bold for cell in row)})
    assert "Full" in best[0]
    assert "Full" not in best[1]


def test_a_row_with_fewer_seeds_is_named_and_never_the_best(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", rows=("full_l2l", "full", "interleave_equal"))
    assert study_values(read_study(folder))["caveats"] == []
    grid = result_grid(study_values(read_study(folder)))
    best = [row[0].text for row in grid.rows if row[1].bold]
    (name,) = (name for name in ("full_l2l", "full", "interleave_equal") if best == [ROWS[name][0]])
    for seed in (1, 2):
        (folder / "jobs" / f"evaluate-{name}-{seed}" / "result.json").unlink()
        (folder / "jobs" / f"distil-{name}-{seed}" / "result.json").unlink()
    report = study_values(read_study(folder))
    assert any(f"seeds, of which nothing can be concluded: {best[0]}. " in line for line in report["caveats"])
    assert best != [row[0].text for row in result_grid(report).rows if row[1].bold] != []


def test_a_column_may_name_another_test_set(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    for path, per in zip(sorted(folder.glob("jobs/evaluate-*/result.json")), (30.0, 20.0, 10.0), strict=True):
        tests = {"test-clean": {"per": 1.0}, "test-other": {"per": per}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tests": tests}))
    described = json.loads((folder / "study.json").read_text()) | {"columns": ["pr/per", "pr/per@test-other"]}
    (folder / "study.json").write_text(json.dumps(described))
    build_report(read_study(folder))
    report = (folder / "report.md").read_text()
    assert "| System | PR PER, % | PR PER (test-other), % |" in report
    labels = [path.parent.name for path in sorted(folder.glob("jobs/evaluate-*/result.json"))]
    assert labels == ["evaluate-full_l2l-0", "evaluate-interleave_equal-0", "evaluate-teacher"]
    assert markdown_row(folder, "Full L2L")[1] == "30.00"
    assert markdown_row(folder, "InterleaveStack, equal")[1] == "20.00"
    assert markdown_row(folder, "Teacher")[1] == "10.00"
    assert (folder / "speed_quality_pr_per_test-other.png").is_file()
    del described["columns"][1]
    described["columns"] += ["pr/per@dev"]
    (folder / "study.json").write_text(json.dumps(described))
    build_report(read_study(folder))
    assert markdown_row(folder, "Full L2L")[1] == "-"


def test_layers_that_were_compared_on_other_recordings_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    said = []
    for recordings in ([], ["a", "b"], ["a", "b"]):
        said.append(any("on other recordings" in line for line in study_values(read_study(folder))["caveats"]))
        row = ("full_l2l", "interleave_equal")[len(said) % 2]
        path = folder / "jobs" / f"similarity-{row}-0" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"recordings": recordings or ["a", "b"]}))
    assert said == [False, True, False]
