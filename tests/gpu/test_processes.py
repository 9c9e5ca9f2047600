"""DDP on a GPU: one process over NCCL, two over gloo that share the device."""

from pathlib import Path

import pytest
import torch

from tests.ddp.launch import launch, ranks_agree
from tests.ddp.scenarios import BATCH_SIZE, UTTERANCES, Scenario
from tests.gpu.fits import Place
from tests.helpers import save_corpus, save_teacher


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": UTTERANCES, "dev": BATCH_SIZE}, seconds=(0.1, 0.3))
    return folder


def test_one_process_over_nccl_grows(cuda: torch.device, home: Path) -> None:
    scenario = Scenario("nccl", str(home), accelerator="gpu", backend="nccl", optimizer="adamw-fused")
    record = launch([scenario], home / "nccl", processes=1)["nccl"]
    assert record["growths"] == [2, 3, 4]
    assert len(record["steps"]) == 8
    assert record["wrapper_settings"]  # there was a wrapper


def test_two_processes_agree_after_every_growth(place: Place, home: Path) -> None:
    common = {"accelerator": place.accelerator, "optimizer": "adamw-fused"}
    kept = Scenario("gloo", str(home), **common)
    drifting = Scenario("gloo without the re-wrap", str(home), fault="no_rewrap", verify=False, **common)
    records = launch([kept, drifting], home / "gloo")
    assert records["gloo"]["growths"] == [2, 3, 4]
    assert all(ranks_agree(records["gloo"]))
    assert not all(ranks_agree(records["gloo without the re-wrap"]))
