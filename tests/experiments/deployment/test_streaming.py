"""interstack streaming: differences by setting, and heads scored on streamed states."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.errors import InputError
from experiments.cli import run
from experiments.deployment.streaming import Difference
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData
from tests.aligned_corpus import save_aligned_corpus
from tests.helpers import save_corpus, save_teacher, save_whisper

SIZES = ["--hop", "[0.1]", "--left_context", "[0.1, 9]", "--look_ahead", "[0, 9]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a corpus, and a head that was trained on them."""
    folder = tmp_path_factory.mktemp("streaming")
    save_teacher(folder / "encoder")
    root = save_aligned_corpus(folder / "tones", {"train": 4, "test": 3})
    data = TaskData(str(root), train_splits=["train"], dev_splits=["test"], test_splits=["test"], num_workers=0)
    superb_probe(str(folder / "encoder"), data, str(folder / "superb"), task="frames", updates=20)
    return folder


def head_of(place: Path) -> Path:
    return place / "superb" / "frames_probe" / "lr0.1_seed0"


def streaming(place: Path, output: Path, *more: str, encoder: str = "encoder") -> dict[str, Any]:
    arguments = ["--upstream", str(place / encoder), "--root", str(place / "tones" / "test"), "--accelerator", "cpu"]
    run(["streaming", *arguments, "--output", str(output), *SIZES, *more])
    return json.loads((output / "result.json").read_text())


def test_every_setting_is_compared_with_the_whole(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = streaming(place, tmp_path)
    rows = {(row["left_context"], row["look_ahead"]): row for row in result["settings"]}
    assert set(rows) == {(5, 0), (5, 450), (450, 0), (450, 450)}
    assert all(len(row[key]) == 5 for row in rows.values() for key in ("relative_l2", "cosine"))
    assert max(rows[450, 450]["relative_l2"]) < 1e-5
    assert min(rows[450, 450]["cosine"]) > 0.99999
    assert min(rows[5, 0]["relative_l2"]) > 0.05  # control
    assert rows[450, 0]["relative_l2"][-1] < rows[5, 0]["relative_l2"][-1]
    assert rows[5, 0]["latency_ms"] == pytest.approx(105)
    assert rows[5, 0]["compute_factor"] == 2
    assert 1.5 < rows[5, 0]["compute_factor_here"] < 2
    assert rows[450, 450]["compute_factor_here"] < 30 < rows[450, 450]["compute_factor"]
    report = (tmp_path / "report.md").read_text()
    assert "| 0.1, 9, 0 | 105 | 91.00" in report
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "report.md", "context.png"}


@pytest.mark.ci
def test_a_head_is_scored_on_streamed_states(place: Path, tmp_path: Path) -> None:
    result = streaming(place, tmp_path, "--head", str(head_of(place)), "--retrain", "true")
    trained = json.loads((head_of(place) / "result.json").read_text())
    assert (result["head"]["task"], result["head"]["metric"]) == ("frames", "accuracy")
    assert result["head"]["whole"] == trained["tests"]
    short, *_, whole = result["settings"]
    assert whole["scores"]["test"] == pytest.approx(trained["tests"]["test"], abs=0.5)
    assert short["scores"] != trained["tests"]  # control
    assert set(whole["retrained"]["test"]) == set(trained["tests"]["test"])
    assert short["retrained"] != short["scores"]
    heads = tmp_path / "heads"
    digests = {json.loads(path.read_text())["upstream_digest"] for path in heads.glob("*/config.json")}
    assert len(digests | {trained["config"]["upstream_digest"]}) == 5
    table = [line.split("|") for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    title, _, first = table[:3]
    assert [name.strip() for name in title[-3:-1]] == ["accuracy, test", "accuracy, test, retrained"]
    assert [value.strip() for value in first[-3:-1]] == [f"{trained['tests']['test']['accuracy']:.2f}"] * 2


def test_differences_of_known_states() -> None:
    wanted = [torch.tensor([[3.0, 4.0], [0.0, 5.0]])]
    found = [torch.tensor([[3.0, 4.0], [5.0, 0.0]])]
    difference = Difference.of([(found, wanted)])
    assert difference.relative_l2 == pytest.approx([1.0])
    assert difference.cosine == pytest.approx([0.5])
    both = Difference.of([(found, wanted), (wanted, wanted)])
    assert both.relative_l2 == pytest.approx([0.5**0.5])
    assert both.cosine == pytest.approx([0.75])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hop": "[0]"}, "hop=0 s: give a multiple of 0.02 s"),
        ({"hop": "[0.01]"}, "hop=0.01 s: give a multiple of 0.02 s"),
        ({"left_context": "[-0.2]"}, "left_context=-0.2 s: give a multiple of 0.02 s"),
        ({"look_ahead": "[]"}, "hop, left_context and look_ahead need at least one value each"),
        ({"retrain": "true"}, "--retrain true trains heads like that of --head: give --head"),
    ],
)
def test_settings_that_cannot_be_are_refused(sizes: dict[str, str], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        streaming(place, tmp_path, *(word for name, value in sizes.items() for word in (f"--{name}", value)))
    assert list(tmp_path.iterdir()) == []


def test_encoders_and_heads_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    save_teacher(place / "shallow", layers=3)
    save_teacher(place / "wide", width=18)
    save_whisper(place / "whisper")
    head = ["--head", str(head_of(place))]
    for encoder, message in (
        ("shallow", r"sees 5 hidden states of width 16, but \S+ has 4 of width 16: give its own encoder, --upstream"),
        ("wide", r"sees 5 hidden states of width 16, but \S+ has 5 of width 18: give its own encoder, --upstream"),
        ("whisper", "is a Whisper encoder, whose positions are absolute"),
    ):
        with pytest.raises(InputError, match=message):
            streaming(place, tmp_path, *head, encoder=encoder)
    with pytest.raises(InputError, match="was trained on an encoder of other weights or another --normalize"):
        streaming(place, tmp_path, *head, "--normalize", "true")
    with pytest.raises(InputError, match=r"is no run of `interstack superb`: give the folder with config.json"):
        streaming(place, tmp_path, "--head", str(place))
    save_corpus(place / "short" / "test", {"dev": 1}, seconds=(0.01, 0.02))
    with pytest.raises(InputError, match=r"the utterances below .* are shorter than a frame"):
        streaming(place, tmp_path, "--root", str(place / "short"))
