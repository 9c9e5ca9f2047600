"""Single runs: what pictures need of each, and a study of one seed made of run folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from experiments.records.reading import RunLog, read_run, run_record
from experiments.records.runs import RunFolder
from experiments.report.looks import Look
from experiments.report.study_reading import StudyFolder, study_folder

Matrix = list[list[float]]
COLUMNS = ["parameters", "final_loss", "val_output", "train_seconds", "mean_depth"]


@dataclass(frozen=True)
class ReportRun:
    """One trained system of a report.

    Attributes:
        label: name of the system in tables and plots, unique in the report.
        look: how it is drawn.
        layer_weights: softmax weights of a probe over the hidden states, index 0 = input of layer 1.
        similarity: name of a comparison -> matrix; row i = student layer i + 1, column j = layer j + 1 of the model
            that it is compared with. The same names over all runs make the rows of heat maps comparable.
        flops_by_stage: FLOPs from the start to the end of each stage, if they are known.
    """

    label: str
    look: Look
    layer_weights: list[float] | None = None
    similarity: dict[str, Matrix] = field(default_factory=dict)
    flops_by_stage: tuple[float, ...] = ()


Pair = tuple[ReportRun, RunLog]


def study_of_runs(folders: Sequence[Path], command: str) -> StudyFolder:
    """Make a study with one row for each run folder; the first finished run of policy ``none`` is its baseline.

    Raises:
        InputError: two folders have the same name, or one does not exist or cannot be read.
    """
    names = [folder.absolute().name for folder in folders]  # the name of a link, not of its target
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{names.count(repeated[0])} run folders have the name {repeated[0]}: rename one of them")
    logs = dict(zip(names, map(read_run, folders), strict=True))
    commits = {name: RunFolder(folder).commit for name, folder in zip(names, folders, strict=True)}
    full = next((name for name, log in logs.items() if log.finished and log.policy == "none"), None)
    notes = ["One run per system: nothing can be concluded about differences between systems."]
    notes += [f"{name} has not finished, its row is incomplete." for name, log in logs.items() if not log.finished]
    if full is None:
        notes.append("No speed-up is given, since none of the runs is a finished one without growth (policy none).")
    study = {
        "name": "runs",
        "title": "Comparison of runs",
        "rows": [{"name": name, "label": _label(name, log), "overrides": _settings(log)} for name, log in logs.items()],
        "seeds": [0],  # the runs may have different ones
        "run_seeds": sorted({log.seed for log in logs.values() if log.seed is not None}),
        "columns": [*COLUMNS, *(["speed_up"] if full else [])],
        "baseline": full,
        "notes": notes,
        "command": command,
        "commit": ", ".join(sorted({commit for commit in commits.values() if commit})),
        "hardware": "; ".join(sorted({str(log.hardware) for log in logs.values() if log.hardware})),
    }
    jobs = [
        {"id": name, "kind": "distil", "row": name, "seed": 0, "status": "done", "result": result}
        for name, folder in zip(names, folders, strict=True)
        for result in [{**_measured(logs[name]), **run_record(folder), "run": name, "commit": commits[name]}]
    ]
    return study_folder(folders[0].resolve().parent, {"study": study, "jobs": jobs})


def _label(name: str, log: RunLog) -> str:
    details = [log.policy, log.schedule if log.policy != "none" else None]
    return f"{name} ({', '.join(filter(None, details))})" if any(details) else name


def _settings(log: RunLog) -> dict[str, Any]:
    """Settings that decide how a row looks."""
    return {f"growth.{key}": value for key in ("policy", "schedule") if (value := getattr(log, key)) is not None}


def _measured(log: RunLog) -> dict[str, Any]:
    """Numbers of the columns; a number that is not known is left out, one that is not finite stays."""
    values = {
        "parameters": log.parameters,
        "final_loss": log.train_loss,
        "val_output": log.val_output,
        "train_seconds": log.train_seconds,
        "mean_depth": log.mean_depth(),
        "hardware": log.hardware,
    }
    return {key: value for key, value in values.items() if value is not None}
