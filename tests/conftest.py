"""Fixtures shared by all tests, and the device that they run on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = ("LibriSpeech", "LibriSpeech_mp3", "fsdd", "lexicon", "manifest.tsv")

NEEDS_CLONE = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no clone")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cuda", "cpu"], help="of tests/gpu, which are skipped without it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products need it
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a suite for the CPU, on a machine with a GPU too
    if config.getoption("--device") is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums depend on it, and processes that tests start have one


@pytest.fixture(scope="session", autouse=True)
def _autograd_begun(request: pytest.FixtureRequest) -> None:
    """If torch's first backward is a compiled one, autograd starts threads, and no forked child can train."""
    import torch  # not before the device is chosen

    if request.config.getoption("--device") != "cuda":
        torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _handlers_as_they_were() -> Iterator[None]:
    """Commands set handlers for the rest of their process, which here runs more tests."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _without_determinism() -> Iterator[None]:
    """``trainer.deterministic`` holds for the rest of a process too."""
    import torch

    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``teacher`` and a ``corpus`` for 3 steps an epoch; some files make a richer one."""
    from tests.helpers import save_corpus, save_teacher  # not before the device is chosen

    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 4})
    return folder


@pytest.fixture(scope="module")
def teacher(inputs: Path) -> Path:
    return inputs / "teacher"


@pytest.fixture(scope="module")
def corpus(inputs: Path) -> Path:
    return inputs / "corpus"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real speech (LibriSpeech subsets); tests that need it skip, saying so, where it is absent."""
    folder = Path(os.environ.get("INTERSTACK_DATA", REPOSITORY.parent / "shared" / "data"))
    if missing := [name for name in REAL_DATA if not (folder / name).exists()]:
        pytest.skip(
            f"no real speech at {folder} (INTERSTACK_DATA): {', '.join(missing)} of the tests' own set is missing"
        )
    return folder


@pytest.fixture(scope="session")
def real_teachers() -> Path:
    """Folder of pretrained encoders, one folder each; tests that need it skip, saying so, where it is absent."""
    folder = Path(os.environ.get("INTERSTACK_TEACHERS", REPOSITORY.parent / "shared" / "teachers"))
    if not any(folder.glob("*/config.json")):
        pytest.skip(f"no teachers at {folder}: set INTERSTACK_TEACHERS to a folder of Hugging Face folders")
    return folder
