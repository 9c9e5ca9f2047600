"""Return a SLURM job to the queue when SLURM says that its time is nearly over.

Only the standard library is imported here, so that the program can listen before its slow imports.
"""

import logging
import os
import re
import signal
import subprocess
import time
from types import FrameType

log = logging.getLogger(__name__)

EXIT_SIGTERM = 128 + signal.SIGTERM  # 143, the shells' exit status of a program that SIGTERM has ended
TRIES, SECONDS_BETWEEN = 3, 5.0
DEFAULT_KILL_WAIT_SECONDS = 30.0  # SLURM's own default

_returned_at: list[float] = []


def under_srun() -> bool:
    """Whether this process is a task of ``srun``, by the rule by which Lightning chooses SLURM's environment."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def listen() -> None:
    """Answer SIGUSR1 by a requeue, and SIGTERM by status 1: right until training starts, when nothing is to be saved.

    Every task does so, not only the first, because some may be in training already. These wait for the others.
    """
    if under_srun():
        signal.signal(signal.SIGUSR1, _leave)
        signal.signal(signal.SIGTERM, _end)


def stop_listening() -> None:
    """Leave SIGUSR1 to others, as before :func:`listen`."""
    if signal.getsignal(signal.SIGUSR1) is _leave:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _leave(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    log.warning("SLURM's signal came before training: there is nothing to save")
    requeue()
    raise SystemExit(EXIT_SIGTERM)


def _end(signum: int, frame: FrameType | None) -> None:
    # Status 143, the default, means that a checkpoint was written. `srun` sends SIGTERM also when another task has
    # died, and the script of the job must see that and start again.
    raise SystemExit(1)


def job_id() -> str:
    """Name this job for ``scontrol``; of an array, this task alone."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def requeue() -> bool:
    """Return this job to the queue; SLURM then ends it. Returns whether SLURM has accepted.

    It is asked up to three times, because the controller of a busy cluster may not answer at once.
    """
    job = job_id()
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(SECONDS_BETWEEN)
        try:
            answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        except OSError as error:
            problem = str(error)  # such as in a container without SLURM's programs
            break
        if answer.returncode == 0:
            _returned_at.append(time.monotonic())
            log.warning("SLURM job %s is back in the queue", job)
            return True
        problem = (answer.stderr or answer.stdout).strip()
    log.error("SLURM job %s could not be returned to the queue (%s): submit the same command again", job, problem)
    return False


def returned() -> bool:
    """Whether this process has returned its job to the queue."""
    return bool(_returned_at)


def seconds_left() -> float:
    """Seconds that this process may still use after a requeue: two thirds of SLURM's ``KillWait``, less those used."""
    return max(0.0, kill_wait_seconds() * 2 / 3 - (time.monotonic() - _returned_at[0]))


def kill_wait_seconds() -> float:
    """Seconds between SLURM's SIGTERM, which a requeue sends at once, and its SIGKILL."""
    try:
        config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    except OSError:
        config = ""
    found = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    return float(found[1]) if found else DEFAULT_KILL_WAIT_SECONDS
