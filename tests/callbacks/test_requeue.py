"""Asking SLURM for a requeue, with a stand-in `scontrol`; the real one is asked in tests/slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from callbacks import requeue
from tests.ddp.launch import REPOSITORY, environment
from tests.patience import PATIENCE

VARIABLES = {"SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `scontrol` writes down what it is asked for, and fails as often as `failures` says."""
    script = tmp_path / "scontrol"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/requests\n'
        f"if [ -s {tmp_path}/failures ]; then sed -i 1d {tmp_path}/failures; echo busy >&2; exit 1; fi\n"
    )
    script.chmod(0o755)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(requeue, "_announced", [])
    monkeypatch.setattr(requeue, "_before", [])
    left(tmp_path, "1:20")
    return tmp_path


def left(folder: Path, answer: str | None) -> None:
    """Make `squeue` print the time that is left, or fail."""
    (folder / "squeue").write_text(f"#!/bin/sh\n{f'echo {answer}' if answer else 'exit 1'}\n")
    (folder / "squeue").chmod(0o755)


def requests(folder: Path) -> list[str]:
    return (folder / "requests").read_text().splitlines()


@pytest.mark.parametrize(("failures", "accepted"), [(0, True), (2, True), (3, False)])
def test_a_busy_controller_is_asked_three_times(scontrol: Path, failures: int, accepted: bool) -> None:
    (scontrol / "failures").write_text("once\n" * failures)
    assert requeue.requeue() is accepted
    assert requests(scontrol) == ["requeue 123"] * min(3, failures + 1)


@pytest.mark.parametrize(
    ("answer", "preempted"),
    [("PreemptEligibleTime=2026-11-30T10:00:00 PreemptTime=2026-11-30T12:00:00", True), ("PreemptTime=None", False)],
)
def test_a_preempted_job_is_known(scontrol: Path, answer: str, preempted: bool) -> None:
    script = scontrol / "scontrol"
    script.write_text(f'{script.read_text()}echo "JobId=123 {answer} SuspendTime=None"\n')
    assert requeue.is_preempted() is preempted
    assert requests(scontrol) == ["show job --oneliner 123"]


def test_without_slurms_programs_no_job_is_preempted(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scontrol / "empty"))
    assert not requeue.is_preempted()


def test_of_an_array_only_this_task_is_requeued(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue.requeue()
    assert requests(scontrol) == ["requeue 120_3"]


def test_without_scontrol_the_log_says_what_to_do(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(scontrol / "empty"))
    assert not requeue.requeue()
    assert "submit the same command again" in caplog.text


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [("1:20", 15), ("0:40", 10), ("2-01:00:00", 15), ("UNLIMITED", 15), ("INVALID", 0), (None, 0)],
)
def test_what_runs_before_a_requeue_gets_a_quarter_of_the_time_left(
    scontrol: Path, answer: str | None, seconds: float
) -> None:
    left(scontrol, answer)
    given: list[tuple[float, bool]] = []
    requeue.before_requeue(lambda most: given.append((most, (scontrol / "requests").exists())))
    requeue.before_requeue(lambda most: given.append((-1, False)))()  # taken back
    assert not requeue.announced()
    requeue.requeue()
    assert given == [(seconds, False)]
    assert requeue.announced()


def test_what_fails_before_a_requeue_does_not_cost_it(scontrol: Path, caplog: pytest.LogCaptureFixture) -> None:
    requeue.before_requeue(lambda most: print(1 / 0))
    assert requeue.requeue()
    assert requests(scontrol) == ["requeue 123"]
    assert "ZeroDivisionError" in caplog.text


def test_the_time_left_is_read_as_slurm_writes_it(scontrol: Path) -> None:
    found = []
    for answer in ("0:09", "59:00", "3:02:01", "1-00:00:01"):
        left(scontrol, answer)
        found.append(requeue.seconds_left("123"))
    assert found == [9, 3540, 10921, 86401]


STARTING = """
import sys, time
from experiments.cli import main
import callbacks.requeue
sys.argv = ["interstack", "--version"]
main()
print("listening", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(("name", "status"), [("train", 7), ("interactive", -signal.SIGTERM)])
def test_sigterm_at_the_end_changes_nothing_of_a_task(scontrol: Path, name: str, status: int) -> None:
    """SLURM sends it when another task requeues the job; Python's exit would end in a traceback."""
    variables = {**environment(), **VARIABLES, "SLURM_JOB_NAME": name, "PATH": os.environ["PATH"]}
    program = "import sys; from experiments.cli import main; sys.argv = ['interstack', 'nothing']; main(); "
    program += "print('ended', flush=True); input(); sys.exit(7)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=variables, cwd=REPOSITORY, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"ended\n"
        process.terminate()
        _, errors = process.communicate(b"\n", timeout=PATIENCE)
    assert process.returncode == status
    assert b"Traceback" not in errors


def test_a_signal_that_came_while_python_started_is_answered_by_the_first_line(scontrol: Path) -> None:
    """As under slurm.sbatch, where `env --block-signal` holds it back; here it is there before Python is."""
    variables = {**environment(), **VARIABLES, "PATH": os.environ["PATH"]}
    program = f"kill -USR1 $$; exec {sys.executable} -c 'from experiments.cli import main; main()'"
    command = ["env", "--block-signal=USR1", "sh", "-c", program]
    done = subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, timeout=PATIENCE)
    assert done.returncode == requeue.EXIT_SIGTERM, done.stderr
    assert requests(scontrol) == ["requeue 123"]


@pytest.mark.parametrize(
    ("name", "sent", "status", "asked"),
    [
        ("train", signal.SIGUSR1, requeue.EXIT_SIGTERM, ["requeue 123"]),
        ("train", signal.SIGTERM, 1, None),
        ("interactive", signal.SIGUSR1, -signal.SIGUSR1, None),
        ("interactive", signal.SIGTERM, -signal.SIGTERM, None),
    ],
)
def test_the_program_answers_signals_from_its_start_if_it_is_a_task_of_srun(
    scontrol: Path, name: str, sent: signal.Signals, status: int, asked: list[str] | None
) -> None:
    """The interactive job, in which Lightning does not use SLURM either, is the control."""
    variables = {**environment(), **VARIABLES, "SLURM_JOB_NAME": name, "PATH": os.environ["PATH"]}
    process = subprocess.Popen([sys.executable, "-c", STARTING], env=variables, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while b"listening" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(sent)
    assert process.wait(timeout=PATIENCE) == status
    process.stdout.close()
    assert (requests(scontrol) if (scontrol / "requests").exists() else None) == asked
