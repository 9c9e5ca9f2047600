"""interstack rescore: a trained head scored with other encoders than its own, without training it again."""

import json
from pathlib import Path

import pytest
import torch
from transformers import HubertModel

from datamodules.errors import InputError
from experiments.cli import run
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from tests.aligned_corpus import save_aligned_corpus
from tests.helpers import save_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, the head of a probe, and three other encoders: equal, wrong, and of another width."""
    folder = tmp_path_factory.mktemp("rescore")
    for name, width in (("own", 16), ("equal", 16), ("wrong", 16), ("wide", 32)):
        save_teacher(folder / name, width=width)
    wrong = HubertModel.from_pretrained(folder / "wrong")
    with torch.no_grad():
        for parameter in wrong.encoder.layers.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wrong.save_pretrained(folder / "wrong")
    root = save_aligned_corpus(folder / "tones", {"train": 4, "test": 3})
    data = TaskData(str(root), train_splits=["train"], dev_splits=["test"], test_splits=["test"], num_workers=0)
    superb_probe(str(folder / "own"), data, str(folder / "superb"), task="frames", updates=20)
    return folder


def rescore(place: Path, output: Path, *names: str) -> None:
    head = place / "superb" / "frames_probe" / "lr0.1_seed0"
    upstreams = json.dumps([str(place / name) for name in names])
    run(["rescore", "--head", str(head), "--upstreams", upstreams, "--output", str(output), "--accelerator", "cpu"])


def test_an_equal_encoder_has_the_scores_of_the_run(place: Path, tmp_path: Path) -> None:
    rescore(place, tmp_path, "own", "equal", "wrong")
    trained = json.loads((place / "superb" / "frames_probe" / "lr0.1_seed0" / "result.json").read_text())
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["task"], result["metric"]) == ("frames", "accuracy")
    own, equal, wrong = result["rows"]
    assert own["scores"] == equal["scores"] == trained["tests"]
    assert wrong["scores"] != trained["tests"]
    assert own["digest"] == equal["digest"] != wrong["digest"]
    score = f"{trained['tests']['test']['accuracy']:.2f}"
    assert f"| {place / 'equal'} | {score} |" in (tmp_path / "report.md").read_text()


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sees 5 hidden states of width 16, but .*wide has 5 of width 32"):
        rescore(place, tmp_path, "own", "wide")
    with pytest.raises(InputError, match="upstreams is empty: give at least one encoder"):
        rescore(place, tmp_path)
    assert list(tmp_path.iterdir()) == []
