"""Fixtures of the program's tests: a stand-in for W&B's server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.records.loggers import ResilientWandbLogger
from tests.wandb_server import KEY, WandbServer, wandb_server


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B as on a machine where nobody ever logged in; it keeps the environment of its first use until its end."""
    import wandb

    wandb.teardown()
    # What names W&B's running service stays: a test that ends the service would get its name back afterwards.
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


@pytest.fixture
def server(no_key: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A stand-in server, to which this process and its children are logged in."""
    import wandb

    with wandb_server() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(ResilientWandbLogger, "unreachable", False)
        yield state
        state.fault = "none"
        wandb.teardown()
