"""Planned comparisons: intervals against scipy's, verdicts in both directions, seeds that are missing, every form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from experiments.report.comparisons import compare, comparison_grid, comparison_notes, verdict
from experiments.report.study import study_page, study_texts, study_values
from experiments.report.study_reading import read_study
from tests.experiments.report.made_up_study import write_study

PER, ACCURACY = "pr/per", "frames_probe/accuracy"


def planned(label: str = "A against B", measure: str = ACCURACY, margin: float = 0.0, **rows: str) -> dict[str, Any]:
    return {"label": label, "row": "a", "reference": "b", "measure": measure, "margin": margin, **rows}


def made_up(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of two rows whose seeds differ more than the rows do."""
    generator = np.random.default_rng(1)
    reference = generator.normal(60, 5, seeds)
    return reference + generator.normal(1, 0.5, seeds), reference


def by_seed(values: np.ndarray) -> dict[str, Any]:
    return {str(seed): value for seed, value in enumerate(values.tolist())}


def compared(row: np.ndarray, reference: np.ndarray, comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measures = {each["measure"] for each in comparisons}
    both = {"a": row, "b": reference}
    return compare(comparisons, {name: dict.fromkeys(measures, by_seed(both[name])) for name in both})


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("number", [1, 4])
def test_intervals_are_those_of_a_paired_t_test(seeds: int, number: int) -> None:
    row, reference = made_up(seeds)
    found = compared(row, reference, [planned(str(at)) for at in range(number)])
    assert len(found) == number
    test = ttest_rel(row, reference)
    plain, corrected = test.confidence_interval(0.95), test.confidence_interval(1 - 0.05 / number)
    for each in found:
        assert (each["seeds"], each["mean"]) == (seeds, pytest.approx((row - reference).mean()))
        assert each["interval"] == pytest.approx([plain.low, plain.high])
        assert each["corrected"] == pytest.approx([corrected.low, corrected.high])


def test_control_intervals_of_other_tests_or_levels_differ() -> None:
    row, reference = made_up(5)
    (found,) = compared(row, reference, [planned()])
    unpaired = ttest_ind(row, reference).confidence_interval(0.95)
    assert found["interval"] != pytest.approx([unpaired.low, unpaired.high], abs=0.1)
    wider = ttest_rel(row, reference).confidence_interval(0.99)
    assert found["interval"] != pytest.approx([wider.low, wider.high], abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.1, 2.0, 0, "confirmed"),
        (-0.1, 2.0, 0, "undecided"),
        (-2.0, 0.1, 0, "undecided"),
        (-2.0, -0.1, 0, "refuted"),
        (0.0, 2.0, 0, "undecided"),
        (-0.9, 2.0, -1, "confirmed"),
        (-1.1, 2.0, -1, "undecided"),
        (-1.1, -0.1, -1, "refuted"),
        (-0.9, -0.1, -1, "confirmed"),  # worse, but by less than the margin
    ],
)
def test_a_verdict_follows_from_interval_and_margin(low: float, high: float, margin: float, expected: str) -> None:
    assert verdict(low, high, margin, lower_is_better=False) == expected
    assert verdict(-high, -low, margin, lower_is_better=True) == expected


def test_the_direction_is_that_of_the_measure_and_of_the_subtraction() -> None:
    row, reference = made_up(5)  # all of the interval is above 0
    pairs = [planned("accuracy"), planned("errors", PER), planned("swapped", row="b", reference="a")]
    verdicts = {each["label"]: each["verdict"] for each in compared(row, reference, pairs)}
    assert verdicts == {"accuracy": "confirmed", "errors": "refuted", "swapped": "refuted"}
    notes = "\n".join(
        comparison_notes(
            {
                "rows": [{"name": "a", "label": "Alpha"}, {"name": "b", "label": "Beta"}],
                "comparisons": [*pairs, planned("near", margin=-1), planned("few errors", PER, margin=-1)],
            }
        )
    )
    assert "accuracy: Alpha minus Beta; confirmed above 0, refuted below 0." in notes
    assert "errors: Alpha minus Beta; confirmed below 0, refuted above 0." in notes
    assert "swapped: Beta minus Alpha; confirmed above 0, refuted below 0." in notes
    assert "near: Alpha minus Beta; confirmed above -1.00, refuted below 0." in notes
    assert "few errors: Alpha minus Beta; confirmed below +1.00, refuted above 0." in notes


@pytest.mark.parametrize(
    ("low", "high", "margin", "measure", "excluded"),
    [
        (-1.9, -0.9, -1.0, ACCURACY, False),
        (-1.9, -1.1, -1.0, ACCURACY, True),
        (0.9, 1.9, -1.0, PER, False),
        (1.1, 1.9, -1.0, PER, True),
        (-1.9, -0.9, 0.0, ACCURACY, True),
    ],
)
def test_a_refutation_says_if_a_loss_within_the_margin_is_not_excluded(
    low: float, high: float, margin: float, measure: str, excluded: bool
) -> None:
    found = {"seeds": 3, "mean": (low + high) / 2, "interval": [low, high], "corrected": [low, high]}
    found |= planned("a", measure, margin) | {"verdict": verdict(low, high, margin, measure == PER)}
    grid = comparison_grid({"comparisons": [found], "seeds": [0, 1, 2]})
    assert grid is not None
    said = "" if excluded else " (a loss within the margin is not excluded)"
    assert grid.rows[0][-1].text == f"refuted{said}"


def test_losses_that_measure_different_things_have_no_verdict() -> None:
    row, reference = made_up(5)
    values = {
        name: {key: by_seed(data) for key in ("val_output", ACCURACY)} for name, data in (("a", row), ("b", reference))
    }
    for functions, verdicts in (
        ({"a": "mse", "b": "l1"}, ["other loss function", "confirmed"]),
        ({"a": "mse", "b": "mse"}, ["refuted", "confirmed"]),
        ({"a": "mse"}, ["refuted", "confirmed"]),
    ):
        found = compare([planned("loss", "val_output"), planned("accuracy")], values, functions)
        assert [each["verdict"] for each in found] == verdicts
        assert (found[0]["interval"] is None) == (verdicts[0] == "other loss function")


def test_seeds_that_failed_or_are_missing_are_left_out_and_counted() -> None:
    row, reference = made_up(6)
    values = {"a": {ACCURACY: by_seed(row)}, "b": {ACCURACY: by_seed(reference)}}
    values["a"][ACCURACY]["1"] = "failed"
    values["b"][ACCURACY]["4"] = "missing"
    (found,) = compare([planned()], values)
    kept = [0, 2, 3, 5]
    expected = ttest_rel(row[kept], reference[kept]).confidence_interval(0.95)
    assert (found["seeds"], found["interval"]) == (4, pytest.approx([expected.low, expected.high]))
    values["b"][ACCURACY] |= {"0": "missing", "2": "failed"}
    found = compare([planned()], values)
    grid = comparison_grid({"comparisons": found, "seeds": list(range(6))})
    assert grid is not None
    cells = [cell.text for cell in grid.rows[0]]
    assert cells == ["A against B", "Frame probe accuracy, %", "-", "2 of 6", "-", "-", "not enough seeds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seeds of four rows; MIDAS fails once. The measure of two comparisons is no column."""
    rows = ("full_l2l", "gradstack_equal", "midas_equal", "interleave_equal")
    folder = write_study(tmp_path_factory.mktemp("study") / "table1", seeds=5, rows=rows)
    comparisons = [
        planned("Near <Full>", PER, -9, row="interleave_equal", reference="full_l2l"),
        planned("GradStack", PER, row="interleave_equal", reference="gradstack_equal"),
        planned("MIDAS, loss", "val_output", row="interleave_equal", reference="midas_equal"),
    ]
    described = json.loads((folder / "study.json").read_text())
    described |= {"comparisons": comparisons, "columns": ["val_output", "flops_ratio"]}
    (folder / "study.json").write_text(json.dumps(described))
    return folder


def test_every_form_of_the_report_has_the_table(folder: Path) -> None:
    report = json.loads(json.dumps(study_values(read_study(folder))))
    verdicts = [(each["seeds"], each["verdict"]) for each in report["comparisons"]]
    assert verdicts == [(5, "confirmed"), (5, "refuted"), (4, "refuted")]
    pers = [
        [json.loads((folder / "jobs" / f"evaluate-{row}-{seed}" / "result.json").read_text())["metrics"]["per"]
         for seed in range(5)]
        for row in ("interleave_equal", "gradstack_equal")
    ]  # fmt: skip
    test = ttest_rel(*pers)
    plain, corrected = test.confidence_interval(0.95), test.confidence_interval(1 - 0.05 / 3)
    texts = study_texts(report)
    section = texts["md"].split("## Planned comparisons")[1].split("\n## ")[0]
    assert "| Comparison | Measure | Difference | Seeds | 95 % interval | 98.33 % interval | Verdict |" in section
    mean = np.mean(pers[0]) - np.mean(pers[1])
    narrow, wide = (f"[{interval.low:+.2f}, {interval.high:+.2f}]" for interval in (plain, corrected))
    assert f"| GradStack | PR PER, % | {mean:+.2f} | 5 of 5 | {narrow} | {wide} | refuted |" in section
    assert "| 4 of 5 |" in section
    for rule in ("Student's t over seeds", "Bonferroni", "Refuted: not confirmed, and all of it is worse than 0"):
        assert rule in section
    assert "- Near <Full>: InterleaveStack, equal minus Full L2L; confirmed below +9.00, refuted above 0." in section
    assert r"GradStack & PR PER, \% &" in texts["tex"]
    assert 'interleave_equal,"InterleaveStack, equal",measured,pr/per,0,' in texts["csv"]
    page = study_page(report, [])
    assert "<h2>Planned comparisons</h2>" in page
    assert "<th scope='row'>Near &lt;Full&gt;</th>" in page
    assert "<td data-label='Verdict' class='number'>confirmed</td>" in page
    assert "confirmed below +9.00" in page


def test_a_study_without_comparisons_has_no_such_section(folder: Path) -> None:
    report = study_values(read_study(folder))
    older = {key: value for key, value in report.items() if key != "comparisons"}
    for without in (older, report | {"comparisons": []}):
        assert "Planned" not in study_texts(without)["md"] + study_page(without, [])
    assert "PR PER" not in study_texts(older)["md"].split("## Results")[1].split("\n## ")[0]  # no column of the study
