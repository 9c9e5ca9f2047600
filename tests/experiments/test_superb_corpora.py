"""``interstack superb`` on folders in every corpus's published layout, with FBANK and with a tiny encoder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import cli
from tests.datamodules.superb import corpora
from tests.helpers import save_teacher

BUILD: dict[str, Callable[[Path], Path]] = {
    "pr": corpora.librispeech,
    "asr": corpora.librispeech,
    "sf": corpora.snips,
    "ks": corpora.speech_commands,
    "ic": corpora.fluent,
    "sid": corpora.voxceleb1,
}
# Two linear layers on FBANK's 240 features; one hidden state needs no layer weights. IC has 3 + 3 + 2 labels here.
HEADS = {task: 240 * 256 + 256 + 257 * classes for task, classes in {"pr": 74, "ks": 12, "ic": 8, "sid": 1251}.items()}
FILES = {
    "pr": "test-hyp.ark",
    "asr": "test-clean-noLM-hyp.ark",
    "sf": "test-hyp.ark",
    "ks": "test_predict.txt",
    "ic": "test_predict.csv",
    "sid": "test_predict.txt",
}


def superb(task: str, upstream: str, root: Path, output: Path, *more: str, updates: int = 2) -> dict[str, Any]:
    arguments = ["superb", "--task", task, "--upstream", upstream, "--data.root", str(root), "--output", str(output)]
    arguments += ["--updates", str(updates), "--eval_every", "1", "--data.num_workers", "0", "--wandb.mode", "disabled"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.progress_bar", "false"]
    if task == "pr":
        arguments += ["--data.lexicon", str(corpora.lexicon(output.parent / "lexicon.txt"))]
    if task in ("pr", "asr"):
        arguments += ["--data.cache_dir", str(output.parent / "cache")]
    cli.run([*arguments, *more])
    (path,) = (output / task).glob("*/result.json")
    return json.loads(path.read_text()) | {"folder": path.parent}


@pytest.mark.parametrize("task", BUILD)
def test_a_published_layout_gives_a_result(task: str, tmp_path: Path) -> None:
    updates = 1 if task in ("asr", "sf") else 2  # 43 million parameters take seconds each
    result = superb(task, "fbank", BUILD[task](tmp_path / "corpus"), tmp_path / "out", updates=updates)
    assert (result["task"], result["updates"], result["hidden_states"], result["width"]) == (task, updates, 1, 240)
    if task in HEADS:
        assert result["trainable_parameters"] == HEADS[task]
    hypotheses = (result["folder"] / FILES[task]).read_text().splitlines()
    expected = result["utterances"]["test-clean" if task in ("pr", "asr") else "test"]
    assert len([line for line in hypotheses if line.strip()]) in (expected, expected + 1)  # IC's csv has a header


@pytest.mark.parametrize("task", ["pr", "ks", "sid", "sf"])
def test_a_table_gives_a_result_for_every_test_set(task: str, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", layers=2)
    result = superb(task, str(teacher), corpora.table(tmp_path / "corpus"), tmp_path / "out", updates=1)
    assert list(result["tests"]) == ["test", "other"]
    assert result["hidden_states"] == len(result["layer_weights"]) == 3
    assert sum(result["layer_weights"]) == pytest.approx(1)


@pytest.mark.parametrize("task", ["ks", "ic", "sid"])
def test_fbank_makes_mean_pooled_heads_constant(task: str, tmp_path: Path) -> None:
    """The rows of FBANK in SUPERB's table: features without a mean give every utterance one answer."""
    result = superb(task, "fbank", BUILD[task](tmp_path / "corpus"), tmp_path / "out", "--lr", "0.1", updates=8)
    lines = (result["folder"] / FILES[task]).read_text().splitlines()
    answers = {line.replace(",", " ").split(maxsplit=1)[1] for line in lines[1 if task == "ic" else 0 :]}
    assert len(answers) == 1


def test_an_encoder_is_no_constant(tmp_path: Path) -> None:
    """The control: where features have a mean, a few updates tell tones apart."""
    teacher = save_teacher(tmp_path / "teacher", layers=2)
    root = corpora.table(tmp_path / "corpus")
    result = superb("sid", str(teacher), root, tmp_path / "out", "--lr", "0.1", updates=30)
    lines = (result["folder"] / FILES["sid"]).read_text().splitlines()
    assert len({line.split()[1] for line in lines}) > 1


def test_a_missing_corpus_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Fluent Speech Commands is not there"):
        superb("ic", "fbank", tmp_path / "empty", tmp_path / "out")
