"""Read the folder of a training run: ``summary.json``, ``growth.json`` and ``metrics.csv``.

An interrupted run lacks some of the files; missing values are None or empty here and a dash in the report.
A file that exists but cannot be read is an error that names it.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from callbacks.summary_record import Summary
from datamodules.errors import InputError
from datamodules.files import read_json, read_lines
from lightning_modules.growth.event import GrowthEvent

TRAIN_SECONDS = "perf/train_seconds"
CURVE_POINTS = 200


@dataclass(frozen=True)
class Series:
    """One logged metric: ascending optimizer steps (N,) int64 and values (N,) float64, which may be NaN."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class RunLog:
    """Content of a run folder; losses as logged, ``train_seconds`` without validation and checkpoints."""

    folder: Path
    finished: bool
    policy: str | None
    schedule: str | None
    seed: int | None
    steps: int | None
    depth: int | None
    parameters: int | None
    train_seconds: float | None
    train_loss: float | None
    val_output: float | None
    hardware: Any
    growth: tuple[GrowthEvent, ...]
    metrics: dict[str, Series]

    def series(self, name: str) -> Series:
        """Return the metric ``name``; an empty series if it was never logged."""
        return self.metrics.get(name, Series(np.empty(0, np.int64), np.empty(0)))

    def seconds_at(self, steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Compute cumulative training seconds at ``steps``, interpolated between logged rows; NaN without any.

        Before the first logged row, time is assumed proportional to steps.
        """
        clock = self.series(TRAIN_SECONDS)
        known = np.isfinite(clock.values)
        if not known.any():
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, clock.steps[known]), np.append(0.0, clock.values[known]))

    def flops_at(self, steps: Sequence[int] | NDArray[np.int64], by_stage: Sequence[float]) -> NDArray[np.float64]:
        """Compute training FLOPs at ``steps`` from those at the end of each stage; within a stage steps cost the same.

        The result is NaN if the number of stages does not fit.
        """
        ends = [mark.step for mark in self.growth] + [self.steps or 0]
        if len(ends) != len(by_stage):
            return np.full(len(steps), np.nan)
        return np.interp(steps, [0, *ends], [0.0, *by_stage])

    def depth_profile(self) -> list[tuple[int, int]]:
        """List (first step, depth) of every stage, first stage first; empty if the depth is unknown."""
        if not self.growth:
            return [(0, self.depth)] if self.depth is not None else []
        return [(0, self.growth[0].depth_before), *((mark.step, mark.depth) for mark in self.growth)]

    def mean_depth(self) -> float | None:
        """Average the depth over optimizer steps; None if steps or depth are unknown."""
        profile = self.depth_profile()
        if not profile or not self.steps:
            return None
        starts = [min(start, self.steps) for start, _ in profile] + [self.steps]
        return sum(depth * (starts[i + 1] - starts[i]) for i, (_, depth) in enumerate(profile)) / self.steps


def read_run(folder: Path) -> RunLog:
    """Read one run folder.

    Raises:
        InputError: the folder does not exist, or one of its files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    summary, events = _read_json(folder / "summary.json", {}), _read_json(folder / "growth.json", [])
    return _run_log(folder, summary, events, read_metrics(folder / "metrics.csv"))


def run_record(folder: Path) -> dict[str, Any]:
    """Read ``summary``, ``growth`` and ``curves`` of a finished run folder in plain values, for `recorded_run`.

    The curves are the logged output loss with the training seconds, thinned to about ``CURVE_POINTS`` points. Each
    point is the mean of equally many logged values of one stage, at the step of the last one.

    Raises:
        InputError: as for `read_run`.
    """
    log = read_run(folder)
    logged = log.series("train/output")
    known = np.isfinite(logged.values)
    logged = Series(logged.steps[known], logged.values[known])
    stages = np.searchsorted([mark.step for mark in log.growth], logged.steps)
    places = np.arange(len(stages)) // max(1, math.ceil(len(stages) / CURVE_POINTS))
    blocks = np.split(np.arange(len(stages)), np.flatnonzero(np.diff(stages) | np.diff(places)) + 1)
    steps = [int(logged.steps[block[-1]]) for block in blocks if len(block)]
    curves = {
        "steps": steps,
        "output": [_plain(logged.values[block].mean()) for block in blocks if len(block)],
        "seconds": [_plain(seconds) for seconds in log.seconds_at(steps)],
    }
    events = _read_json(folder / "growth.json", [])
    return {"summary": _read_json(folder / "summary.json", {}), "growth": events, "curves": curves}


def _plain(value: float) -> float | None:
    """Round to five digits; None unless the number is finite, as in every JSON file here."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def recorded_run(folder: Path, record: dict[str, Any]) -> RunLog:
    """Build the log of the run that was in ``folder`` from its `run_record`."""
    curves = {name: np.array(values, np.float64) for name, values in record["curves"].items()}
    steps = curves["steps"].astype(np.int64)
    metrics = {"train/output": Series(steps, curves["output"]), TRAIN_SECONDS: Series(steps, curves["seconds"])}
    return _run_log(folder, record["summary"], record["growth"], metrics)


def _run_log(folder: Path, summary: dict[str, Any], events: list[Any], metrics: dict[str, Series]) -> RunLog:
    run, growth = Summary.from_plain(summary), tuple(_growth_event(folder, event) for event in events)
    last_step = max((int(series.steps[-1]) for series in metrics.values()), default=None)
    return RunLog(
        folder=folder,
        finished=bool(summary),
        policy=run.policy,
        schedule=run.schedule,
        seed=run.seed,
        steps=last_step if run.steps is None else run.steps,
        depth=growth[-1].depth if run.depth is None and growth else run.depth,
        parameters=run.parameters,
        train_seconds=run.train_seconds,
        train_loss=run.train_loss,
        # The summary has ``null`` both without validation and if validation gave no finite number.
        val_output=math.nan if summary and run.val_output is None and "val/output" in metrics else run.val_output,
        hardware=run.hardware,
        growth=growth,
        metrics=metrics,
    )


def read_metrics(path: Path) -> dict[str, Series]:
    """Read ``metrics.csv`` into one series per column, in the order of steps; empty if there is no file.

    A logger writes several rows for one step (training and validation metrics), and a resumed run writes the steps
    after its checkpoint again. Therefore each column is merged separately, and the last value written wins.

    Raises:
        InputError: there is no ``step`` column, or a value is not a number.
    """
    if not path.is_file():
        return {}
    columns: dict[str, dict[int, float]] = {}
    reader = csv.DictReader(read_lines(path))
    if reader.fieldnames is not None and "step" not in reader.fieldnames:
        raise InputError(f"{path}: no column 'step' among {', '.join(reader.fieldnames)}")
    for row in reader:
        try:
            _merge_row(columns, row)
        except (TypeError, ValueError):
            raise InputError(f"{path}: line {reader.line_num} holds a value that is not a number") from None
    return {name: _series(values) for name, values in columns.items()}


def _merge_row(columns: dict[str, dict[int, float]], row: dict[str, str]) -> None:
    step = int(float(row["step"]))
    for name, text in row.items():
        if name != "step" and text:
            columns.setdefault(name, {})[step] = float(text)


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    return Series(np.array(steps, np.int64), np.array([values[step] for step in steps]))


def _growth_event(folder: Path, values: dict[str, Any]) -> GrowthEvent:
    try:
        return GrowthEvent.from_plain(values)
    except InputError as error:
        raise InputError(f"{folder / 'growth.json'}: {error}") from None


def _read_json(path: Path, missing: Any) -> Any:
    """Parse the file, or return ``missing`` if there is none."""
    return read_json(path) if path.is_file() else missing
