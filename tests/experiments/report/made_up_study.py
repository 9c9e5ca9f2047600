"""A made-up study folder in the layout that the runner writes: eight rows, three seeds, a failure and a gap."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.growth.policies import compose_ancestry, make_plan
from tests.experiments.report.made_up_runs import SUMMARY

ROWS = {
    "full": ("Full", "none", "equal", 1.00),
    "full_l2l": ("Full L2L", "none", "equal", 1.00),
    "gradstack_equal": ("GradStack, equal", "gradual", "equal", 0.80),
    "gradstack_prop1": ("GradStack, prop-1", "gradual", "prop-1", 0.86),
    "midas_equal": ("MIDAS, equal", "midas", "equal", 0.80),
    "midas_prop1": ("MIDAS, prop-1", "midas", "prop-1", 0.86),
    "interleave_equal": ("InterleaveStack, equal", "interleaved", "equal", 0.81),
    "interleave_prop1": ("InterleaveStack, prop-1", "interleaved", "prop-1", 0.87),
}
GROWTH_STEPS = {"equal": (100, 200, 300), "prop-1": (40, 120, 240)}
STEPS = 400
REFERENCES = [
    {"label": "InterleaveStack", "schedule": "equal", "values": {"pr/per": 9.08, "speed_up": 1.24, "asr/wer": 10.22}},
    {"label": "HuBERT Base", "values": {"pr/per": 5.41, "asr/wer": 6.42}},
]


def write_study(folder: Path, seeds: int = 3, rows: tuple[str, ...] = tuple(ROWS)) -> Path:
    """MIDAS equal's last seed fails to distil, MIDAS prop-1's last seed has not been evaluated."""
    generator = np.random.default_rng(0)
    study: dict[str, Any] = {
        "name": "table1",
        "title": "Main table <made up>",
        "rows": [{"name": name, "label": ROWS[name][0]} for name in rows],
        "seeds": list(range(seeds)),
        "tasks": ["pr"],
        "columns": ["pr/per", "val_output", "train_seconds", "speed_up", "flops_ratio", "mean_depth"],
        "references": REFERENCES,
        "baseline": "full_l2l",
        "command": "interstack reproduce table1",
        "commit": "0123abc",
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.11.0"},
        "threads": 1,
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    for index, name in enumerate(rows):
        for seed in range(seeds):
            failed = name == "midas_equal" and seed == 2
            _distil(folder, name, seed, failed, generator)
            if failed:
                write_job(folder, f"evaluate-{name}-{seed}", "evaluate", name, seed, task="pr", status="planned")
                continue
            gap = name == "midas_prop1" and seed == 2
            per = 20 + index + float(generator.normal(0, 0.4))
            weights = generator.dirichlet(np.ones(13)).tolist()
            result = {"task": "pr", "preset": "probe", "metrics": {"per": per}, "layer_weights": weights}
            write_job(folder, f"evaluate-{name}-{seed}", "evaluate", name, seed, None if gap else result, task="pr")
            write_job(folder, f"similarity-{name}-{seed}", "similarity", name, seed, _matrices(generator))
    teacher = {"task": "pr", "preset": "probe", "metrics": {"per": 12.5}}
    write_job(folder, "evaluate-teacher", "evaluate", "teacher", 0, teacher, task="pr")
    return folder


def write_job(
    folder: Path,
    job_id: str,
    kind: str,
    row: str,
    seed: int,
    result: dict[str, Any] | None = None,
    status: str | None = None,
    task: str | None = None,
) -> None:
    job = folder / "jobs" / job_id
    job.mkdir(parents=True)
    status = status or ("done" if result is not None else "planned")
    record = {"id": job_id, "kind": kind, "row": row, "seed": seed, "task": task, "status": status}
    (job / "job.json").write_text(json.dumps(record | {"log": f"jobs/{job_id}/log.txt"}))
    if result is not None:
        (job / "result.json").write_text(json.dumps({"row": row, "seed": seed} | result))


def _distil(folder: Path, name: str, seed: int, failed: bool, generator: np.random.Generator) -> None:
    job_id = f"distil-{name}-{seed}"
    if failed:
        write_job(folder, job_id, "distil", name, seed, status="failed")
        return
    _, policy, schedule, cost = ROWS[name]
    events = _events(policy, schedule)
    seconds = cost * 400 * float(generator.uniform(0.98, 1.02))
    run = folder / "runs" / f"{name}-seed{seed}-0"
    run.mkdir(parents=True)
    (run / "growth.json").write_text(json.dumps(events))
    summary = SUMMARY | {"policy": policy, "schedule": schedule, "seed": seed, "steps": STEPS, "train_seconds": seconds}
    (run / "summary.json").write_text(json.dumps(summary))
    offset = 0.2 * list(ROWS).index(name)
    lines = ["epoch,step,train/output,perf/train_seconds"]
    for step in range(5, STEPS + 1, 5):
        bump = sum(0.4 * np.exp(-(step - event["step"]) / 15) for event in events if step > event["step"])
        loss = 0.5 + 0.1 * offset + 3 / (1 + step / 40) + bump + generator.normal(0, 0.03)
        lines.append(f"0,{step},{loss},{seconds * step / STEPS}")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    stages = [1.0] if not events else [0.2, 0.42, 0.66, 0.9]
    result = {
        "run": f"runs/{run.name}",
        "train_seconds": seconds,
        "student_seconds": seconds / 2,
        "flops": 1e15 * stages[-1],
        "flops_by_stage": [1e15 * stage for stage in stages],
        "peak_memory_bytes": 1_500_000_000,
        "final_loss": 0.5 + offset,
        "val_output": 0.6 + offset + float(generator.normal(0, 0.02)),
        "mean_depth": 12.0 if not events else 7.5,
        "parameters": 26_872_960,
    }
    write_job(folder, job_id, "distil", name, seed, result)


def _events(policy: str, schedule: str) -> list[dict[str, Any]]:
    if policy == "none":
        return []
    ancestry: list[int | None] = [0, 1, 2]
    events = []
    for depth, step in zip((3, 6, 9), GROWTH_STEPS[schedule], strict=True):
        plan = make_plan(policy, depth, depth + 3)
        ancestry = list(compose_ancestry(ancestry, plan))
        events.append(
            {"epoch": step // 10, "step": step, "policy": policy, "plan": plan, "ancestry": ancestry}
            | {"depth_before": depth, "depth": depth + 3, "loss_before": 0.2, "loss_after": 0.3}
        )
    return events


def _matrices(generator: np.random.Generator) -> dict[str, Any]:
    distance = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    cka = np.exp(-distance / 6)
    return {
        "cka": cka.tolist(),
        "cosine": (cka**2).tolist(),
        "cka_teacher": (0.8 * cka + generator.uniform(0, 0.05)).tolist(),
        "runs": [{"name": "run", "stages": [_stage(6, None), _stage(12, 0.9)]}],
    }


def _stage(depth: int, copies: float | None) -> dict[str, Any]:
    use = {"loss": 0.5, "skipped": [0.6] * depth, "swapped": [0.55] * (depth - 1)}
    return {"depth": depth, "copies": copies, "others": 0.7, "depth_use": use}
