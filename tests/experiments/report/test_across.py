"""Several studies on one page: what is shared, differences to own baselines, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.report.command import report as report_command
from tests.experiments.report.made_up_runs import write_run
from tests.experiments.report.made_up_study import write_study

pytest.importorskip("matplotlib")

ROWS = ("full_l2l", "interleave_equal")


def change(folder: Path, **values: Any) -> Path:
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two studies of the same name, of which the second has a row more and twice the error rates."""
    first = write_study(tmp_path / "first", rows=ROWS)
    second = write_study(tmp_path / "second", rows=(*ROWS, "full"))
    for path in second.glob("jobs/evaluate-*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"metrics": {"per": 2 * result["metrics"]["per"]}}))
    return [first, second]


def page(folders: list[Path], *files: str) -> str:
    output = folders[0].parent / "both"
    report_command([str(folder) for folder in folders], str(output), ["report.md", *files])
    return (output / "report.md").read_text()


def pers(folder: Path, row: str) -> list[float]:
    paths = sorted(folder.glob(f"jobs/evaluate-{row}-?/result.json"))
    return [json.loads(path.read_text())["metrics"]["per"] for path in paths]


def test_rows_have_the_difference_to_the_baseline_of_their_own_study(two: list[Path]) -> None:
    text = page(two, "report.html", "report.tex", "studies.png")
    section = text.split("## PR PER, %")[1]
    line = next(line for line in section.splitlines() if line.startswith("| InterleaveStack, equal |"))
    cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
    for place, folder in enumerate(two):
        own, base = pers(folder, "interleave_equal"), pers(folder, "full_l2l")
        assert float(cells[2 * place].split()[0]) == pytest.approx(sum(own) / 3, abs=0.006)
        assert float(cells[2 * place + 1].split()[0]) == pytest.approx((sum(own) - sum(base)) / 3, abs=0.006)
    assert "| Full L2L | " in text
    assert "| Full | " not in text  # only one study has this row
    names = {path.name for path in (two[0].parent / "both").iterdir()}
    assert names == {"report.md", "report.html", "report.tex", "studies.png"}
    assert "agree in teacher" in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"teacher": {"model": "other"}},
            "differ in their teacher (first: teacher.model not set; second: teacher.model other)",
        ),
        ({"overrides": {"model.optimizer.lr": 0.1}}, "settings of all rows"),
        ({"hardware": "a GPU"}, "different machines (first: 2 CPU cores; second: a GPU)"),
        ({"baseline": "full"}, "different baselines (first: full_l2l; second: full)"),
    ],
)
def test_what_cannot_be_compared_is_said(facts: dict[str, Any], words: str, two: list[Path]) -> None:
    change(two[1], **facts)
    text = page(two)
    assert words in text
    assert ("Therefore their values do not compare" in text) == ("differ in their" in text)
    assert "agree in teacher" not in text


def test_a_row_with_other_settings_is_named(two: list[Path]) -> None:
    rows = json.loads((two[1] / "study.json").read_text())["rows"]
    change(two[1], rows=[row | {"overrides": {"model.student.dropout": 0.1}} for row in rows])
    assert "Row interleave_equal has other settings" in page(two)


def test_what_has_no_comparison_is_refused(two: list[Path], tmp_path: Path) -> None:
    names = [str(folder) for folder in two]
    with pytest.raises(ValueError, match="need --output"):
        report_command(names)
    with pytest.raises(ValueError, match="no study, but others are"):
        report_command([names[0], str(write_run(tmp_path / "run"))], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="2 studies have the name first"):
        report_command([names[0], names[0]], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="second names no baseline row"):
        report_command([names[0], str(change(two[1], baseline=None))], str(tmp_path / "out"))
    alone = write_study(tmp_path / "alone", seeds=1, rows=("full_l2l", "midas_equal"))
    with pytest.raises(ValueError, match="share a row of the same name other than the baseline"):
        report_command([names[0], str(alone)], str(tmp_path / "out"))
