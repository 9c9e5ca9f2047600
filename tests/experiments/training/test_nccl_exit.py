"""A process that fails alone under NCCL ends at once, instead of waiting for the others at its exit."""

import atexit
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.errors import InputError
from experiments import cli
from experiments.training import nccl_exit
from tests.patience import PATIENCE

PROGRAM = """
import sys
from lightning.fabric.utilities.distributed import _destroy_dist_connection
import atexit, time
from datamodules.errors import InputError
from experiments import cli
from experiments.training import nccl_exit

def wait_for_others():  # what the destruction of a group of NCCL does
    time.sleep(1000)

nccl_exit._destroy_dist_connection = wait_for_others
atexit.register(wait_for_others)
atexit.register(print, "the W&B run is finished")
nccl_exit.others_may_wait = lambda: True

def run(args):
    try:
        raise {error}
    except KeyboardInterrupt:
        sys.exit(1)  # as Lightning does

cli.run = run
sys.argv = ["interstack", "fit"]
sys.exit(cli.main())
"""


@pytest.mark.ci
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("InputError('a.flac: is empty')", 2, "interstack: a.flac: is empty\n"),
        ("ZeroDivisionError('foreseen by nobody')", 1, "ZeroDivisionError: foreseen by nobody\n"),
        ("KeyboardInterrupt", 1, ""),
    ],
)
def test_the_process_ends_with_its_error_and_does_what_is_left_to_do(error: str, status: int, said: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(error=error)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == ("ZeroDivisionError" in error)
    assert done.stdout.endswith("the W&B run is finished\n")


def group(monkeypatch: pytest.MonkeyPatch, backend: str, size: int, joined: bool = True) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: joined)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: size)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)


@pytest.mark.parametrize(
    ("backend", "size", "joined", "expected"),
    [
        ("nccl", 2, True, True),
        ("cpu:gloo,cuda:nccl", 2, True, True),
        ("nccl", 1, True, False),
        ("gloo", 2, True, False),
        ("nccl", 2, False, False),
    ],
)
def test_others_may_wait_only_over_nccl(
    backend: str, size: int, joined: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(monkeypatch, backend, size, joined)
    assert nccl_exit.others_may_wait() == expected
    sent: list[int] = []
    launcher = SimpleNamespace(procs=[SimpleNamespace(send_signal=sent.append)] * 2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    nccl_exit.end_others(trainer)
    assert sent == ([9, 9] if expected else [])
    nccl_exit.end_others(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))  # torchrun and srun start all alike


def test_one_process_returns_its_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(args: Any) -> None:
        raise InputError("no")

    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which the program adds the folder that it is in
    monkeypatch.setattr(cli, "CHATTY_LOGGERS", ())
    monkeypatch.setattr(sys, "argv", ["interstack", "fit"])
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: pytest.fail("the process is not at its end"))
    assert cli.main() == 2
