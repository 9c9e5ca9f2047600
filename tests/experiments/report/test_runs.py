"""A report of run folders: a study of one seed with a row for each."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.report.command import report
from experiments.report.runs import study_of_runs
from experiments.report.study import build_report, study_values
from tests.experiments.report.made_up_runs import two_runs, write_run

pytest.importorskip("matplotlib")


def values_of(folders: list[Path]) -> dict[str, Any]:
    return study_values(study_of_runs(folders, "interstack report"))


def cells(folder: Path, label: str) -> list[str]:
    text = (folder / "report.md").read_text().split("\n## ")[1]
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip().strip("*") for cell in line.split("|")[2:-1]]


def test_rows(tmp_path: Path) -> None:
    built = build_report(study_of_runs(two_runs(tmp_path), "interstack report a b"), tmp_path / "out")
    assert cells(tmp_path / "out", "full (none)") == ["873k", "0.148", "0.159", "100", "12.0", "1.00"]
    grown = cells(tmp_path / "out", "interleave (interleaved, equal)")
    assert grown == ["873k", "0.0513", "0.200", "80.0", "7.5", "1.25"]
    pictures = {name for name in built.files if name.endswith(("png", "svg"))}
    assert {"loss_vs_time.png", "loss_vs_steps.png", "depth_vs_step.png", "ancestry.svg"} <= pictures
    assert "interstack report a b" in built.main.read_text()


def test_speed_up_is_against_full_wherever_it_stands(tmp_path: Path) -> None:
    found = values_of(two_runs(tmp_path)[::-1])["values"]
    assert {name: row["speed_up"]["0"] for name, row in found.items()} == {"interleave": 1.25, "full": 1.0}


def test_without_full_there_is_no_speed_up_and_it_is_explained(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    alone = values_of(runs[1:])
    assert "speed_up" not in alone["columns"]
    assert any("No speed-up is given" in note for note in alone["caveats"])
    assert not any("No speed-up" in note for note in values_of(runs)["caveats"])


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_without_a_number_failed_only_where_there_was_a_validation(validated: bool, tmp_path: Path) -> None:
    """The summary has ``null`` both for a loss that is not finite and without validation."""
    run = write_run(tmp_path / "run", val_output=None)
    if validated:
        path = run / "metrics.csv"
        path.write_text(path.read_text().replace("val/loss", "val/output"))
    build_report(study_of_runs([run], "interstack report"), tmp_path / "out")
    assert cells(tmp_path / "out", "run (none)")[2] == ("failed" if validated else "-")


def test_an_unfinished_run_is_named_and_its_curve_is_drawn(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    (runs[1] / "summary.json").unlink()
    study = study_of_runs(runs, "interstack report")
    built = build_report(study, tmp_path / "out")
    assert "interleave has not finished, its row is incomplete." in (tmp_path / "out" / "report.md").read_text()
    assert study.run_log(study.jobs[1]) is not None
    assert "loss_vs_steps.png" in built.files


def test_different_hardware_and_seeds_are_named(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    other = write_run(tmp_path / "other", hardware="another", seed=7, precision="bf16-mixed")
    third = write_run(tmp_path / "third", precision="32-true")
    assert not any("hardware" in note for note in values_of(runs)["caveats"])
    found = values_of([*runs, other, third])
    assert any("differ in hardware" in note for note in found["caveats"])
    assert any("differ in precision (32-true; bf16-mixed)" in note for note in found["caveats"])
    assert found["run_seeds"] == [0, 7]
    assert found["values"]["other"]["speed_up"]["0"] == "missing"


def test_names_must_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "same") for name in ("a", "b")]
    with pytest.raises(ValueError, match="2 run folders have the name same"):
        study_of_runs(runs, "interstack report")


def test_the_command_serves_runs_and_says_what_it_needs(tmp_path: Path) -> None:
    runs = [str(folder) for folder in two_runs(tmp_path)]
    report(runs, output=str(tmp_path / "both"), files=["report.md"])
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["report.md"]
    with pytest.raises(ValueError, match="need --output"):
        report(runs)
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "quickstart.json").write_text(json.dumps({"fast": True}))
    with pytest.raises(ValueError, match="unfinished quick start"):
        report([str(tmp_path / "quick")])
