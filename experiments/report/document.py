"""Content of a report, without its form: rows, notes and footnotes, also as JSON.

`Report` is the only source of every table. It can be written to and read from JSON without loss, so the tables of any
report can be made again from its ``report.json`` alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from datamodules.files import finite
from experiments.records.reading import RunLog, read_run
from experiments.report.tables import (
    DASH,
    PUBLISHED,
    PublishedRow,
    ResultRow,
)

FORMAT = 1
MINIATURE = (
    "This is a miniature: small models, a few minutes of synthetic speech, one seed per system. "
    "Differences between systems may be noise, and their ordering here cannot show the paper's ordering.",
    "What it does show is that every part works end to end, and what growing costs and saves in seconds.",
)
COLUMN_NOTES = (
    "PER: phone error rate of a small linear CTC probe on the frozen student, in percent, lower is better.",
    "Train loss: the whole distillation loss, mean of the last epoch; it compares only between systems with the same "
    "objective. Dev output loss: the part that all systems share, on held-out speakers.",
    "Training, s: wall-clock seconds of training, without validation and checkpoints. "
    "Speed-up: training seconds of the Full row of this report divided by those of the row.",
    "Mean depth: layers of the student averaged over optimizer steps.",
)
PUBLISHED_NOTE = (
    "Published, full-scale SUPERB results (960 h of LibriSpeech, HuBERT Base as teacher), quoted from "
    "the paper and the SUPERB leaderboard. They were not measured here and do not compare with the table "
    "above."
)
REAL_THING = (
    "The paper's recipe needs LibriSpeech (960 h, under DIR) and the weights of HuBERT Base, which are "
    "downloaded on first use:"
)
Matrix = list[list[float]]


@dataclass(frozen=True)
class ReportRun:
    """One trained system of a report.

    Attributes:
        folder: run folder with ``summary.json``, ``growth.json`` and ``metrics.csv``.
        label: name of the system in tables and plots, unique in the report.
        per: phone error rate in percent, or None without a probe.
        layer_weights: softmax weights of the probe over the hidden states, index 0 = input of layer 1.
        similarity: name of a comparison -> matrix; row i = student layer i + 1, column j = layer j + 1 of the model
            that it is compared with. The same names over all runs make the rows of heat maps comparable.
        flops_by_stage: FLOPs from the start to the end of each stage, if they are known.
    """

    folder: Path
    label: str
    per: float | None = None
    layer_weights: list[float] | None = None
    similarity: dict[str, Matrix] = field(default_factory=dict)
    flops_by_stage: tuple[float, ...] = ()


@dataclass(frozen=True)
class ReferenceRow:
    """A model that was not distilled here: the teacher, the untrained student. ``per`` in percent."""

    label: str
    per: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class ReportNotes:
    """Facts needed to judge the numbers and to make them again; ``versions`` maps package to version."""

    title: str
    command: str
    commit: str
    hardware: str
    versions: dict[str, str]
    data: str = ""
    caveats: tuple[str, ...] = MINIATURE
    real_command: str = "interstack fit --config interleave_equal --data.root DIR"


@dataclass(frozen=True)
class Report:
    """Content of the tables and texts of one report, in plain values without NaN."""

    notes: ReportNotes
    rows: tuple[ResultRow, ...]
    footnotes: tuple[str, ...]
    published: tuple[PublishedRow, ...] = PUBLISHED
    runs: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> str:
        """Write JSON text, with the number of its format."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read the report that `to_json` wrote.

        Raises:
            InputError: the format number is another one.
        """
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise InputError(f"report format is {values.get('format')!r}; this version reads format {FORMAT}")
        notes = values["notes"] | {"caveats": tuple(values["notes"]["caveats"])}
        return cls(
            notes=ReportNotes(**notes),
            rows=tuple(ResultRow(**row) for row in values["rows"]),
            footnotes=tuple(values["footnotes"]),
            published=tuple(PublishedRow(**row) for row in values["published"]),
            runs=tuple(values["runs"]),
        )


Pair = tuple[ReportRun, RunLog]


def read_runs(runs: Sequence[ReportRun]) -> list[Pair]:
    """Read the folder of each run.

    Raises:
        InputError: two runs share a label, or a folder cannot be read.
    """
    labels = [run.label for run in runs]
    doubled = sorted({label for label in labels if labels.count(label) > 1})
    if doubled:
        raise InputError(f"label {doubled[0]!r} names {labels.count(doubled[0])} runs; labels must be unique")
    return [(run, read_run(run.folder)) for run in runs]


def assemble(pairs: Sequence[Pair], references: Sequence[ReferenceRow], notes: ReportNotes) -> Report:
    """Make the rows, and footnotes on missing values; the first run with policy ``none`` is Full."""
    full = next((log for _, log in pairs if log.policy == "none"), None)
    measured = [_measured_row(run, log, full) for run, log in pairs]
    listed = [ResultRow(row.label, parameters=row.parameters, per=row.per) for row in references]
    footnotes = _footnotes(pairs, [*measured, *listed], full)
    return Report(
        notes=notes,
        rows=tuple(ResultRow(**finite(asdict(row))) for row in [*measured, *listed]),
        footnotes=tuple(footnotes),
        runs=tuple(finite(_details(run, log)) for run, log in pairs),
    )


def _measured_row(run: ReportRun, log: RunLog, full: RunLog | None) -> ResultRow:
    row = ResultRow(
        system=run.label,
        policy=log.policy,
        schedule=log.schedule if log.policy != "none" else None,
        parameters=log.parameters,
        per=run.per,
        train_loss=log.train_loss,
        val_output=log.val_output,
        train_seconds=log.train_seconds,
        mean_depth=log.mean_depth(),
    )
    if full is None or not full.train_seconds or not log.train_seconds:
        return row
    return replace(row, speed_up=full.train_seconds / log.train_seconds)


def _footnotes(pairs: Sequence[Pair], rows: Sequence[ResultRow], full: RunLog | None) -> list[str]:
    notes = [f"{run.label}: the run has not finished, its row is incomplete." for run, log in pairs if not log.finished]
    for row in rows:
        broken = [name for name, value in asdict(row).items() if value is not None and finite(value) is None]
        if broken:
            notes.append(f"{row.system}: {', '.join(broken)} came out as NaN or infinite; the run diverged.")
    if pairs and (full is None or not full.train_seconds):
        notes.append("No speed-up is given, as this report has no finished Full row (policy none).")
    if len({json.dumps(log.hardware, sort_keys=True) for _, log in pairs if log.finished}) > 1:
        notes.append("The runs were made on different hardware, so seconds and speed-ups do not compare.")
    if any(value is None for row in rows for value in finite(asdict(row)).values()):
        notes.append(
            f"A dash ({DASH}) means that there is no such value: the system does not grow, was not trained "
            "or not probed here, or a line above says why."
        )
    return notes


def _details(run: ReportRun, log: RunLog) -> dict[str, Any]:
    """Collect the values of a run that JSON keeps beside its row."""
    return {
        "label": run.label,
        "folder": str(run.folder),
        "seed": log.seed,
        "steps": log.steps,
        "growth": [asdict(mark) | {"ancestry": list(mark.ancestry), "plan": list(mark.plan)} for mark in log.growth],
        "layer_weights": run.layer_weights,
        "similarity": run.similarity,
    }


def provenance(notes: ReportNotes) -> list[tuple[str, str]]:
    """List (name, value) of the facts needed to make the report again; unknown ones are left out."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(notes.versions.items()))
    lines = [
        ("Command", notes.command),
        ("Commit", notes.commit),
        ("Hardware", notes.hardware),
        ("Versions", versions),
        ("Data", notes.data),
    ]
    return [(name, value) for name, value in lines if value]
