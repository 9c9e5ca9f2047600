"""Which GPUs the jobs of this machine get."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from datamodules.errors import InputError
from experiments.studies.executors import LocalExecutor, NotNow
from experiments.studies.job import Workspace, execute, read_record
from experiments.studies.loop import Runner
from experiments.studies.plan import Job
from experiments.studies.slurm import MOST_REFUSALS, SlurmExecutor, SlurmSettings
from tests.experiments.studies.test_plan import plan
from tests.experiments.studies.test_runner import Recorder
from tests.patience import PATIENCE


def test_more_gpus_than_there_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert LocalExecutor(Workspace(tmp_path)).capacity == 4
    assert LocalExecutor(Workspace(tmp_path, devices=2)).capacity == 2
    assert LocalExecutor(Workspace(tmp_path), on_gpus=False).capacity == 1  # students that are trained on the CPU
    with pytest.raises(ValueError, match="there are 4 GPUs"):
        LocalExecutor(Workspace(tmp_path, devices=8))
    with pytest.raises(ValueError, match="use 2 at most"):
        LocalExecutor(Workspace(tmp_path, devices=2), parallel=3)


@pytest.mark.parametrize(
    ("inherited", "count", "each", "groups"),
    [
        (None, 2, 1, {"0", "1"}),
        ("2,3", 2, 1, {"2", "3"}),
        ("GPU-8932f937, GPU-46b8eb0c", 2, 2, {"GPU-8932f937,GPU-46b8eb0c"}),
        ("5,-1,6", 1, 1, {"5"}),
    ],
)
def test_jobs_get_the_gpus_that_the_runner_has(
    inherited: str | None,
    count: int,
    each: int,
    groups: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    seen: list[str] = []
    together = threading.Barrier(len(groups))

    def execute(workspace: Workspace, job: Job, visible_devices: str, stop: threading.Event) -> bool:
        seen.append(visible_devices)
        together.wait(timeout=PATIENCE)  # all at once, so that each takes a group of its own
        return True

    monkeypatch.setattr("experiments.studies.executors.execute", execute)
    executor = LocalExecutor(Workspace(tmp_path, devices=each))
    jobs = [executor.submit(Job(str(number), "corpus", [])) for number in range(len(groups))]
    assert all(job.result() for job in jobs)
    executor.stop()
    assert (set(seen), len(seen)) == (groups, len(groups))


@pytest.mark.parametrize(("number", "text"), [(errno.ENOLCK, "cannot be locked"), (None, "")])
def test_a_file_system_without_locks_is_warned_of(
    number: int | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: Any, how: int) -> None:
        if number is not None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("experiments.studies.job.fcntl.flock", flock)
    monkeypatch.setattr("experiments.studies.job._execute", lambda *_: True)
    assert execute(Workspace(tmp_path), Job("one", "corpus", []))
    assert text in caplog.text
    assert bool(caplog.text) == bool(text)


def test_an_error_that_nobody_foresaw_is_in_the_log_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(self: Workspace, job: Job) -> list[str]:
        raise RuntimeError("CUDA")

    monkeypatch.setattr(Workspace, "command", command)
    executor, job = LocalExecutor(Workspace(tmp_path)), Job("one", "corpus", [])
    handle = executor.submit(job)
    assert executor.explain(handle) == "RuntimeError: CUDA"
    assert "Traceback" in (tmp_path / job.folder / "log.txt").read_text()
    assert read_record(tmp_path, "one")["status"] == "failed"
    executor.stop()


def test_a_scheduler_that_takes_no_more_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Busy(Recorder):
        refusals = 2

        def submit(self, job: Job) -> Any:
            if self.refusals and job.kind == "export":
                self.refusals -= 1
                raise NotNow("SLURM refuses the job (Socket timed out)")
            return super().submit(job)

    monkeypatch.setattr("experiments.studies.loop.SECONDS_TO_NEXT_TRY", 0.01)
    workspace = Workspace(tmp_path)
    runner = Runner(plan(tmp_path, only=["a"], seeds=[0]), workspace, Busy(workspace), Console(), poll_seconds=0)
    runner.run()
    assert not runner.failed
    assert set(runner.states.values()) == {"done"}
    assert capsys.readouterr().out.count("Socket timed out); trying again in 0.01 s") == 2


def test_slurms_refusal_ends_a_study_only_where_nothing_else_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from submitit.core.utils import FailedJobError

    def refuse(*_: Any) -> None:
        raise FailedJobError("Socket timed out")

    executor, job = SlurmExecutor(Workspace(tmp_path), SlurmSettings(cluster="local")), Job("one", "corpus", [])
    monkeypatch.setattr(executor._executor, "submit", refuse)
    with pytest.raises(InputError, match="SLURM refuses the job of corpus"):  # it has accepted none
        executor.submit(job)
    running, executor._refused = SimpleNamespace(done=lambda: False), 0
    executor._handles = [running]  # type: ignore[list-item]
    for _ in range(2 * MOST_REFUSALS):
        with pytest.raises(NotNow, match="Socket timed out"):
            executor.submit(job)
    running.done = lambda: True
    for _ in range(MOST_REFUSALS - 1):
        with pytest.raises(NotNow):
            executor.submit(job)
    with pytest.raises(InputError):
        executor.submit(job)
