"""Executors that run jobs on this machine, in processes or in this one; SLURM's is in ``slurm.py``."""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import torch

from datamodules.errors import InputError
from experiments.cli import run
from experiments.studies.job import INTERRUPTED, Workspace, execute, header
from experiments.studies.plan import Job


class NotNow(Exception):
    """A scheduler takes no more jobs at the moment; the message says why."""


class Handle(Protocol):
    """A submitted job."""

    def done(self) -> bool:
        """Whether the job has ended, successfully or not."""


class Executor(Protocol):
    """Runs jobs; ``capacity`` of them at a time."""

    capacity: int

    def submit(self, job: Job) -> Handle:
        """Start the job, or put it into a queue.

        Raises:
            NotNow: it cannot be started at the moment.
        """

    def explain(self, handle: Any) -> str:
        """Say why a job ended without a result, if its log cannot say it; else return an empty string."""

    def stop(self) -> None:
        """Ask all jobs to end, and wait for them."""


def visible_gpus() -> list[str]:
    """List names of this process's GPUs for a job's ``CUDA_VISIBLE_DEVICES``: indices, UUIDs or MIG names.

    If the variable is set already, its entries are used, since an index would refer to the whole machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if inherited is None else (name.strip() for name in inherited.split(","))
    return list(names)[:count]  # CUDA ends its list at the first entry that names no device


class LocalExecutor:
    """Runs jobs as processes on this machine.

    Args:
        workspace: workspace of the study.
        parallel: jobs at a time; default: one per group of ``workspace.devices`` GPUs, or one without GPUs, so that
            jobs do not disturb each other's timings.
        on_gpus: whether students are trained on GPUs, if there are any.
    """

    def __init__(self, workspace: Workspace, parallel: int | None = None, on_gpus: bool = True) -> None:
        names, each = visible_gpus() if on_gpus else [], workspace.devices
        gpus = len(names)
        if gpus and gpus < each:
            raise InputError(f"devices={each} for each job, but there are {gpus} GPUs: use {gpus} or fewer")
        groups = [",".join(names[n : n + each]) for n in range(0, gpus - each + 1, each)]
        self.capacity = parallel or max(1, len(groups))
        if groups and self.capacity > len(groups):
            raise InputError(
                f"parallel={parallel} jobs of {each} GPUs, but there are {gpus}: use {len(groups)} at most"
            )
        self._workspace, self._stop = workspace, threading.Event()
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in range(self.capacity):
            self._free.put(groups[number] if groups else None)
        self._pool = ThreadPoolExecutor(self.capacity, thread_name_prefix="job")

    def submit(self, job: Job) -> Future[bool]:
        return self._pool.submit(self._run, job)

    def _run(self, job: Job) -> bool:
        devices = self._free.get()
        try:
            return execute(self._workspace, job, devices, self._stop)
        finally:
            self._free.put(devices)

    def explain(self, handle: Future[bool]) -> str:
        error = handle.exception()
        return "" if error is None else f"{type(error).__name__}: {error}"

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class InProcessExecutor:
    """Runs jobs one after another in this process, which saves the seconds that a new process takes to start.

    Args:
        workspace: workspace of the study.
    """

    capacity = 1

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def submit(self, job: Job) -> Future[bool]:
        ended: Future[bool] = Future()
        ended.set_result(execute(self._workspace, job, launch=run_here))
        return ended

    def explain(self, handle: Any) -> str:
        return ""

    def stop(self) -> None:
        """Do nothing: an interrupt has ended the running job already."""


def run_here(
    arguments: list[str], log: Path, variables: dict[str, str], lock: int = -1, stop: threading.Event | None = None
) -> int:
    """Run a command of the program in this process, with its output in ``log``, and return its exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the command.
    """
    others = {name: os.environ.pop(name) for name in set(os.environ) - set(variables)}
    try:
        with output_to(log):
            print(header(arguments), end="")
            try:
                run(arguments)
            except SystemExit as error:
                # Lightning turns Ctrl-C into a plain exit; a run that SIGTERM stopped has written its checkpoint.
                if error.code in (143, INTERRUPTED) or isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from error
                return error.code if isinstance(error.code, int) else int(error.code is not None)
            except Exception:
                traceback.print_exc()
                return 1
    finally:
        os.environ |= others
    return 0


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append to a file all that this process writes to standard output and error, by whatever library."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        # Libraries may hold the streams that they found when they were imported, or write to the descriptors.
        with path.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
            for number in kept:
                os.dup2(file.fileno(), number)
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
