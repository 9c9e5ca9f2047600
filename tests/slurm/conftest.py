"""A SLURM cluster of two nodes on this machine, for tests of what a site's scheduler does to runs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import save_corpus, save_teacher
from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no SLURM here: Debian's slurm-wlm has {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # of a short path: a socket lies in it
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and a corpus for 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher", layers=12)
    save_corpus(folder / "corpus", {"train": 20, "dev": 4})
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")
