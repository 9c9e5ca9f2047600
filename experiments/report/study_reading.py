"""Read the folder of a study, or its ``results.json``, which holds everything that a report needs."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from datamodules.errors import InputError
from datamodules.files import json_text, read_json
from experiments.records.reading import RunLog, recorded_run, run_record

RATIOS = {"speed_up": "train_seconds", "student_speed_up": "student_seconds", "flops_ratio": "flops"}
MATCHED = {"train_seconds": "training seconds", "flops": "FLOPs"}
MISSING, FAILED = "missing", "failed"
MATRICES = ("cka", "cosine", "cka_teacher")
MUST_AGREE = ("hardware", "commit")
"""Facts that must agree between two runs before their seconds are divided by each other."""


@dataclass(frozen=True)
class StudyJob:
    """One job; ``status`` is done, failed or planned, and ``result`` is empty unless it is done."""

    kind: str
    row: str
    seed: int | None
    task: str | None
    status: str
    log: str
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyFolder:
    """A study; ``path`` is the folder of its runs, ``study`` and ``results`` are the contents of their JSON files."""

    path: Path
    study: dict[str, Any]
    jobs: tuple[StudyJob, ...]
    results: dict[str, Any]

    def of(self, kind: str, row: str | None = None) -> list[StudyJob]:
        """List the jobs of a kind (and row), by seed."""
        found = [job for job in self.jobs if job.kind == kind and row in (None, job.row)]
        return sorted(found, key=lambda job: job.seed or 0)

    def run_log(self, job: StudyJob) -> RunLog | None:
        """Build the run of a ``distil`` job; None if the job is not done or its curves are not known."""
        return recorded_run(self.path / job.result["run"], job.result) if "curves" in job.result else None


def read_study(path: Path) -> StudyFolder:
    """Read a study of any state of completion.

    Args:
        path: folder of ``interstack reproduce``, or a ``results.json`` of one.

    Raises:
        InputError: the folder has no ``study.json``, or the file is of another kind or cannot be read.
    """
    return study_folder(path.parent if path.is_file() else path, study_results(path))


def study_folder(path: Path, results: dict[str, Any]) -> StudyFolder:
    """Build a study from the content of ``results.json``; ``path`` is the folder of its runs."""
    return StudyFolder(path, results["study"], tuple(map(_job, results["jobs"])), results)


def study_results(path: Path) -> dict[str, Any]:
    """Collect what a report or another machine needs of a study: ``study``, and ``jobs``, each with its ``result``.

    Args:
        path: folder of ``interstack reproduce``, or a ``results.json``, which has exactly this content.

    Raises:
        InputError: as for `read_study`.
    """
    if path.is_file():
        return read_results(path)
    if not (path / "study.json").is_file():
        raise InputError(f"{path} holds no study.json: give the --output folder of `interstack reproduce`")
    study = read_json(path / "study.json")
    folders = [path / "jobs" / name for name in study.get("jobs") or []] or sorted((path / "jobs").glob("*"))
    return {"study": study, "jobs": [_entry(folder) for folder in folders if (folder / "job.json").is_file()]}


def results_text(results: Mapping[str, Any]) -> str:
    """``results.json``, a line for each job."""
    jobs = ",\n".join(json_text(job, None).rstrip() for job in results["jobs"])
    return f'{{"study": {json_text(results["study"], None).rstrip()},\n"jobs": [\n{jobs}\n]}}\n'


def read_results(path: Path) -> dict[str, Any]:
    """Read a ``results.json``.

    Raises:
        InputError: the file is missing or of another kind.
    """
    found = read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or not found.keys() >= {"study", "jobs"}:
        raise InputError(f"{path} is no results.json of `interstack reproduce`")
    return found


def _entry(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "job.json")
    done = record.get("status") == "done" and (folder / "result.json").is_file()
    result = read_json(folder / "result.json") if done else None
    if result and result.get("run") and "curves" not in result:  # written by an older version
        run = folder.parent.parent / result["run"]
        result |= run_record(run) if run.is_dir() else {}
    known = ("id", "kind", "row", "seed", "task", "status", "seconds", "log")
    kept = {key: record[key] for key in known if key in record}
    return {"id": folder.name} | kept | {"result": None if result is None else _slim(result)}


def _slim(result: dict[str, Any]) -> dict[str, Any]:
    """Drop what no report needs: settings, similarity of earlier stages, and the student's place on this machine."""
    slim = _without(result, ("config", "versions", "upstream"))
    slim |= {key: np.round(slim[key], 4).tolist() for key in MATRICES if key in slim}
    if "cka" in slim and "runs" in slim:
        slim["runs"] = [
            run | {"stages": [_without(stage, MATRICES) for stage in run["stages"]]} for run in slim["runs"]
        ]
    return slim


def _without(mapping: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _job(entry: Mapping[str, Any]) -> StudyJob:
    result, unfinished = entry["result"], "failed" if entry.get("status") == "failed" else "planned"
    return StudyJob(
        kind=entry["kind"],
        row=entry.get("row") or "",
        seed=entry.get("seed"),
        task=entry.get("task") or (result or {}).get("task"),
        status=unfinished if result is None else "done",
        log=entry.get("log") or f"jobs/{entry['id']}/log.txt",
        result=result or {},
    )


Values = dict[str, dict[str, dict[str, float | str]]]  # row -> column -> seed -> number, "failed" or "missing"


def cell_values(folder: StudyFolder, rows: Sequence[str], columns: Sequence[str]) -> Values:
    """Collect every cell of the study; cells without a finite number are ``failed`` or ``missing``."""
    values: Values = {row: {column: {} for column in columns} for row in rows}
    for row in rows:
        for column in columns:
            for seed in folder.study["seeds"]:
                values[row][column][str(seed)] = _value(folder, row, column, seed)
    return values


def _value(folder: StudyFolder, row: str, column: str, seed: int) -> float | str:
    if column in RATIOS:
        return _ratio(folder, row, column, seed)
    task, slash, _ = column.partition("/")
    kind = "evaluate" if slash else "distil"
    jobs = [job for job in folder.of(kind, row) if job.seed == seed and (not slash or job.task == task)]
    result, name = (scores(jobs[0], column) if slash else (jobs[0].result, column)) if jobs else ({}, column)
    number = result.get(name)
    if isinstance(number, int | float) and math.isfinite(number):
        return float(number)
    upstream = [job for job in folder.jobs if job.row == row and job.seed == seed and job.kind in ("distil", "export")]
    broken = any(job.status == "failed" for job in [*jobs, *upstream])
    return FAILED if broken or name in result else MISSING


def scores(job: StudyJob, column: str) -> tuple[dict[str, Any], str]:
    """Select an evaluation's metrics on the test set of ``TASK/METRIC@SET``, or on the first; and name the metric."""
    metric, at, name = column.partition("/")[2].partition("@")
    return (job.result.get("tests", {}).get(name, {}) if at else job.result.get("metrics", {})), metric


def _ratio(folder: StudyFolder, row: str, column: str, seed: int) -> float | str:
    """Divide baseline by row for speed-ups, row by baseline for FLOPs, always with the same seed.

    Seconds of different hardware or code are not divided by each other.
    """
    baseline = folder.study.get("baseline")
    if column != "flops_ratio" and baseline and _differing(folder, [row, baseline], seed):
        return MISSING
    own = _value(folder, row, RATIOS[column], seed)
    reference = _value(folder, baseline, RATIOS[column], seed) if baseline else MISSING
    if isinstance(own, str):
        return own
    if isinstance(reference, str) or not own or not reference:
        return MISSING
    return own / reference if column == "flops_ratio" else reference / own


def _differing(folder: StudyFolder, rows: Sequence[str], seed: int) -> bool:
    """Whether the seconds of these rows cannot be compared."""
    results = [job.result for row in rows for job in folder.of("distil", row) if job.seed == seed and job.result]
    # Seconds of students that were trained side by side differ from those of separate runs.
    return len({(*(result.get(key) for key in MUST_AGREE), result.get("students", 1)) for result in results}) > 1


def other_seconds(folder: StudyFolder) -> list[str]:
    """List the rows whose seconds cannot be compared with those of the baseline row, or without one of the first."""
    rows = [row["name"] for row in folder.study["rows"]]
    baseline = folder.study.get("baseline") or rows[0]
    return [row for row in rows if any(_differing(folder, [row, baseline], seed) for seed in folder.study["seeds"])]


def default_columns(folder: StudyFolder) -> list[str]:
    """List every metric found (of two ways to decode only the main one), the output loss, and the cost.

    The output loss on held-out audio does not depend on the intermediate loss, unlike the train loss.
    """
    metrics = [(job.task, name) for job in folder.of("evaluate") for name in job.result.get("metrics", {})]
    found = {f"{task}/{name}": None for task, name in metrics if not name.endswith(("_fixed", "_legacy"))}
    cost = ["train_seconds", "speed_up", "student_speed_up", "flops_ratio", "peak_memory_bytes", "mean_depth"]
    return [*found, "val_output", *cost]


def matched_costs(folder: StudyFolder, labels: Mapping[str, str]) -> list[str]:
    """Write one line per row of equal cost: its share of the cost that it had to meet, as mean over seeds."""
    lines = []
    for row in folder.study["rows"]:
        if match := row.get("match"):
            name, target, cost = row["name"], match["target"], match["cost"]
            costs = cell_values(folder, [name, target], [cost])
            pairs = [
                (costs[name][cost][seed], costs[target][cost][seed])
                for seed in costs[name][cost]
                if cost == "flops" or not _differing(folder, [name, target], int(seed))
            ]
            met = [own / aim for own, aim in pairs if not isinstance(own, str) and not isinstance(aim, str)]
            if met:
                lines.append(
                    f"{labels[name]}: took {100 * fmean(met):.0f} % of the {MATCHED[cost]} of {labels[target]}."
                )
    return lines


def failures(folder: StudyFolder, labels: Mapping[str, str]) -> list[str]:
    """Write one line per failed job, with its log."""
    return [
        f"{labels.get(job.row, job.row) or job.kind}, seed {job.seed}: {job.kind}"
        f"{f' ({job.task})' if job.task else ''} failed, see {job.log}"
        for job in folder.jobs
        if job.status == "failed"
    ]


def loss_functions(folder: StudyFolder) -> dict[str, str]:
    """Find what the output loss of each row measures; results of older versions do not say it."""
    seen = {
        job.row: text
        for job in folder.of("distil")
        if (text := (job.result.get("summary") or {}).get("loss_function")) is not None
    }
    return {row["name"]: seen[row["name"]] for row in folder.study["rows"] if row["name"] in seen}


def other_losses(folder: StudyFolder) -> tuple[str, dict[str, str]]:
    """Find what the output loss of the baseline row measures, and the rows in which it measures something else.

    Without a baseline the first row of which it is known takes its place.
    """
    known = loss_functions(folder)
    own = known.get(folder.study.get("baseline") or next(iter(known), ""))
    return own or "", {row: text for row, text in known.items() if own is not None and text != own}


def disagreements(folder: StudyFolder) -> list[str]:
    """Say why losses or seconds of distillations are not comparable with each other, or with those of other studies."""
    notes = []
    own, others = other_losses(folder)
    if others:
        labels = {row["name"]: row.get("label") or row["name"] for row in folder.study["rows"]}
        rows = {text: [labels[row] for row in others if others[row] == text] for text in others.values()}
        named = " ".join(f"{'; '.join(names)}: {text}." for text, names in rows.items())
        notes.append(
            f"Losses of these rows are another function than those of the others ({own}), so they do not compare with "
            f"them. {named}"
        )
    if together := sorted({job.result.get("students", 1) for job in folder.of("distil")} - {1}):
        notes.append(
            f"Students were trained side by side ({' or '.join(map(str, together))} on a device; the teacher's seconds "
            "are in those of each): their seconds do not compare with runs on their own."
        )
    if resumed := [job for job in folder.of("distil") if job.result.get("attempts", 1) > 1]:
        runs = "; ".join(f"{job.row}, seed {job.seed}: {job.result['attempts']} attempts" for job in resumed)
        notes.append(
            f"Resumed runs ({runs}): their seconds include the first, slower steps of every attempt, and attempts on "
            "another machine than the last one's."
        )
    if len({repr(job.result.get("recordings")) for job in folder.of("similarity") if job.result}) > 1:
        notes.append(
            "The layers of some rows or seeds were compared on other recordings than those of others, so layer "
            "similarity and depth use do not compare between them."
        )
    for key in ("precision", "teacher_precision", "world_size"):
        seen = {str((job.result.get("summary") or {}).get(key)) for job in folder.of("distil") if job.result} - {"None"}
        if len(seen) > 1:
            notes.append(
                f"The runs differ in {key} ({'; '.join(sorted(seen))}), which may change scores as well as seconds."
            )
    for key in MUST_AGREE:
        seen = {str(job.result[key]) for job in folder.of("distil") if job.result.get(key)}
        if len(seen) > 1:
            notes.append(
                f"The runs differ in {key} ({'; '.join(sorted(seen))}): seconds do not compare, and no difference "
                "or speed-up is given across them."
            )
    return notes
