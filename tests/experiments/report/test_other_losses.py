"""Losses of rows that were trained on another loss function are shown, but never compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.report.runs import study_of_runs
from experiments.report.study import study_texts, study_values
from experiments.report.study_plots import study_pictures
from experiments.report.study_reading import other_losses, read_study
from experiments.report.study_tables import difference_grid, result_grid
from tests.experiments.report.made_up_runs import write_run
from tests.experiments.report.made_up_study import ROWS, write_study

pytest.importorskip("matplotlib")

NAMES = ("full_l2l", "full", "interleave_equal")
MSE, COSINE = "mse to hidden states of layer 12", "l1_cosine to hidden states of layer 12"


def study(folder: Path, functions: dict[str, str]) -> Path:
    """A study of three rows whose runs say what their output loss measures."""
    write_study(folder, rows=NAMES)
    for name, text in functions.items():
        for path in folder.glob(f"runs/{name}-seed*/summary.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"loss_function": text}))
    return folder


def shown(folder: Path) -> dict[str, Any]:
    """The texts of the report, which rows have a bold loss or none in the table of differences, and the curves."""
    found = read_study(folder)
    report = study_values(found)
    results, differences = result_grid(report), difference_grid(report)
    assert differences is not None
    place = {grid: grid.titles.index("Dev output loss") for grid in (results, differences)}
    pictures = {each.name: each for each in study_pictures(found, report)}
    (legend,) = pictures["loss_vs_steps"].figure.legends
    return {
        "bold": [row[0].text for row in results.rows if row[place[results]].bold],
        "no difference": [row[0].text for row in differences.rows if row[place[differences]].missing],
        "curves": [text.get_text() for text in legend.get_texts()],
        "caption": pictures["loss_vs_flops"].caption,
        "text": study_texts(report)["md"],
    }


@pytest.mark.parametrize("other", ["full", "interleave_equal"])
def test_another_loss_function_is_not_compared(other: str, tmp_path: Path) -> None:
    label = ROWS[other][0]
    found = shown(study(tmp_path / "study", {name: COSINE if name == other else MSE for name in NAMES}))
    assert found["bold"] == []
    assert found["no difference"] == [label]
    assert sorted(found["curves"]) == sorted(ROWS[name][0] for name in NAMES if name != other)
    assert found["caption"].endswith(f"Not shown, since their loss is another function: {label}.")
    assert f"than those of the others ({MSE}), so they do not compare with them. {label}: {COSINE}." in found["text"]


@pytest.mark.parametrize("functions", [dict.fromkeys(NAMES, MSE), {}, {"full": COSINE}], ids=["one", "old", "unknown"])
def test_one_loss_function_is_compared_and_so_is_one_that_is_not_known(
    functions: dict[str, str], tmp_path: Path
) -> None:
    found = shown(study(tmp_path / "study", functions))
    assert len(found["bold"]) == 1
    assert found["no difference"] == []
    assert sorted(found["curves"]) == sorted(ROWS[name][0] for name in NAMES)
    assert "another function" not in found["text"] + found["caption"]


def test_seconds_of_another_machine_are_in_no_picture(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", rows=NAMES)

    def curves() -> dict[str, list[str]]:
        found = read_study(folder)
        pictures = {each.name: each for each in study_pictures(found, study_values(found))}
        return {
            name: sorted(text.get_text() for text in pictures[name].figure.legends[0].get_texts())
            for name in ("loss_vs_time", "loss_vs_steps")
        }

    everyone = sorted(ROWS[name][0] for name in NAMES)
    assert curves() == {"loss_vs_time": everyone, "loss_vs_steps": everyone}
    path = folder / "jobs" / "distil-full-0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": "another"}))
    others = sorted(ROWS[name][0] for name in NAMES if name != "full")
    assert curves() == {"loss_vs_time": others, "loss_vs_steps": everyone}


def test_runs_without_a_baseline_are_compared_with_the_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, policy="interleaved") for name in ("a", "b", "c")]
    for run, text in zip(runs, (MSE, COSINE, MSE), strict=True):
        summary = run / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"loss_function": text}))
    found = study_of_runs(runs, "interstack report")
    assert found.study["baseline"] is None
    assert other_losses(found) == (MSE, {"b": COSINE})
