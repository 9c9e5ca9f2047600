"""Check that the corpora of a plan's evaluations exist, before hours of distillation."""

from collections.abc import Iterable
from typing import Any

from datamodules.errors import InputError
from experiments.studies.job import Workspace
from experiments.studies.plan import Job
from experiments.superb.options import TaskData
from experiments.superb.preparation import require_inputs


def require_corpora(workspace: Workspace, jobs: Iterable[Job]) -> None:
    """Check the folder of each evaluation's task, except of a corpus that a job will synthesize.

    Raises:
        InputError: a folder lacks files of its corpus; the message names the first such task, its folder and a remedy.
    """
    evaluations = {job.task: job for job in jobs if job.kind == "evaluate"}
    for task, job in evaluations.items():
        if workspace.root is None and task not in workspace.roots:
            continue
        folder = workspace.data_root(job)
        try:
            lexicon = {"lexicon": workspace.lexicon} if workspace.takes_lexicon(job) else {}
            require_inputs(task.partition("_")[0], TaskData(folder, **_data(job.settings) | lexicon))
        except (ValueError, TypeError) as error:
            remedy = f'Give the folder of its corpus with --roots \'{{"{task}": "FOLDER"}}\''
            remedy += ", or pronunciations with --lexicon." if task.startswith("pr") else "."
            raise InputError(f"the task {task} cannot be evaluated on {folder}: {error}\n{remedy}") from None


def _data(settings: dict[str, Any]) -> dict[str, Any]:
    """Collect the ``data`` options of ``interstack superb``, given as one mapping or by dotted name."""
    dotted = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    return {**settings.get("data", {}), **dotted}
