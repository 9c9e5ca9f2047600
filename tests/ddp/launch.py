"""Start scenarios in several processes, by ``torchrun`` or as children of this one, and never leave one behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from tests.ddp.scenarios import Record, Scenario, dump, run_ranks
from tests.patience import PATIENCE
from tests.processes import fork_ranks

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# What a launcher sets; left over from an outer one it would send these processes elsewhere.
LAUNCHER_PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PL_", "SLURM_")


def environment() -> dict[str, str]:
    """This environment (and so this device) without a launcher's variables, on the loopback interface, one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_PREFIXES)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # What was in it may hold the packages, as on a machine where nothing can be installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }


def launch(scenarios: list[Scenario], folder: Path, processes: int = 2) -> dict[str, Record]:
    """Records of ``scenarios`` by name, run one after another in one set of processes.

    Raises:
        RuntimeError: a process failed, or all of them took longer than ``PATIENCE`` and were killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs, results = folder / "specs.json", folder / "results.json"
    specs.write_text(dump(scenarios))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.ddp.scenarios", str(specs), str(results)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise RuntimeError(f"{processes} processes hung for {PATIENCE} s:\n{output[-6000:]}") from None
    if process.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{output[-6000:]}")
    return json.loads(results.read_text())


def once(folder: Path, make: Callable[[], dict[str, Record]]) -> dict[str, Record]:
    """What ``make`` returns, or returned to another worker of pytest-xdist, which then wrote it into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made.json"
        if not made.is_file():
            made.write_text(json.dumps(make()))
        return json.loads(made.read_text())


def launch_once(scenarios: list[Scenario], folder: Path) -> dict[str, Record]:
    """Records of ``scenarios`` by name, run in two children of this process, once per test run and ``folder``."""

    def make() -> dict[str, Record]:
        results = folder / "results.json"
        fork_ranks(run_ranks, dump(scenarios), results, output=folder / "output.txt", variables=environment())
        return json.loads(results.read_text())

    return once(folder, make)


class Launched:
    """Records of scenarios by name: the first look-up launches all, but those of slow tests apart from the others."""

    def __init__(self, scenarios: Iterable[Scenario], slow: Container[str], folder: Path) -> None:
        self.scenarios, self.slow, self.folder = list(scenarios), slow, folder

    def __getitem__(self, name: str) -> Record:
        part = [scenario for scenario in self.scenarios if (scenario.name in self.slow) == (name in self.slow)]
        return launch_once(part, self.folder / ("slow" if name in self.slow else "fast"))[name]


def ranks_agree(record: Record) -> list[bool]:
    """Per step: do all ranks hold the same parameters, buffers and optimizer state, bit for bit?"""
    assert all(len(step["checksums"]) == 2 for step in record["steps"])
    return [step["checksums"][0] == step["checksums"][1] for step in record["steps"]]
