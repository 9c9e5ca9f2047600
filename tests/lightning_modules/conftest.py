"""Fixtures that several files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.lightning_modules.graphs import GRAPHS, Graphs
from tests.lightning_modules.teachers import FAMILIES, save_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, config()) for name, config in FAMILIES.items()}


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    if "counting" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(GRAPHS, name="counting")
    torch._dynamo.reset()
    counters.clear()
    GRAPHS.count = 0
    with torch._dynamo.config.patch(recompile_limit=8):  # put back what compiling raises
        yield GRAPHS
    torch._dynamo.reset()
