"""The device of these checks, and the inputs that they share.

``make test-gpu`` runs them on a CUDA device; ``make test-gpu DEVICE=cpu`` runs all that a CPU can do by the same code.
"""

from pathlib import Path

import pytest
import torch

from tests.gpu.fits import Place
from tests.helpers import save_corpus, save_teacher


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """``cuda`` or ``cpu``, as asked for."""
    asked = request.config.getoption("--device")
    if asked is None:
        pytest.skip("checks of a GPU: make test-gpu")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    return str(asked)


@pytest.fixture(scope="session")
def cuda(device: str) -> torch.device:
    """For what a CPU does not have."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def place(device: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny teacher and corpus."""
    folder = tmp_path_factory.mktemp("gpu")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 24, "dev": 4})
    return Place(folder, device)


@pytest.fixture(autouse=True)
def _as_it_was() -> object:
    """Process-wide switches that a check may have set."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
