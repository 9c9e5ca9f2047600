"""Return a SLURM job to the queue when SLURM says that its time is nearly over.

Only the standard library is imported here, so that the program can listen before its slow imports.
"""

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)

EXIT_SIGTERM = 128 + signal.SIGTERM  # 143, the shells' exit status of a program that SIGTERM has ended
TRIES, SECONDS_BETWEEN = 3, 5.0
MOST_SECONDS_BEFORE = 15.0

_announced: list[bool] = []
_before: list[Callable[[float], None]] = []


def under_srun() -> bool:
    """Whether this process is a task of ``srun``, by the rule by which Lightning chooses SLURM's environment."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def listen() -> None:
    """Answer SIGUSR1 by a requeue, and SIGTERM by status 1: right until training starts, when nothing is to be saved.

    Every task does so, not only the first, because some may be in training already. These wait for the others. A signal
    that the job's script has blocked, so that it does not end Python while it starts, arrives now.
    """
    if under_srun():
        signal.signal(signal.SIGUSR1, _leave)
        signal.signal(signal.SIGTERM, _end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def stop_listening() -> None:
    """Leave SIGUSR1 to others, as before :func:`listen`."""
    if signal.getsignal(signal.SIGUSR1) is _leave:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def ignore_end() -> None:
    """Ignore SIGTERM from now on if :func:`listen` answers it: this process ends anyway, and with its own status."""
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    log.warning("SLURM's signal came outside training: there is nothing to save")
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

    It is asked up to three times, because the controller of a busy cluster may not answer at once. Before it is, the
    actions of :func:`before_requeue` run: with the requeue SLURM ends every process of the job, also those that send
    what a logger has not sent yet.
    """
    announce()
    job, problem = job_id(), ""
    seconds = min(MOST_SECONDS_BEFORE, seconds_left(job) / 4)
    for action in list(_before):
        try:
            action(seconds)
        except Exception:  # whatever it is must not cost the requeue
            log.exception("before the requeue of SLURM job %s", job)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(SECONDS_BETWEEN)
        try:
            answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        except OSError as error:
            problem = str(error)  # such as in a container without SLURM's programs
            break
        if answer.returncode == 0:
            log.warning("SLURM job %s is back in the queue", job)
            return True
        problem = (answer.stderr or answer.stdout).strip()
    log.error("SLURM job %s could not be returned to the queue (%s): submit the same command again", job, problem)
    return False


def is_preempted() -> bool:
    """Ask SLURM whether it has preempted this job, which it tells with the SIGTERM that begins the grace time."""
    try:
        words = ["scontrol", "show", "job", "--oneliner", job_id()]
        text = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return re.search(r"\bPreemptTime=\d", text) is not None  # else None


def announce() -> None:
    """Note that this process will return its job to the queue, so that what ends meanwhile is no failure."""
    _announced.append(True)


def announced() -> bool:
    """Whether this process returns its job to the queue."""
    return bool(_announced)


def before_requeue(action: Callable[[float], None]) -> Callable[[], None]:
    """Register an action that runs before the requeue, within the seconds that it gets; return its removal."""
    _before.append(action)
    return lambda: _before.remove(action) if action in _before else None


def seconds_left(job: str) -> float:
    """Ask SLURM for the seconds that are left to the job until its time limit; 0 if there is no answer."""
    try:
        words = ["squeue", "--noheader", "--format=%L", "--job", job]
        text = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return 0.0
    if text == "UNLIMITED":
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
