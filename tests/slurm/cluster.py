"""A SLURM of this test run: a controller, two nodes and munge in a folder, on 127.0.0.1, beside any other SLURM."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.ddp.launch import REPOSITORY, environment
from tests.patience import PATIENCE

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATHS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # where daemons are, of a user who is not root too
KILL_WAIT_SECONDS = 10
GRACE_SECONDS = 120  # from the signal that a job is preempted to its end

CONFIG = """
ClusterName=interstack
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=10
KillWait={kill_wait}
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=8 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=8 RealMemory=8000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing_programs() -> list[str]:
    """Name SLURM's and munge's programs that this machine lacks."""
    path = os.pathsep.join([os.environ["PATH"], *PATHS])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """Starts and ends the daemons, and speaks to them by SLURM's own commands.

    Args:
        folder: folder of everything that the daemons write; its path must be short, as munge's socket lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = environment() | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], *PATHS]),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the names of the nodes cannot be looked up
            "WANDB_MODE": "disabled",
        }
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o600)
        controller, first, second = free_ports(3)
        values = {"controller": controller, "first": first, "second": second, "user": getpass.getuser()}
        values |= {"kill_wait": KILL_WAIT_SECONDS, "grace": GRACE_SECONDS}
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, **values))

    def start(self) -> None:
        munge = self.folder / "munge"
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", "--force", *(f"--{option}={munge / name}" for option, name in options.items()))
        self.call("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes")

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", name)

    def stop(self) -> None:
        with contextlib.suppress(AssertionError):  # the controller may not have started
            self.clear()
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError, ValueError):
                process = int((self.folder / name).read_text())
                os.kill(process, signal.SIGTERM)
                self.wait(lambda number=process: not Path(f"/proc/{number}").exists(), f"the end of {name}")

    def clear(self) -> None:
        """Cancel all jobs."""
        self.call("scancel", "--user", getpass.getuser())

    def kill_node(self, name: str) -> None:
        """End the node as a power cut would: its daemon, those of its job steps, and every process of its jobs."""
        daemons = holders(self.folder / f"slurmd-{name}.log")
        for process in [*daemons, *processes_of(name)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def call(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command against this cluster and return what it prints."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise AssertionError(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, folder: Path, options: list[str], arguments: list[str], **variables: str) -> str:
        """Submit the shipped script from ``folder`` for two CPU nodes of one task; return the job's id."""
        script = REPOSITORY / "experiments" / "launch" / "slurm.sbatch"
        sizes = ["--ntasks-per-node", "1", "--gres", "none", "--cpus-per-task", "2", "--signal", "SIGUSR1@30"]
        words = ["sbatch", "--parsable", *sizes, *options, str(script), *arguments]
        return self.call(*words, cwd=folder, **variables).strip()

    def fields(self, job: str) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        text = self.call("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def state(self, job: str) -> str:
        return self.fields(job)["JobState"]

    def restarts(self, job: str) -> int:
        """Number of times that the job went back into the queue."""
        return int(self.fields(job)["Restarts"])

    def hurry(self, job: str) -> None:
        """Start a job that was requeued; SLURM lets it wait for two minutes."""
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def finish(self, job: str) -> str:
        """Wait until the job has ended for good, and return its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        def over() -> bool:
            fields = self.fields(job)
            if fields["JobState"] == "PENDING" and fields["Restarts"] != "0":
                with contextlib.suppress(AssertionError):  # it may have started meanwhile
                    self.hurry(job)
            return fields["JobState"] in ended

        self.wait(over, f"the end of job {job}")
        return self.state(job)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come in {PATIENCE} s")
            time.sleep(0.3)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processes_of(node: str) -> Iterator[int]:
    """List the processes of jobs on a node, by the variable that SLURM gives them."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def holders(file: Path) -> list[int]:
    """List the processes that have the file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == file:
                found.append(int(link.parts[2]))
    return sorted(set(found))
