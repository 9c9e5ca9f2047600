"""The planned comparisons of a study: paired differences with intervals of Student's t, and a verdict on each.

The rule of the verdict is printed below the table. `compare` makes plain values for ``report.json``, from which the
table and its notes are made.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.grids import Cell, Grid
from experiments.report.numbers import DASH
from experiments.report.study_tables import ERROR, FEWEST_SEEDS, column, is_loss, paired, signed, student_interval

TOO_FEW, OTHER_LOSS = "not enough seeds", "other loss function"
NOTES = (
    "Difference: row minus reference, the mean over the seeds that both have. Seeds that failed or are missing are "
    f"left out. With fewer than {FEWEST_SEEDS} seeds there is no interval and no verdict.",
    "Intervals: Student's t over seeds. The second one is corrected for the number of comparisons in this table "
    "(Bonferroni).",
    "Verdict, by the 95 % interval alone. Confirmed: all of it is better than the margin (0 where none is named). "
    "Refuted: not confirmed, and all of it is worse than 0. Undecided: all else.",
)


def compare(
    comparisons: Sequence[Mapping[str, Any]], values: Mapping[str, Any], loss_functions: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Add ``seeds`` (their number), ``mean``, ``interval``, ``corrected`` and ``verdict`` to each comparison.

    Args:
        comparisons: as in ``study.json``: label, row, reference, measure, margin.
        values: row -> column -> seed -> number, "failed" or "missing".
        loss_functions: row -> what its output loss measures, of rows of which it is known. Losses that measure
            different things have no difference.
    """
    compared = []
    for each in comparisons:
        measure = each["measure"]
        differences = paired(values[each["row"]][measure], values[each["reference"]][measure])
        found: dict[str, Any] = {"mean": None, "interval": None, "corrected": None, "verdict": TOO_FEW}
        functions = {(loss_functions or {}).get(each[name]) for name in ("row", "reference")} - {None}
        if is_loss(measure) and len(functions) > 1:
            found["verdict"] = OTHER_LOSS
        elif len(differences) >= FEWEST_SEEDS:
            interval = student_interval(differences)
            found = {
                "mean": statistics.fmean(differences),
                "interval": list(interval),
                "corrected": list(student_interval(differences, ERROR / len(comparisons))),
                "verdict": verdict(*interval, each["margin"], column(measure).better == "low"),
            }
        compared.append({**each, "seeds": len(differences), **found})
    return compared


def verdict(low: float, high: float, margin: float, lower_is_better: bool) -> str:
    """Return ``confirmed``, ``refuted`` or ``undecided``; with a margin of -1 the row may be worse by up to one.

    An interval between the margin and zero is confirmed: the row is worse, but within the margin.
    """
    worst, best = (-high, -low) if lower_is_better else (low, high)
    if worst > margin:
        return "confirmed"
    return "refuted" if best < 0 else "undecided"


def comparison_grid(report: Mapping[str, Any]) -> Grid | None:
    """Make the table; None if the study plans no comparison."""
    compared = report.get("comparisons", [])
    if not compared:
        return None
    titles = ("Comparison", "Measure", "Difference", "Seeds", *(f"{level} % interval" for level in _levels(compared)))
    rows = [
        (
            Cell(each["label"]),
            Cell(column(each["measure"]).title),
            Cell(DASH, missing=True) if each["mean"] is None else Cell(signed(each["mean"], each["measure"])),
            Cell(f"{each['seeds']} of {len(report['seeds'])}"),
            _interval(each["interval"], each["measure"]),
            _interval(each["corrected"], each["measure"]),
            Cell(each["verdict"] + _within_margin(each)),
        )
        for each in compared
    ]
    return Grid((*titles, "Verdict"), tuple(rows))


def _within_margin(each: Mapping[str, Any]) -> str:
    """Add to a refutation that a difference smaller than the margin is not excluded, if it is not."""
    if each["verdict"] != "refuted" or not each["margin"]:
        return ""
    low, high = each["interval"]
    best = -low if column(each["measure"]).better == "low" else high
    return " (a loss within the margin is not excluded)" if best > each["margin"] else ""


def _levels(compared: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Levels of both intervals, in per cent."""
    plain, corrected = (f"{100 * (1 - error):.4g}" for error in (ERROR, ERROR / len(compared)))
    return plain, corrected


def _interval(interval: Sequence[float] | None, measure: str) -> Cell:
    if interval is None:
        return Cell(DASH, missing=True)
    low, high = (signed(end, measure) for end in interval)
    return Cell(f"[{low}, {high}]")


def comparison_notes(report: Mapping[str, Any]) -> list[str]:
    """Notes on reading the table, and one line per comparison with its rows and its limits."""
    labels = {row["name"]: row["label"] for row in report["rows"]}
    return [*NOTES, *(_rule(each, labels) for each in report["comparisons"])]


def _rule(each: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    better, worse, sign = ("below", "above", -1) if column(each["measure"]).better == "low" else ("above", "below", 1)
    limit = signed(sign * each["margin"], each["measure"]) if each["margin"] else "0"
    return (
        f"{each['label']}: {labels[each['row']]} minus {labels[each['reference']]}; "
        f"confirmed {better} {limit}, refuted {worse} 0."
    )
