"""One tiny teacher and corpus for all runs; workers of pytest-xdist share them."""

import fcntl
import os
from pathlib import Path

import pytest

from experiments.training.cache_targets import TargetsTrainer
from tests.ddp.scenarios import BATCH_SIZE, UTTERANCES
from tests.helpers import make_data, make_module, save_corpus, save_teacher


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``teacher``, ``corpus`` and caches: ``targets``, ``features`` (of a frozen front end too), ``two``.

    The last is of two segments of each utterance.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ddp"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            save_teacher(folder / "teacher")
            save_corpus(folder / "corpus", {"train": UTTERANCES, "dev": 5}, seconds=(0.1, 0.3))
            writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            data, two = (
                make_data(folder / "corpus", folder / "cache", crop="fixed", batch_size=BATCH_SIZE, **more)
                for more in ({}, {"segments_per_utterance": 2})
            )
            writer.cache_targets(make_module(folder / "teacher"), data, str(folder / "targets"))
            writer.cache_targets(make_module(folder / "teacher"), two, str(folder / "two"))
            frozen = make_module(folder / "teacher", front_end="frozen")
            writer.cache_targets(frozen, data, str(folder / "features"), features="float32")
            (folder / "ready").touch()
    return folder
