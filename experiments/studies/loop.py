"""Run a plan: submit jobs that are ready, skip finished ones, report failed ones and go on with the rest."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from datamodules.files import FolderLock, read_json, write_json
from experiments.studies.executors import Executor, Handle, NotNow
from experiments.studies.job import Workspace, is_done, read_record
from experiments.studies.plan import Job, Plan

SECONDS_TO_NEXT_TRY = 60.0
STATES = ("done", "running", "waiting", "failed", "blocked")


def only_runner(output: Path) -> FolderLock:
    """Lock the folder, so that a second runner is refused.

    Raises:
        InputError: another runner works in this folder; the message names its process and host.
    """
    return FolderLock(output, "runner.lock", "wait for it, or choose another --output")


class Runner:
    """Runs a plan and keeps the state of its jobs.

    Args:
        plan: plan to run; jobs that are not in ``plan.to_run`` keep their records.
        workspace: workspace of the study.
        executor: executor of the jobs.
        console: console for the live table.
        poll_seconds: seconds between two checks of the jobs.
    """

    def __init__(
        self, plan: Plan, workspace: Workspace, executor: Executor, console: Console, poll_seconds: float = 0.2
    ) -> None:
        self.plan, self.workspace, self.executor, self.console = plan, workspace, executor, console
        self.poll_seconds = poll_seconds
        self.states: dict[str, str] = {}
        self._handles: dict[str, Handle] = {}
        self._refused: dict[str, float] = {}  # when jobs that a scheduler did not take are tried again
        self.jobs = {job.id: job for job in plan.to_run}
        for job in plan.jobs.values():
            done, runs = is_done(workspace.output, job.id), job.id in self.jobs
            if runs:
                self.states[job.id] = "done" if done else "waiting"
            if not done and (runs or not read_record(workspace.output, job.id)):
                write_json(workspace.path(job) / "job.json", job.described() | {"status": "planned"})

    @property
    def failed(self) -> list[Job]:
        """Jobs that failed, and those that could not start because of them."""
        return [job for job in self.jobs.values() if self.states[job.id] in ("failed", "blocked")]

    def run(self) -> None:
        """Run until no job is left that can run; an interrupt ends the running jobs and is raised again."""
        try:
            with Live(get_renderable=self.table, console=self.console, refresh_per_second=2):
                try:
                    while self._step():
                        time.sleep(self.poll_seconds)
                finally:
                    self.executor.stop()
        finally:
            if not self.console.is_terminal:  # where the table does not end its line
                self.console.print()

    def _step(self) -> bool:
        for job_id, handle in list(self._handles.items()):
            if handle.done():
                del self._handles[job_id]
                self._finished(self.jobs[job_id], handle)
        for job in self.jobs.values():
            if self.states[job.id] == "waiting":
                needed = {self._state_for(job, other) for other in job.needs}
                if needed & {"failed", "blocked"}:
                    self.states[job.id] = "blocked"
                elif needed <= {"done"} and len(self._handles) < self.executor.capacity:
                    self._submit(job)
        return bool(self._handles or self._refused)

    def _submit(self, job: Job) -> None:
        if time.monotonic() < self._refused.get(job.id, 0.0):
            return
        try:
            self._handles[job.id] = self.executor.submit(job)
        except NotNow as error:
            self._refused[job.id] = time.monotonic() + SECONDS_TO_NEXT_TRY
            self.console.print(f"{error}; trying again in {SECONDS_TO_NEXT_TRY:g} s", soft_wrap=True)
        else:
            self._refused.pop(job.id, None)
            self.states[job.id] = "running"
            self._say(f"started: {job.label}")

    def _say(self, line: str) -> None:
        """Print a line where the table is shown only at the end, that is, not on a terminal."""
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)

    def _finished(self, job: Job, handle: Handle) -> None:
        if is_done(self.workspace.output, job.id):
            self.states[job.id] = "done"
            self._say(f"done: {job.label} ({read_record(self.workspace.output, job.id).get('seconds', 0):.0f} s)")
            return
        how = self.executor.explain(handle)
        self._failed(job, str(job.folder / "log.txt"), how)
        for member in job.settings["members"] if job.kind == "together" else ():
            if not self.workspace.is_trained(self.jobs[member]):
                self._failed(self.jobs[member], str(job.folder / "log.txt"), how)

    def _failed(self, job: Job, log: str, how: str) -> None:
        self.states[job.id] = "failed"
        # A job that its scheduler ended, or that did not start, could not record that itself.
        record = job.described() | {"log": log} | read_record(self.workspace.output, job.id)
        write_json(self.workspace.path(job) / "job.json", record | {"status": "failed", "ended_by": how})
        path = self.workspace.output / log
        logs = [f"see {path}"] if path.is_file() else []
        line = f"failed: {job.label}; {'; '.join([how] * bool(how) + logs)}"
        self.console.print(line, style="red", soft_wrap=True)

    def _state_for(self, job: Job, needed: str) -> str:
        """State of a job that ``job`` needs; training side by side counts as done if only other students failed."""
        if self.jobs[needed].kind == "together" and self.states[needed] == "failed" and self.workspace.is_trained(job):
            return "done"
        return self.states[needed]

    def table(self) -> Table:
        """Make a table by row: how many jobs are done, running, waiting, failed, blocked."""
        table = Table("row", *STATES, "now", title=self.plan.study.title)
        rows: dict[str, dict[str, int]] = {}
        running: dict[str, list[str]] = {}
        for job in self.jobs.values():
            counts = rows.setdefault(job.row or "shared", dict.fromkeys(STATES, 0))
            counts[self.states[job.id]] += 1
            if self.states[job.id] == "running":
                running.setdefault(job.row or "shared", []).append(job.label)
        for row, counts in rows.items():
            table.add_row(row, *(str(count or "") for count in counts.values()), ", ".join(running.get(row, [])))
        return table


def planned_seeds(output: Path) -> list[int]:
    """Read the seeds in ``study.json``; an empty list if there is no study yet."""
    path = output / "study.json"
    return read_json(path)["seeds"] if path.is_file() else []


def write_study(output: Path, plan: Plan, facts: Mapping[str, object]) -> None:
    """Write ``study.json``: the whole resolved study, whatever part runs, and the facts on machine and versions."""
    study = plan.study.described() | {"seeds": plan.seeds, "jobs": list(plan.jobs)}
    write_json(output / "study.json", json.loads(json.dumps(study | dict(facts), default=str)))
