"""An executor that runs the jobs of a study in a SLURM queue, through submitit.

submitit asks ``sacct`` whether a job has ended, at most every ten minutes. A cluster without accounting has no answer,
so that a job which SLURM ended would be waited for without end. Here ``squeue`` is asked, which every cluster answers.
"""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datamodules.errors import InputError
from experiments.studies.executors import NotNow
from experiments.studies.job import Workspace, execute
from experiments.studies.plan import Job

SECONDS_BETWEEN = 15.0
MOST_REFUSALS = 10
"""Refusals in a row after which a study ends, if none of its jobs runs."""


@dataclass(frozen=True)
class SlurmSettings:
    """Resources of a SLURM job.

    Args:
        partition: partition of the cluster.
        account: account that is charged.
        hours: time limit per job; the next call of the same command continues a job that reached it.
        cpus: cores per job.
        memory_gb: memory per job, in GB.
        gpus: GPUs per distillation job; other jobs get one.
        jobs: maximum number of jobs in the queue.
        setup: shell lines before the job, such as the activation of an environment.
        cluster: ``slurm``, or submitit's ``local`` for a trial on one machine.
    """

    partition: str | None = None
    account: str | None = None
    hours: float = 24.0
    cpus: int = 8
    memory_gb: float = 64.0
    gpus: int = 1
    jobs: int = 16
    setup: tuple[str, ...] = ()
    cluster: str = "slurm"


class Queue:
    """The ids that ``squeue`` lists for this user: jobs that wait or run.

    Args:
        seconds_between: seconds between two calls, for all jobs together.
        clock: clock of the times, in seconds.
    """

    def __init__(self, seconds_between: float = SECONDS_BETWEEN, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds_between, self._clock = seconds_between, clock
        self._asked_at: list[float] = []  # the last two calls that were answered
        self._seen: dict[str, float] = {}

    def has_left(self, job_id: str, submitted_at: float) -> bool:
        """Whether two answers in a row, both after its submission, do not list the job.

        One could miss a job that SLURM is just moving, and its last file may reach this machine some seconds later.
        """
        if not self._asked_at or self._clock() - self._asked_at[-1] >= self.seconds_between:
            self._ask()
        return len(self._asked_at) == 2 and max(submitted_at, self._seen.get(job_id, 0.0)) < self._asked_at[0]

    def _ask(self) -> None:
        now = self._clock()
        listed = _output("squeue", "--me", "--noheader", "--format=%A")
        if listed is None:
            return
        self._asked_at = [*self._asked_at[-1:], now]
        self._seen |= dict.fromkeys(listed.split(), now)


def explain_end(job_id: str) -> str:
    """Say how SLURM ended a job, such as ``SLURM job 12: TIMEOUT``; empty if it ended by itself or nothing is known."""
    shown = _output("scontrol", "show", "job", "--oneliner", job_id) or ""
    fields = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", shown))
    if not fields:  # SLURM forgets ended jobs after some minutes; its accounting, if it has any, does not
        answer = _output("sacct", "-X", "--noheader", "--parsable2", "--format=State,Reason,ExitCode", "-j", job_id)
        values = (answer or "").strip().split("|")
        fields = dict(zip(("JobState", "Reason", "ExitCode"), values, strict=True)) if len(values) == 3 else {}
    state, reason = fields.get("JobState", "COMPLETED"), fields.get("Reason", "")
    if state == "COMPLETED":
        return ""
    more = [reason] if reason not in ("", "None") else []
    more += [f"exit code {fields['ExitCode']}"] if fields.get("ExitCode", "0:0") != "0:0" else []
    return f"SLURM job {job_id}: {state}{' (' + ', '.join(more) + ')' if more else ''}"


def _output(*words: str) -> str | None:
    """What a command prints; ``None`` if it fails, as when the controller does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass
class SlurmHandle:
    """A job of submitit; ``submitted_at`` is a time of the queue's clock."""

    job: Any
    queue: Queue | None
    submitted_at: float

    def done(self) -> bool:
        """Whether the job has written its result, or has left the queue without one."""
        if self.queue is None:
            return bool(self.job.done())
        return self.job.paths.result_pickle.exists() or self.queue.has_left(self.job.job_id, self.submitted_at)


class SlurmExecutor:
    """Runs jobs in a SLURM queue through submitit; all machines must see the output folder.

    Args:
        workspace: workspace of the study.
        settings: resources of a job.

    Raises:
        InputError: submitit is not installed.
    """

    def __init__(self, workspace: Workspace, settings: SlurmSettings) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs submitit: pip install 'interstack[slurm]'") from None
        self.capacity = settings.jobs
        self._workspace, self._settings = workspace, settings
        self._executor = submitit.AutoExecutor(folder=workspace.output / "slurm", cluster=settings.cluster)
        self._queue = Queue() if settings.cluster == "slurm" else None
        self._handles: list[SlurmHandle] = []
        self._refused = 0  # times in a row in which no job ran

    def parameters(self, job: Job) -> dict[str, Any]:
        """Build submitit's parameters for the job; only distillation gets more than one GPU."""
        settings = self._settings
        gpus = settings.gpus if job.kind == "distil" else min(1, settings.gpus)
        parameters: dict[str, Any] = {
            "name": f"{job.kind}-{job.row or 'shared'}",
            "timeout_min": round(settings.hours * 60),
            "cpus_per_task": settings.cpus,
            "mem_gb": settings.memory_gb,
            "gpus_per_node": 0 if job.kind == "corpus" else gpus,
            "tasks_per_node": 1,
        }
        slurm = {"partition": settings.partition, "account": settings.account, "setup": list(settings.setup) or None}
        parameters |= {f"slurm_{key}": value for key, value in slurm.items() if value is not None}
        return parameters

    def submit(self, job: Job) -> SlurmHandle:
        """Put the job into the queue.

        Raises:
            InputError: SLURM refuses it, and has accepted none or none is left that runs.
            NotNow: SLURM refuses it while others run, such as at a limit of jobs or when its controller is busy.
        """
        from submitit.core.utils import FailedJobError

        self._executor.update_parameters(**self.parameters(job))
        try:
            submitted = self._executor.submit(execute, self._workspace, job)
        except FailedJobError as error:
            problem = f"SLURM refuses the job of {job.label} ({' '.join(str(error).split())})"
            running = any(not handle.done() for handle in self._handles)
            self._refused = 0 if running else self._refused + 1
            if running or (self._handles and self._refused < MOST_REFUSALS):
                raise NotNow(problem) from error
            raise InputError(problem) from error
        self._refused = 0
        handle = SlurmHandle(submitted, self._queue, time.monotonic())
        self._handles.append(handle)
        return handle

    def explain(self, handle: SlurmHandle) -> str:
        if handle.job.paths.result_pickle.exists() and handle.job.exception() is None:
            return ""  # the job came to its end, so that its log says what went wrong
        if self._queue is None:
            return ""
        how = explain_end(handle.job.job_id)
        return f"{how}; SLURM's log: {handle.job.paths.stderr}" if how else ""

    def stop(self) -> None:
        for handle in self._handles:
            if not handle.done():
                handle.job.cancel()
