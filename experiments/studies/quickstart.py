"""``interstack quickstart``: make corpus, teacher, four students, probes and a report, on a CPU in minutes.

It is the study ``quickstart`` (or ``quickstart_fast``), whose jobs run in this process. It needs no corpus, no weights
and no GPU. Finished parts are kept, so the command can be interrupted and started again.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.errors import InputError
from datamodules.files import read_json, write_json
from experiments.report.figures import require_matplotlib
from experiments.studies.estimate import Estimator, estimate_table, measured_slowness
from experiments.studies.executors import InProcessExecutor
from experiments.studies.job import Workspace
from experiments.studies.loop import only_runner
from experiments.studies.plan import Plan
from experiments.studies.reproduce import run_study
from experiments.studies.study import Study, load_study, merge, row_settings

BUDGET = 15 * 60
"""Seconds for the whole; a machine that needs clearly more does a share of the steps that fits them."""
TOLERANCE = 1.25
"""Estimate, in budgets, up to which all steps are done."""
SMALLEST_SHARE = 0.05


def quickstart(output: str = "runs/quickstart", fast: bool = False, seed: int = 0) -> None:
    """Make a corpus and a teacher, distil four students, compare them in one report.

    A few steps are timed first. A machine that needs much more than a quarter of an hour does a share of the steps.

    Args:
        output: folder for everything; finished parts in it are kept.
        fast: take one to two minutes instead of about fifteen, with models too poor to compare.
        seed: seed of corpus, teacher, students and probes.
    """
    require_matplotlib()
    folder, study = Path(output), load_study("quickstart_fast" if fast else "quickstart")
    kept, slowness = _kept(folder, {"fast": fast, "seed": seed}), measured_slowness()
    share = kept if kept is not None else fitting_share(study, seed, slowness)
    plan = Plan(sized(study, seed, share), seeds=[seed])
    workspace = Workspace(folder, study=study.name, wandb=row_settings(study, study.rows[0], seed)["wandb"])
    # Jobs send standard output to their logs, so the table has a descriptor of its own.
    with only_runner(folder), os.fdopen(os.dup(1), "w") as terminal:
        console = Console(file=terminal)
        write_json(folder / "quickstart.json", {"fast": fast, "seed": seed, "share": share})
        console.print(estimate_table(plan, workspace, slowness))
        if share < 1:
            console.print(f"this machine is slow: every part does {share:.0%} of its steps")
        try:
            run_study(plan, workspace, InProcessExecutor(workspace), console)
        finally:
            _link(folder, plan)


def _kept(folder: Path, settings: Mapping[str, Any]) -> float | None:
    """Read the share of the steps that an earlier call chose; one table must not mix settings.

    Raises:
        InputError: the folder holds a quick start of other settings, or of an earlier version.
    """
    path = folder / "quickstart.json"
    if not path.is_file():
        return None
    found = read_json(path)
    if {key: found.get(key) for key in settings} != settings or "share" not in found:
        raise InputError(
            f"{folder} holds a quick start with {found}, not {dict(settings)} of this version: choose another "
            "--output, or delete it"
        )
    return float(found["share"])


def fitting_share(study: Study, seed: int, slowness: float) -> float:
    """Choose the share of the steps, in per cent, that fits the budget; 1 if all of them do."""
    plan = Plan(sized(study, seed, 1.0), seeds=[seed])
    estimator = Estimator(plan, on_gpu=False, slowness=slowness)
    seconds = sum(estimator.of(job).seconds for job in plan.jobs.values())
    return 1.0 if seconds <= TOLERANCE * BUDGET else max(SMALLEST_SHARE, round(BUDGET / seconds, 2))


def sized(study: Study, seed: int, share: float) -> Study:
    """Give corpus and teacher the seed, and teacher, students and probes a share of their steps."""

    def part(steps: int) -> int:
        return max(1, round(share * steps))

    batches, probe = "data.batches_per_epoch", study.evaluation["pr_probe"]
    notes = [f"The machine is slow: teacher, students and probes did {share:.0%} of their steps."] if share < 1 else []
    return replace(
        study,
        corpus={**(study.corpus or {}), "seed": seed},
        teacher={**study.teacher, "seed": seed, "steps": part(study.teacher["steps"])},
        overrides={**study.overrides, batches: part(study.overrides[batches])},
        evaluation=merge(study.evaluation, {"pr_probe": {"updates": part(probe["updates"])}}),
        notes=[*study.notes, *notes],
    )


def _link(folder: Path, plan: Plan) -> None:
    """Link corpus, teacher and students under plain names, since the folders of jobs have ids."""
    assert plan.corpus is not None
    assert plan.teacher is not None
    links = {"corpus": plan.corpus.folder / "corpus", "teacher": plan.teacher.folder / "teacher"}
    links |= {f"students/{row}": Path("..") / job.run for (row, _), job in plan.distil.items()}
    for name, target in links.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(target)
