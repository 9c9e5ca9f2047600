"""One tiny teacher and corpus for all runs; workers of pytest-xdist share them."""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from tests.ddp.scenarios import UTTERANCES
from tests.helpers import save_corpus, save_teacher


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``teacher`` and ``corpus``."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ddp"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            save_teacher(folder / "teacher")
            save_corpus(folder / "corpus", {"train": UTTERANCES, "dev": 5}, seconds=(0.1, 0.3))
            (folder / "ready").touch()
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """Sums depend on the number of threads, and the launched processes have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
