"""All results of a study in one file, and the plain table of them that the terminal shows."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from experiments.runner.job import is_done, read_record, read_result, write_json
from experiments.runner.plan import Plan

COLUMNS = ("train_seconds", "speed_up", "student_speed_up", "flops_ratio", "mean_depth", "val_output")


def write_results(output: Path, plan: Plan) -> Path:
    """``OUTPUT/results.json``: what each job of the plan gave, or that it gave nothing."""
    jobs = []
    for job in plan.jobs.values():
        record = read_record(output, job.id)
        result = read_result(output, job.id) if is_done(output, job.id) else None
        jobs.append({key: record.get(key) for key in ("id", "kind", "row", "seed", "task", "status", "seconds")})
        jobs[-1]["result"] = result
    write_json(output / "results.json", {"study": json.loads((output / "study.json").read_text()), "jobs": jobs})
    return output / "results.json"


def by_row(path: Path) -> dict[str, dict[str, list[float]]]:
    """Values of every column by row, one per seed that has it; speed-ups against the baseline's run of that seed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    distilled: dict[tuple[str, int], dict[str, Any]] = {}
    rows: dict[str, dict[str, list[float]]] = {}
    for job in content["jobs"]:
        if job["result"] and job["kind"] == "distil":
            distilled[job["row"], job["seed"]] = job["result"]
        if job["result"] and job["kind"] == "evaluate":
            for name, value in job["result"]["metrics"].items():
                rows.setdefault(job["row"], {}).setdefault(f"{job['task']}/{name}", []).append(value)
    for (row, seed), result in distilled.items():
        values = {key: result[key] for key in COLUMNS if key in result}
        if baseline := distilled.get((content["study"]["baseline"], seed)):
            values["speed_up"] = baseline["train_seconds"] / result["train_seconds"]
            values["student_speed_up"] = baseline["student_seconds"] / result["student_seconds"]
            values["flops_ratio"] = baseline["flops"] / result["flops"]
        for key, value in values.items():
            rows.setdefault(row, {}).setdefault(key, []).append(value)
    return rows


def results_table(path: Path, labels: dict[str, str]) -> Table:
    """Mean and standard deviation over seeds; a dash where a row has no result."""
    rows = by_row(path)
    metrics = sorted({column for values in rows.values() for column in values} - set(COLUMNS))
    columns = [*metrics, *COLUMNS]
    table = Table("row", "seeds", *columns)
    for name in [*labels, *(row for row in rows if row not in labels)]:
        values = rows.get(name, {})
        seeds = max((len(column) for column in values.values()), default=0)
        table.add_row(labels.get(name, name), str(seeds), *(_cell(values.get(column, [])) for column in columns))
    return table


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 1 if mean(values) >= 10 else 3
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
