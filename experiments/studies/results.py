"""Continue a study from the ``results.json`` of another machine."""

from pathlib import Path
from typing import Any

from datamodules.files import write_json
from experiments.report.study_reading import read_results
from experiments.studies.job import is_done, now
from experiments.studies.plan import Plan


def restore_results(output: Path, plan: Plan, path: Path, dry_run: bool = False) -> list[str]:
    """Copy the results of this plan's jobs from ``path``, a ``results.json``; return their ids. A dry run copies none.

    All jobs of a row and seed are copied or none, because the other outputs of a job, such as a student, are not in
    the file. The jobs that rows share (corpus, teacher, cached targets) run again if any job is left.

    Raises:
        InputError: ``path`` is not a ``results.json``.
    """
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
            write_json(folder / "result.json", entries[job_id]["result"])
            record = {"status": "done", "finished": now(), "seconds": entries[job_id]["seconds"], "restored": str(path)}
            write_json(folder / "job.json", plan.jobs[job_id].described() | record)
    return restored
