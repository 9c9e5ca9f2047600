"""Two processes train on the recipe's batches, cut between them: the same head as one process, and the same scores.

Nine utterances in batches of eight leave one alone in every second batch, as VoxCeleb1 does at the end of a pass.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.aligned_corpus import save_aligned_corpus
from tests.datamodules.superb import corpora
from tests.ddp.launch import REPOSITORY, environment
from tests.helpers import save_teacher
from tests.patience import PATIENCE

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def call(launcher: list[str], task: list[str], output: Path, devices: int, seed: int) -> tuple[Any, Any]:
    """Result and weights of a call in its own processes."""
    command = [sys.executable, *launcher, "-m", "experiments.cli", "superb", *task]
    command += ["--upstream", str(output.parent / "teacher"), "--data.num_workers", "0"]
    command += ["--updates", "3", "--eval_every", "2", "--lr", "1e-2", "--trainer.devices", str(devices)]
    command += ["--trainer.accelerator", "cpu", "--trainer.progress_bar", "false", "--wandb.mode", "disabled"]
    command += ["--output", str(output), "--seed", str(seed)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = output.glob("*/*/")
    last = folder / "last.ckpt"  # QbE trains nothing
    weights = torch.load(last, weights_only=False)["state_dict"] if last.is_file() else {}
    result = json.loads((folder / "result.json").read_text())
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".txt", ".xml", ".h5")}
    return result | {"files": files}, weights


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest mean over a tensor, since Adam moves a weight with almost no gradient by the sign of its rounding."""
    return max((float((one[key] - value).abs().mean()) for key, value in other.items()), default=0.0)


def speakers(folder: Path) -> list[str]:
    return ["--task", "sid", "--data.root", str(corpora.table(folder / "corpus", train=9))]


def frames(folder: Path) -> list[str]:
    root = save_aligned_corpus(folder / "corpus", {"train": 20, "dev": 3, "test": 3, "other": 3})
    splits = ["--data.train_splits", "[train]", "--data.dev_splits", "[dev]", "--data.test_splits", "[test, other]"]
    return ["--task", "frames", "--preset", "probe", "--data.root", str(root), *splits]


def scores(result: dict[str, Any]) -> list[float]:
    """Scores of the trials of a result's files."""
    return [float(line.split()[1]) for line in result["files"]["test_predict.txt"].decode().splitlines()]


def verification(folder: Path) -> list[str]:
    root = corpora.table(folder / "corpus", train=9, seconds=2.2)
    return ["--task", "asv", "--data.root", str(root), "--data.cache_dir", str(folder / "cache")]


def diarization(folder: Path) -> list[str]:
    """Chunks of several lengths, which count by their frames."""
    return ["--task", "sd", "--data.root", str(corpora.librimix(folder / "corpus", train=9))]


def queries(folder: Path) -> list[str]:
    return ["--task", "qbe", "--data.root", str(corpora.quesst14(folder / "corpus"))]


def emotions(folder: Path) -> list[str]:
    return ["--task", "er", "--preset", "probe", "--data.root", str(corpora.iemocap(folder / "corpus"))]


@pytest.mark.slow
@pytest.mark.parametrize("task", [speakers, frames, verification, diarization, queries])
def test_two_ranks_are_one(task: Callable[[Path], list[str]], tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    options = task(tmp_path)
    one, alone = call([], options, tmp_path / "one", 1, seed=1)
    two, both = call(LAUNCHER, options, tmp_path / "two", 2, seed=1)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert largest_difference(alone, both) < 1e-6
    assert one["files"].keys() == two["files"].keys()
    assert one["files"]
    if task in (speakers, frames, queries):  # whose files have no numbers that rounding changes
        assert two["files"] == one["files"]
    if task is verification:  # two trials, whose order rounding may change
        assert scores(two) == pytest.approx(scores(one), abs=1e-5)
    else:
        assert [two[part] for part in ("dev", "test")] == [
            pytest.approx(one[part], abs=1e-4) for part in ("dev", "test")
        ]
    if one["updates"]:
        _, other = call([], options, tmp_path / "other", 1, seed=2)
        assert largest_difference(alone, other) > 1e-4


@pytest.mark.slow
def test_two_ranks_run_all_folds(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    options = emotions(tmp_path)
    one, _ = call([], options, tmp_path / "one", 1, seed=1)
    two, _ = call(LAUNCHER, options, tmp_path / "two", 2, seed=1)
    assert two["test"] == pytest.approx(one["test"])
    assert {fold: result["test"] for fold, result in two["folds"].items()} == {
        fold: result["test"] for fold, result in one["folds"].items()
    }
