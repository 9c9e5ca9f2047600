"""``interstack bench scaling``: time per step against number of processes, utterance length, depth and batch size."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.errors import InputError
from datamodules.files import read_json, write_json
from experiments.bench.command import switches
from experiments.bench.made import earlier
from experiments.records.runs import git_commit
from lightning_modules.student_config import StudentConfig


@dataclass(frozen=True)
class Point:
    """One step size; ``batch_size`` is per process."""

    processes: int = 1
    seconds: float = 5.0
    depth: int = 12
    batch_size: int = 4


def bench_scaling(
    processes: list[int] | None = None,
    seconds: list[float] | None = None,
    depths: list[int] | None = None,
    batch_sizes: list[int] | None = None,
    rounds: int = 5,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    student: StudentConfig | None = None,
    teacher: str | None = None,
    teacher_precision: Literal["auto", "32", "bf16"] = "auto",
    teacher_compile: bool = False,
    output: str | None = None,
) -> None:
    """Vary one size of a step at a time around 1 process x 4 utterances x 5 s at depth 12; print a table, write JSON.

    On a GPU the sizes vary around 16 utterances x 15 s, because a GPU computes smaller steps faster than the host
    submits them. Each point is a separate `interstack bench`, whose processes torch.distributed.run starts.

    Args:
        processes: numbers of processes to try; default: 1 and 2, on a machine with a single GPU only 1. More processes
            mean a larger batch, because each has batch_size utterances.
        seconds: utterance lengths to try; default: 2.5, 5 and 10, on a GPU 5, 10 and 15.
        depths: depths of the student to try; default: 3, 6, 9 and 12.
        batch_sizes: numbers of utterances per process to try; default: 1, 2, 4 and 8, on a GPU 4, 8, 16 and 32.
        rounds: counted turns of every point.
        accelerator: cpu, gpu or auto.
        precision: precision of the trainer.
        student: sizes and switches of the student, as in `interstack bench`; default: the paper's.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        teacher_precision: precision of the teacher, as in `interstack bench`.
        teacher_compile: compile the teacher too, as in `interstack bench`.
        output: JSON file to write after every point. Points of an existing file with the same commit and settings are
            kept; failed ones are tried again.

    Raises:
        InputError: some points failed; raised at the end, with the errors in the table and in the file.
    """
    common = ["--rounds", str(rounds), "--accelerator", accelerator, "--precision", precision]
    common += ["--student", json.dumps(asdict(student or StudentConfig()))]
    common += ["--teacher_precision", teacher_precision, "--teacher_compile", json.dumps(teacher_compile)]
    common += ["--teacher", teacher] if teacher else []
    settings = {"commit": git_commit(), "precision": precision, "options": common}
    gpus = torch.cuda.device_count() if accelerator != "cpu" else 0
    usual = Point(seconds=15.0, batch_size=16) if gpus else Point()
    axes: dict[str, list[Any]] = {
        "processes": processes or default_processes(gpus),
        "seconds": seconds or ([5.0, 10.0, 15.0] if gpus else [2.5, 5.0, 10.0]),
        "depth": depths or [3, 6, 9, 12],
        "batch_size": batch_sizes or ([4, 8, 16, 32] if gpus else [1, 2, 4, 8]),
    }
    path = None if output is None else Path(output)
    known = known_points(earlier(path, settings))
    result: dict[str, Any] = {**settings, "points": []}
    for axis, point in points(axes, usual):
        if point not in known:
            known[point] = measure_or_error(point, common)
        result["points"].append({"axis": axis, **asdict(point), **known[point]})
        if path is not None:
            write_json(path, result)
    print(table(result))
    if failed := sum("error" in measured for measured in known.values()):
        raise InputError(f"{failed} of {len(known)} points failed: see the table")


def default_processes(gpus: int) -> list[int]:
    """One and two processes, or one on a machine with a single GPU; processes can share a CPU."""
    return [1] if gpus == 1 else [1, 2]


def known_points(result: Mapping[str, Any] | None) -> dict[Point, dict[str, Any]]:
    """Collect the measurements of an earlier file, except of points that failed."""
    sizes = [each.name for each in fields(Point)]
    return {
        Point(**{name: row[name] for name in sizes}): {k: v for k, v in row.items() if k not in ("axis", *sizes)}
        for row in (result or {"points": []})["points"]
        if "error" not in row
    }


def measure_or_error(point: Point, common: list[str]) -> dict[str, Any]:
    """Measure a point or return its error, so that a point that does not fit the memory does not stop the others."""
    try:
        return measure(point, common)
    except InputError as error:
        return {"error": str(error)}


def points(axes: Mapping[str, list[Any]], usual: Point) -> Iterator[tuple[str, Point]]:
    """Yield (axis, point) for every value of every axis; the other sizes are the usual ones."""
    for axis, values in axes.items():
        for value in values:
            yield axis, replace(usual, **{axis: value})


def measure(point: Point, common: list[str]) -> dict[str, Any]:
    """Run ``interstack bench`` on one point and return its numbers.

    Raises:
        InputError: the benchmark failed; the message has its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(point.processes), "-m", "experiments.cli", "bench", *common]
        command += ["--depths", f"[{point.depth}]", "--batch_size", str(point.batch_size)]
        command += ["--seconds", str(point.seconds), "--output", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if re.match(r"interstack: |[\w.]+Error: ", line)] or lines[-10:]
            raise InputError(f"the benchmark of {point} failed: " + "\n".join(said))
        result = read_json(path)
    (row,) = result["depths"]
    rest = ("setting", "depths", "growth", "commit")
    return {key: value for key, value in result.items() if key not in rest} | {
        key: row[key] for key in ("step_ms", "spread_ms", "audio_s_per_s")
    }


def table(result: Mapping[str, Any]) -> str:
    """Format the result as a Markdown table with lines on the settings."""
    lines = ["| varied | processes | batch x seconds | depth | ms per step | quartiles | audio s/s |", "|---" * 7 + "|"]
    for point in result["points"]:
        cells = [point["axis"], point["processes"], f"{point['batch_size']} x {point['seconds']:g}", point["depth"]]
        if "error" in point:
            cells += ["failed", "-", "-"]
        else:
            cells += [f"{point['step_ms']:.0f}", f"{point['spread_ms']:.0f}", f"{point['audio_s_per_s']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    measured = [point for point in result["points"] if "error" not in point]
    made = dict.fromkeys(f"{point['hardware']}; {switches(point)}" for point in measured)
    errors = dict.fromkeys(point["error"] for point in result["points"] if "error" in point)
    return "\n".join([*lines, "", *errors, *made, f"{result['precision']}; commit {result['commit']}"])
