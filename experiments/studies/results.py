"""Continue a study from the ``results.json`` of another machine."""

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from datamodules.files import write_json
from experiments.report.study_reading import read_results
from experiments.studies.job import Workspace, is_done, loss_function, now, sizes
from experiments.studies.plan import Job, Plan


def restore_results(workspace: Workspace, plan: Plan, path: Path, dry_run: bool = False) -> list[str]:
    """Copy the results of this plan's jobs from ``path``, a ``results.json``; return their ids. A dry run copies none.

    All jobs of a row and seed are copied or none, because the other outputs of a job, such as a student, are not in
    the file. The jobs that rows share (corpus, teacher, cached targets) run again if any job is left.

    Raises:
        InputError: ``path`` is not a ``results.json``.
    """
    output = workspace.output
    entries: dict[str, dict[str, Any]] = {
        entry["id"]: entry for entry in read_results(path)["jobs"] if entry.get("result") is not None
    }
    groups: dict[tuple[str, int], list[str]] = {}
    for job in plan.jobs.values():
        if job.row:
            groups.setdefault((job.row, job.seed), []).append(job.id)
    restored: list[str] = []
    for ids in groups.values():
        if not entries.keys() >= set(ids) or any(is_done(output, job_id) for job_id in ids):
            continue
        restored += ids
        for job_id in () if dry_run else ids:
            folder = output / plan.jobs[job_id].folder
            write_json(folder / "result.json", _completed(entries[job_id]["result"], plan.jobs[job_id], workspace))
            record = {"status": "done", "finished": now(), "seconds": entries[job_id]["seconds"], "restored": str(path)}
            write_json(folder / "job.json", plan.jobs[job_id].described() | record)
    return restored


def differing_jobs(workspace: Workspace, plan: Plan, path: Path) -> list[str]:
    """Name jobs to run that ``path`` has under other settings or inputs, by kind and task, with their number.

    Nothing of their rows and seeds is taken over, which is what was asked for if a setting was changed, and hours lost
    if an input such as the phone alignments is not the one that it was.
    """
    jobs = read_results(path)["jobs"]
    ids = {entry["id"] for entry in jobs}
    had = {_name(entry) for entry in jobs if entry.get("result") is not None and entry.get("row")}
    left = [job for job in plan.to_run if job.id not in ids and not is_done(workspace.output, job.id)]
    counts = Counter(f"{job.kind} {job.task}".strip() for job in left if _name(job.described()) in had)
    return [f"{kind} ({count})" for kind, count in counts.items()]


def _name(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key) or None for key in ("kind", "row", "seed", "task"))


def _completed(result: dict[str, Any], job: Job, workspace: Workspace) -> dict[str, Any]:
    """Add what an earlier version did not keep, of a student whose teacher is in a folder."""
    if job.kind != "distil" or workspace.teacher is None or not Path(workspace.teacher).is_dir():
        return result
    teacher = AutoConfig.from_pretrained(workspace.teacher)
    summary = {"loss_function": loss_function(job, teacher)} | (result.get("summary") or {})
    return sizes(job, teacher) | result | {"summary": summary}
