"""What is made of the answers of SLURM's programs, here scripts that give what SLURM 22.05 prints."""

import os
from pathlib import Path

import pytest

from experiments.studies.slurm import Queue, explain_end

TIMEOUT = "JobId=12 JobName=x UserId=u(1) JobState=TIMEOUT Reason=TimeLimit Dependency=(null) ExitCode=0:15 Nodes=1"
CANCELLED = "JobId=12 JobName=x JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 ExitCode=0:0"
COMPLETED = "JobId=12 JobName=x JobState=COMPLETED Reason=None ExitCode=0:0"


class Programs:
    """A folder of stand-in programs at the head of PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, name: str, answer: str | None) -> None:
        """Make the program print ``answer``, or fail."""
        path = self.folder / name
        body = "exit 1" if answer is None else f"cat <<'END'\n{answer}\nEND"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Programs(tmp_path)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_job_has_left_when_two_answers_in_a_row_do_not_list_it(programs: Programs) -> None:
    clock = Clock()
    queue = Queue(seconds_between=15, clock=clock)
    found = []
    # Listed, then SLURM does not answer, then not listed twice, with a question between that is not asked.
    for seconds, answer in [(0, "11\n12"), (16, None), (16, "11"), (1, None), (16, "11")]:
        clock.now += seconds
        programs.set("squeue", answer)
        found.append((queue.has_left("12", submitted_at=90.0), queue.has_left("11", submitted_at=90.0)))
    assert found == [(False, False), (False, False), (False, False), (False, False), (True, False)]


def test_a_job_that_was_submitted_after_an_answer_is_not_missing_from_it(programs: Programs) -> None:
    clock = Clock()
    queue = Queue(seconds_between=15, clock=clock)
    programs.set("squeue", "")
    queue.has_left("1", submitted_at=90.0)
    found = []
    for _ in range(3):
        clock.now += 16
        found.append(queue.has_left("13", submitted_at=110.0))
    assert found == [False, True, True]  # control: by then it was missing from two answers


def test_without_slurms_programs_no_job_has_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    queue = Queue(seconds_between=0)
    assert [queue.has_left("1", 0.0) for _ in range(4)] == [False] * 4
    assert explain_end("1") == ""


@pytest.mark.parametrize(
    ("shown", "accounted", "expected"),
    [
        (TIMEOUT, None, "SLURM job 12: TIMEOUT (TimeLimit, exit code 0:15)"),
        (CANCELLED, None, "SLURM job 12: CANCELLED"),
        (COMPLETED, None, ""),
        (None, "OUT_OF_MEMORY|None|0:125", "SLURM job 12: OUT_OF_MEMORY (exit code 0:125)"),
        (None, "", ""),
        (None, None, ""),
    ],
)
def test_the_end_of_a_job_is_named(programs: Programs, shown: str | None, accounted: str | None, expected: str) -> None:
    programs.set("scontrol", shown)
    programs.set("sacct", accounted)
    assert explain_end("12") == expected
