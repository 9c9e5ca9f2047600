"""Processes that have at once all that this one has imported: Python, torch and Lightning take seconds to start.

A process of an own start is for what is about the start itself: launchers, imports, the last words of Python.
"""

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from experiments.cli import main
from tests.patience import PATIENCE


def fork(
    target: Callable[..., Any], *args: Any, output: Path | None = None, variables: dict[str, str] | None = None
) -> BaseProcess:
    """``target(*args)`` in a child of one thread, which leads a process group of its own.

    Args:
        target: what the child does; an error, or a ``SystemExit``, is its exit code.
        args: of the target.
        output: file to which the child's standard output and error are appended.
        variables: the whole environment; default: this process's.
    """

    def run() -> None:
        os.setsid()
        torch.set_num_threads(1)
        warnings.resetwarnings()  # pytest's make errors of them, its handlers keep the log
        logging.getLogger().handlers.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if variables is not None:
            os.environ.clear()
            os.environ.update(variables)
        if output is not None:
            with output.open("ab") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
        target(*args)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while process.is_alive() and os.getpgid(process.pid or 0) != process.pid:
        time.sleep(0.001)  # a group that is not there yet cannot be killed
    return process


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the condition holds, and fail if the process, whose work it is, ends before that."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s"
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.02)


@contextmanager
def holding(hold: Callable[[], object], sign: Path) -> Iterator[BaseProcess]:
    """A child that has called ``hold``, and keeps what it holds until it is killed at the end of the context.

    Args:
        hold: what the child does first; what it returns is kept.
        sign: file that the child makes then.
    """

    def run() -> None:
        held = hold()  # noqa: F841 (a lock is released when it is collected)
        sign.touch()
        time.sleep(PATIENCE)

    process = fork(run)
    try:
        while not sign.exists():
            assert process.is_alive()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def fork_program(
    arguments: Sequence[str], output: Path, folder: Path | None = None, variables: dict[str, str] | None = None
) -> BaseProcess:
    """``interstack`` with these arguments, called in ``folder``; the rest as for :func:`fork`."""

    def program() -> None:
        if folder is not None:
            os.chdir(folder)
        sys.argv = ["interstack", *arguments]
        sys.exit(main())

    return fork(program, output=output, variables=variables)


def ended(process: BaseProcess) -> int:
    """The exit code of a process that ends by itself; negative for a signal."""
    process.join(PATIENCE)
    assert process.exitcode is not None, f"waited {PATIENCE} s"
    return process.exitcode


def fork_ranks(target: Callable[..., Any], *args: Any, output: Path, variables: dict[str, str]) -> None:
    """``target(*args)`` in two processes with the variables that ``torchrun`` sets, until both have ended.

    Raises:
        RuntimeError: one of them failed, and the other was killed, or both took longer than ``PATIENCE``.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    ranks = [
        fork(target, *args, output=output, variables=variables | common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    deadline = time.monotonic() + PATIENCE
    while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    if codes != [0, 0]:
        raise RuntimeError(f"two processes ended with {codes} (None: killed):\n{output.read_text()[-6000:]}")
