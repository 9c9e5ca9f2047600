"""All results of a study in one file."""

from pathlib import Path

from datamodules.files import read_json, write_json
from experiments.runner.job import is_done, read_record, read_result
from experiments.runner.plan import Plan


def write_results(output: Path, plan: Plan) -> None:
    """``OUTPUT/results.json``: what each job of the plan gave, or that it gave nothing."""
    jobs = []
    for job in plan.jobs.values():
        record = read_record(output, job.id)
        result = read_result(output, job.id) if is_done(output, job.id) else None
        jobs.append({key: record.get(key) for key in ("id", "kind", "row", "seed", "task", "status", "seconds")})
        jobs[-1]["result"] = result
    write_json(output / "results.json", {"study": read_json(output / "study.json"), "jobs": jobs})
