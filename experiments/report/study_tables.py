"""The tables of a study: mean and spread over seeds, and paired differences against the baseline row.

All tables are functions of plain values (``report.json``), so they can be made again without the runs.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.grids import Cell, Grid
from experiments.report.numbers import DASH, fixed, show_count, show_loss, show_seconds, show_si

PLUS_MINUS = "\u00b1"
FEWEST_SEEDS = 3
ERROR = 0.05
"""Probability that the interval of one difference misses the true difference."""
INTERVAL_NOTE = (
    "In brackets a 95 % interval of Student's t over seeds. Bold: it excludes zero. By chance that happens in one of "
    "twenty cells where nothing differs."
)
NO_INTERVAL_NOTE = (
    f"A difference without an interval comes from fewer than {FEWEST_SEEDS} seeds: nothing can be concluded from it."
)


@dataclass(frozen=True)
class StudyColumn:
    """Title, format and unit of a column, and which direction is better (None: neither)."""

    title: str
    show: Callable[[float], str]
    better: str | None = None
    unit: float = 1.0


COLUMNS = {
    "train_seconds": StudyColumn("Training, s", show_seconds, "low"),
    "student_seconds": StudyColumn("Student, s", show_seconds, "low"),
    "speed_up": StudyColumn("Speed-up", fixed(2), "high"),
    "student_speed_up": StudyColumn("Student speed-up", fixed(2), "high"),
    "flops": StudyColumn("FLOPs", show_si, "low"),
    "flops_ratio": StudyColumn("FLOPs ratio", fixed(2), "low"),
    "peak_memory_bytes": StudyColumn("Memory, GB", lambda number: f"{number / 1e9:.2f}", "low", unit=1e9),
    "final_loss": StudyColumn("Train loss", show_loss),
    "val_output": StudyColumn("Dev output loss", show_loss, "low"),
    "mean_depth": StudyColumn("Mean depth", fixed(1)),
    "parameters": StudyColumn("Parameters", lambda number: show_count(round(number))),
    "superb_gmacs": StudyColumn("GMACs (SUPERB)", fixed(0), "low"),
    "steps": StudyColumn("Steps", fixed(0)),
}
SECONDS = ("train_seconds", "student_seconds")
METRICS = {
    "per": "PER, %",
    "wer": "WER, %",
    "slot_type_f1": "F1, %",
    "slot_value_cer": "CER, %",
    "eer": "EER, %",
    "min_dcf": "minDCF",
    "der": "DER, %",
    "mtwv": "MTWV, %",
    "accuracy": "accuracy, %",
    "accuracy_speech": "accuracy in speech, %",
}


def column(key: str) -> StudyColumn:
    """Find the column of a key; ``TASK/METRIC`` keys have two decimals, and for errors low is better.

    ``TASK/METRIC@SET`` is the metric on another test set than the task's first.
    """
    if key in COLUMNS:
        return COLUMNS[key]
    if key.startswith("val_layer_"):
        return StudyColumn(f"Dev loss of layer {key.removeprefix('val_layer_')}", show_loss, "low")
    key, _, test = key.partition("@")
    task, _, metric = key.partition("/")
    plain = metric.removesuffix("_fixed").removesuffix("_legacy")  # both ways of decoding
    title = METRICS.get(plain, plain) + "".join(
        f" ({way})" for way in ("fixed", "legacy") if metric.endswith(f"_{way}")
    )
    if test:
        per_cent = ", %" if title.endswith(", %") else ""
        title = f"{title.removesuffix(', %')} ({test}){per_cent}"
    return StudyColumn(f"{task_title(task)} {title}", fixed(2), "low" if plain.endswith(("er", "dcf")) else "high")


def is_loss(key: str) -> bool:
    """Whether a column has values of a distillation loss."""
    return key in ("val_output", "final_loss") or key.startswith("val_layer_")


def incomparable(report: dict[str, Any], key: str) -> Sequence[str]:
    """List the rows whose losses are another function than the baseline's, or whose seconds are of another machine."""
    kind = "other_losses" if is_loss(key) else "other_seconds" if key in SECONDS else None
    return report.get(kind, ()) if kind else ()


def task_title(task: str) -> str:
    """Make the title of a task, such as ``PR``, ``PR probe`` or ``Frame probe``; probes are marked."""
    name, _, probe = task.partition("_")
    return f"{'Frame' if name == 'frames' else name.upper()} {probe}".rstrip()


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Select the numbers by seed, without gaps."""
    return {seed: value for seed, value in values.items() if not isinstance(value, str)}


def result_grid(report: dict[str, Any]) -> Grid:
    """Make the table of the study's rows, measured references and published rows; the study's best is bold."""
    columns = report["columns"]
    best = {key: _best(report, key) for key in columns}
    rows = [
        (Cell(row["label"]), *(value_cell(report["values"][row["name"]][key], key, row["name"] in best[key])
                               for key in columns))
        for row in report["rows"]
    ]  # fmt: skip
    listed = [
        (Cell(row["label"]), *(_plain(row["values"].get(key), key) for key in columns))
        for row in report["measured_references"]
    ]
    published = [
        (Cell(_published_label(row)), *(_plain(row["values"].get(key), key) for key in columns))
        for row in report["references"]
        if any(key in row["values"] for key in columns if "/" in key)
    ]
    breaks = tuple(at for at, group in ((len(rows), listed), (len(rows) + len(listed), published)) if group)
    return Grid(("System", *(column(key).title for key in columns)), (*rows, *listed, *published), breaks)


def published_grid(report: dict[str, Any]) -> Grid | None:
    """Make a table of published rows in their own columns; None if they share a metric with the study."""
    if not report["references"] or any(
        "/" in key and key in row["values"] for row in report["references"] for key in report["columns"]
    ):
        return None
    keys = list(dict.fromkeys(key for row in report["references"] for key in row["values"]))
    rows = [
        (Cell(_published_label(row)), *(_plain(row["values"].get(key), key) for key in keys))
        for row in report["references"]
    ]
    return Grid(("System", *(column(key).title for key in keys)), tuple(rows))


def _published_label(row: dict[str, Any]) -> str:
    return f"{row['label']}{', ' + row['schedule'] if row.get('schedule') else ''} (published)"


def _plain(value: float | None, key: str) -> Cell:
    return Cell(DASH, missing=True) if value is None else Cell(column(key).show(value))


def value_cell(values: dict[str, Any], key: str, bold: bool = False) -> Cell:
    """Show mean and standard deviation of a row over seeds, with their number if some are missing."""
    found = list(numbers(values).values())
    if not found:
        return Cell("failed") if "failed" in values.values() else Cell(DASH, missing=True)
    text = column(key).show(statistics.fmean(found))
    if len(found) > 1:
        text += f" {PLUS_MINUS} {_spread(statistics.stdev(found), text, column(key))}"
    if len(found) < len(values):
        text += f" ({len(found)} of {len(values)})"
    return Cell(text, bold)


def _spread(deviation: float, mean: str, shown: StudyColumn) -> str:
    """Format a deviation with as many decimals as the mean, if the mean is a plain number."""
    plain = mean.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
    return f"{deviation / shown.unit:.{len(mean.partition('.')[2])}f}" if plain else shown.show(deviation)


def _best(report: dict[str, Any], key: str) -> set[str]:
    """Find the rows whose mean is best; none without a better direction or with numbers in only one row.

    Means over other seeds do not compare, so only rows with the most seeds are candidates. No loss is best if rows have
    other functions as loss, no seconds are if they are of other machines, and a student that was not trained is best in
    nothing.
    """
    if incomparable(report, key):
        return set()
    trained = [name for name in report["values"] if name not in report.get("untrained", ())]
    found = {name: each for name in trained if (each := numbers(report["values"][name][key]))}
    most = max(map(len, found.values()), default=0)
    means = {name: statistics.fmean(each.values()) for name, each in found.items() if len(each) == most}
    better = column(key).better
    if better is None or len(means) < 2:
        return set()
    target = min(means.values()) if better == "low" else max(means.values())
    return {name for name, mean in means.items() if math.isclose(mean, target, rel_tol=1e-9)}


@dataclass(frozen=True)
class Difference:
    """Row minus baseline over the seeds that both have; the interval is None with fewer than three."""

    seeds: int
    mean: float | None
    low: float | None = None
    high: float | None = None


def paired(row: dict[str, Any], reference: dict[str, Any]) -> list[float]:
    """Compute row minus reference for every seed that both have."""
    own, other = numbers(row), numbers(reference)
    return [own[seed] - other[seed] for seed in own if seed in other]


def student_interval(differences: Sequence[float], error: float = ERROR) -> tuple[float, float]:
    """Compute an interval that misses the true mean with probability ``error``, from two numbers or more."""
    from scipy.stats import t as student

    count, mean = len(differences), statistics.fmean(differences)
    reach = float(student.ppf(1 - error / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean - reach, mean + reach


def paired_difference(row: dict[str, Any], baseline: dict[str, Any]) -> Difference:
    """Compute the mean difference and its 95 % interval of Student's t over seeds."""
    differences = paired(row, baseline)
    if not differences:
        return Difference(0, None)
    interval = student_interval(differences) if len(differences) >= FEWEST_SEEDS else (None, None)
    return Difference(len(differences), statistics.fmean(differences), *interval)


def baseline_difference(report: dict[str, Any], row: str, key: str) -> Difference:
    """Compute `paired_difference` of a row to the baseline; none where the two do not compare."""
    if row in incomparable(report, key):
        return Difference(0, None)
    return paired_difference(report["values"][row][key], report["values"][report["baseline"]][key])


def difference_columns(report: dict[str, Any]) -> list[str]:
    """List the columns in which a difference to the baseline is meaningful."""
    return [key for key in report["columns"] if column(key).better and key not in ("speed_up", "student_speed_up")]


def difference_grid(report: dict[str, Any]) -> Grid | None:
    """Make the table of paired differences of every row to the baseline; None without a baseline."""
    baseline = report["baseline"]
    if baseline not in report["values"]:
        return None
    keys = difference_columns(report)
    rows = [
        (Cell(row["label"]), *(difference_cell(report, row["name"], key) for key in keys))
        for row in report["rows"]
        if row["name"] != baseline
    ]
    return Grid(("System", *(column(key).title for key in keys)), tuple(rows)) if rows and keys else None


def difference_cell(report: dict[str, Any], row: str, key: str) -> Cell:
    """Show the mean difference of a row to the baseline with its interval, bold if that excludes zero."""
    found = baseline_difference(report, row, key)
    if found.mean is None:
        return Cell(DASH, missing=True)
    if found.low is None or found.high is None:
        return Cell(signed(found.mean, key))
    text = f"{signed(found.mean, key)} [{signed(found.low, key)}, {signed(found.high, key)}]"
    return Cell(text, bold=found.low > 0 or found.high < 0)


def difference_note(report: dict[str, Any]) -> str:
    """Explain the table of differences; one sentence covers all differences without an interval."""
    found = [
        baseline_difference(report, row["name"], key)
        for row in report["rows"]
        if row["name"] != report["baseline"]
        for key in difference_columns(report)
    ]
    notes = ["Row minus baseline over the same seeds."]
    notes += [INTERVAL_NOTE] if any(each.low is not None for each in found) else []
    notes += [NO_INTERVAL_NOTE] if any(each.mean is not None and each.low is None for each in found) else []
    return " ".join(notes)


def signed(number: float, key: str) -> str:
    """Format a difference in the column of a key, with its sign."""
    return ("+" if number >= 0 else "-") + column(key).show(abs(number))


def few_seeds(report: dict[str, Any]) -> str | None:
    """Warn if too few seeds have run, of all rows or of some, else return None."""
    most = {
        row["label"]: max(len(numbers(values)) for values in report["values"][row["name"]].values())
        for row in report["rows"]
        if report["values"][row["name"]] and row["name"] not in report.get("untrained", ())
    }
    few = {label: count for label, count in most.items() if 0 < count < FEWEST_SEEDS}
    seeds = max(most.values(), default=0)
    if seeds < FEWEST_SEEDS:
        return (
            f"There {'is 1 seed' if seeds == 1 else f'are {seeds} seeds'} per row: nothing can be concluded about "
            f"differences between rows. At least {FEWEST_SEEDS} seeds are needed for an interval."
        )
    if not few:
        return None
    return (
        f"Rows with fewer than {FEWEST_SEEDS} seeds, of which nothing can be concluded: {'; '.join(few)}. Their means "
        "do not compare with those over more seeds; the paired differences are over the seeds that both rows have."
    )


def long_rows(report: dict[str, Any]) -> Sequence[Sequence[Any]]:
    """List a header and one line per row, column and seed, for CSV."""
    lines: list[Sequence[Any]] = [("row", "label", "source", "column", "seed", "value", "status")]
    for row in report["rows"]:
        for key, values in report["values"][row["name"]].items():
            for seed, value in values.items():
                gap = isinstance(value, str)
                lines.append(
                    (row["name"], row["label"], "measured", key, seed, "" if gap else value, value if gap else "done")
                )
    for source, rows in (("reference", report["measured_references"]), ("published", report["references"])):
        for row in rows:
            for key, value in row["values"].items():
                lines.append((row.get("name", row["label"]), row["label"], source, key, "", value, "done"))
    return lines
