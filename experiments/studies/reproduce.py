"""``interstack reproduce``: plan, run, resume, evaluate and render a study.

    interstack reproduce table1_mini --output studies/table1_mini
    interstack reproduce table1 --output studies/table1 --root /corpora/LibriSpeech --executor slurm

A study is a file in ``experiments/studies`` or your own file; see ``docs/reproducing.md``.
"""

import logging
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from callbacks.hardware import machine
from datamodules.errors import InputError
from experiments.records.runs import git_commit
from experiments.report.figures import require_matplotlib
from experiments.report.study_reading import read_study
from experiments.studies.corpora import require_corpora
from experiments.studies.estimate import estimate_table
from experiments.studies.executors import Executor, LocalExecutor
from experiments.studies.job import Workspace, is_done
from experiments.studies.loop import Runner, only_runner, planned_seeds, write_study
from experiments.studies.plan import Inputs, Plan, trains_on_gpus
from experiments.studies.results import differing_jobs, restore_results
from experiments.studies.slurm import SlurmExecutor, SlurmSettings
from experiments.studies.study import load_study, row_settings

log = logging.getLogger(__name__)


def reproduce(
    study: str,
    output: str,
    only: str | list[str] | None = None,
    seeds: list[int] | None = None,
    dry_run: bool = False,
    root: str | None = None,
    roots: dict[str, str] | None = None,
    teacher: str | None = None,
    lexicon: str | list[str] | None = None,
    executor: Literal["local", "slurm"] = "local",
    parallel: int | None = None,
    devices: int = 1,
    together: bool = False,
    slurm: SlurmSettings = SlurmSettings(),  # noqa: B008 (frozen)
    wandb: dict[str, Any] | None = None,
    finished: str | list[str] | None = None,
) -> None:
    """Run the unfinished jobs of a study, then write its report. Finished jobs are never repeated.

    Args:
        study: name of a shipped study, or a YAML file.
        output: folder for jobs, runs and the report; one study per folder.
        only: row to run, or a list of rows, such as [full_l2l,interleave_equal]; default: all. The report has all rows.
        seeds: seeds to run; default: the study's.
        dry_run: print the plan with estimated FLOPs, time and disk; run nothing.
        root: folder of the corpus, for studies that do not synthesize one.
        roots: corpora of evaluation tasks that are not below root, such as {"sf": FOLDER, "sid": FOLDER}.
        teacher: hub name or folder of a teacher to use instead of the study's.
        lexicon: file of pronunciations for SUPERB's PR (see docs/superb.md), or a list of files; needed if the corpus
            has no phone alignments.
        executor: run jobs on this machine, or on SLURM through submitit.
        parallel: jobs at a time on this machine; default: one per group of GPUs, or one without GPUs.
        devices: GPUs per distillation job, trained with DDP; under SLURM see slurm.gpus.
        together: train the students of a seed side by side on one device (interstack fit-together); they then share
            data and teacher. Results are the same; seconds are not comparable with those of separate runs.
        slurm: resources of a SLURM job.
        wandb: settings of Weights & Biases for all runs, such as {"mode": "online", "project": "NAME"}.
        finished: results.json of the same study from another machine, or a list of them; rows and seeds that are
            complete there are not repeated.
    """
    folder, console = Path(output), Console()
    loaded = load_study(study)
    if not dry_run and loaded.data == "root" and root is None:
        raise InputError(f"the study {loaded.name} needs a corpus: give its folder with --root")
    inputs = Inputs(root, teacher, [lexicon] if isinstance(lexicon, str) else lexicon or [], roots or {})
    plan = Plan(loaded, inputs, [only] if isinstance(only, str) else only, seeds, planned_seeds(folder))
    workspace = Workspace(
        folder,
        replace(inputs, teacher=plan.teacher_settings.get("model")),
        study=loaded.name,
        wandb={**row_settings(loaded, loaded.rows[0], 0).get("wandb", {}), **(wandb or {})},
        devices=slurm.gpus if executor == "slurm" else devices,
    )
    if together and workspace.devices > 1:
        raise InputError(f"students are trained together on one device, not {workspace.devices}: use one of the two")
    if not dry_run:
        require_matplotlib()
    files = [Path(path) for path in ([finished] if isinstance(finished, str) else finished or [])]
    taken = {job for path in files for job in restore_results(workspace, plan, path, dry_run=True)}
    if not dry_run:  # check before anything is written, the lock file included
        left = [job for job in plan.to_run if not is_done(folder, job.id) and job.id not in taken]
        require_corpora(workspace, left)
    with nullcontext() if dry_run else only_runner(folder):
        for path in files:
            restored = restore_results(workspace, plan, path, dry_run)
            console.print(f"{len(restored)} jobs {'would be' if dry_run else 'are'} taken over from {path}")
            if differing := differing_jobs(workspace, plan, path):
                console.print(
                    f"it has results under other settings or inputs (corpus, alignments, teacher, lexicon) of: "
                    f"{', '.join(differing)}; their rows and seeds run again as a whole"
                )
        if together:
            plan.train_together(lambda job: is_done(folder, job.id) or workspace.is_trained(job))
        console.print(estimate_table(plan, workspace))
        if dry_run:
            return
        chosen: Executor = (
            SlurmExecutor(workspace, slurm)
            if executor == "slurm"
            else LocalExecutor(workspace, parallel, trains_on_gpus(plan))
        )
        run_study(plan, workspace, chosen, console)


def run_study(plan: Plan, workspace: Workspace, executor: Executor, console: Console) -> None:
    """Run what is left of a plan and write the report; the caller holds the lock of the folder.

    Raises:
        InputError: jobs failed or could not start; the report is written all the same.
        SystemExit: an interrupt or SIGTERM ended the running jobs (status 130).
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    write_study(workspace.output, plan, _facts())
    runner = Runner(plan, workspace, executor, console)
    try:
        runner.run()
    except KeyboardInterrupt:
        console.print("interrupted: the same command continues from here")
        sys.exit(130)
    report = import_module("experiments.report.study").build_report(read_study(workspace.output))  # imports matplotlib
    console.width = max(console.width, 110)  # the table of results needs it
    console.print(report.table)
    console.print(f"report: {report.main}")
    if runner.failed:
        names = ", ".join(job.label for job in runner.failed)
        raise InputError(f"{len(runner.failed)} of {len(plan.to_run)} jobs failed or could not start: {names}")


def _facts() -> dict[str, Any]:
    """Command, commit, machine and versions of this study, for the report."""
    return {
        "command": "interstack " + " ".join(sys.argv[1:]),
        "commit": git_commit() or "unknown (not a clone)",
        "hardware": machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "numpy")},
    }
