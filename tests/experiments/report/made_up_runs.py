"""Made-up run folders for the tests of the report."""

import json
from pathlib import Path
from typing import Any

from experiments.records.reading import read_run
from experiments.report.heat_maps import COMPARISONS
from experiments.report.looks import look_of
from experiments.report.runs import Pair, ReportRun

SUMMARY: dict[str, Any] = {
    "name": "run",
    "policy": "none",
    "schedule": "equal",
    "seed": 0,
    "steps": 40,
    "epochs": 4,
    "depth": 12,
    "parameters": 873_472,
    "train_seconds": 100.0,
    "train_loss": 0.148,
    "val_output": 0.1593,
    "audio_seconds": 640.0,
    "hardware": "2 CPU cores",
    "versions": {},
}


def write_run(folder: Path, stages: tuple[int, ...] = (12,), **changes: Any) -> Path:
    """A run of 40 steps and 100 s over ``stages`` of equal length; ``changes`` go to its summary."""
    folder.mkdir(parents=True)
    starts = [40 * index // len(stages) for index in range(len(stages))]
    events = [
        growth_event(depth_before=stages[index - 1], depth=stages[index], step=starts[index])
        for index in range(1, len(stages))
    ]
    (folder / "growth.json").write_text(json.dumps(events))
    lines = ["epoch,step,train/output,perf/train_seconds,val/loss"]
    lines += [f"{step // 10},{step},{1 / step},{2.5 * step}," for step in range(2, 41, 2)]
    lines += ["3,40,,,0.1593"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return folder


def growth_event(depth_before: int, depth: int, step: int) -> dict[str, Any]:
    return {
        "epoch": step // 10,
        "step": step,
        "policy": "interleaved",
        "plan": [],
        "ancestry": [layer * 3 // depth for layer in range(depth)],
        "depth_before": depth_before,
        "depth": depth,
        "parameters": 1,
        "seconds": 0.1,
        "loss_before": 0.2,
        "loss_after": 0.3,
        "train_seconds": 2.5 * step,
    }


def two_runs(folder: Path) -> list[Path]:
    """Folders of Full and InterleaveStack."""
    grown = {"policy": "interleaved", "train_seconds": 80.0, "train_loss": 0.0513, "val_output": 0.2}
    return [write_run(folder / "full"), write_run(folder / "interleave", (3, 6, 9, 12), **grown)]


def two_pairs(folder: Path) -> list[Pair]:
    """`two_runs` with everything that a picture can show."""
    matrix = [[1.0 if row == column else 0.4 for column in range(12)] for row in range(12)]
    shown: dict[str, Any] = {"layer_weights": [1 / 13] * 13, "similarity": {COMPARISONS["cka"]: matrix}}
    runs = two_runs(folder)
    return [(ReportRun(path.name.capitalize(), look_of({"name": path.name}), **shown), read_run(path)) for path in runs]
