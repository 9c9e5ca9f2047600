"""Starts that are refused or warned of because the processes could not find each other."""

import logging
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from datamodules.errors import InputError
from experiments.launch.meeting import refuse_shared_store, warn_if_unreachable
from tests.ddp.launch import REPOSITORY, environment
from tests.patience import PATIENCE

TWO_RANKS = {"TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_restarts_with_the_store_of_the_start_before_are_refused(
    changed: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TWO_RANKS | changed).items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(InputError, match=r"max_restarts 3: .* set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            refuse_shared_store()
    else:
        refuse_shared_store()


def test_without_torchrun_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in TWO_RANKS]:
        monkeypatch.delenv(name)
    refuse_shared_store()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("options", "variable"),
    [
        (["--standalone"], {}),
        # The default rendezvous of one machine does not read the variable.
        (["--master_port=0"], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
    ],
)
def test_torchrun_sets_the_variables_that_are_read(options: list[str], variable: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node=2", "--max_restarts=1"]
    command += ["-m", "experiments.cli", "report", "nowhere"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment() | variable, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "interstack: torchrun --max_restarts 1: ranks that are started again" in done.stderr


@pytest.mark.parametrize(
    ("address", "nodes", "local_rank", "interface", "warned"),
    [
        ("127.0.1.1", 2, 0, None, True),
        (None, 2, 0, None, True),  # a name that leads nowhere
        ("::1", 2, 0, None, True),
        ("10.0.0.7", 2, 0, None, False),
        ("fd00::7", 2, 0, None, False),
        ("127.0.1.1", 1, 0, None, False),
        ("127.0.1.1", 2, 1, None, False),
        ("127.0.1.1", 2, 0, "eth0", False),
    ],
)
def test_a_name_that_other_machines_cannot_reach_is_warned_of(
    address: str | None,
    nodes: int,
    local_rank: int,
    interface: str | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lookup(name: str, port: None) -> list[Any]:
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    with caplog.at_level(logging.WARNING):
        warn_if_unreachable(nodes, local_rank)
    assert [f"node1, leads to {address or '127.0.0.1'}" in text for text in caplog.messages] == [True] * warned
