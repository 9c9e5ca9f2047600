"""Two processes train on the recipe's batches, cut between them: the same head as one process, and the same scores.

Nine utterances in batches of eight leave one alone in every second batch, as VoxCeleb1 does at the end of a pass.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.datamodules.superb import corpora
from tests.ddp.launch import REPOSITORY, environment
from tests.helpers import save_teacher
from tests.patience import PATIENCE

FILES = ("test_predict.txt", "test_truth.txt", "other_predict.txt")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def call(launcher: list[str], root: Path, output: Path, devices: int, seed: int) -> tuple[Any, Any]:
    """Result and weights of a call in its own processes."""
    command = [sys.executable, *launcher, "-m", "experiments.cli", "superb", "--task", "sid"]
    command += ["--upstream", str(root.parent / "teacher"), "--data.root", str(root), "--data.num_workers", "0"]
    command += ["--updates", "3", "--eval_every", "2", "--lr", "1e-2", "--trainer.devices", str(devices)]
    command += ["--trainer.accelerator", "cpu", "--trainer.progress_bar", "false", "--wandb.mode", "disabled"]
    command += ["--output", str(output), "--seed", str(seed)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (output / "sid").iterdir()
    weights = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    result = json.loads((folder / "result.json").read_text())
    return result | {"files": [(folder / name).read_text() for name in FILES]}, weights


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[key] - value).abs().max()) for key, value in other.items())


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    table = corpora.table(tmp_path / "corpus", train=9)
    root = table.parent.parent / "corpus" / table.name
    (tmp_path / "corpus" / "teacher").symlink_to(tmp_path / "teacher")
    one, alone = call([], root, tmp_path / "one", 1, seed=1)
    two, both = call(LAUNCHER, root, tmp_path / "two", 2, seed=1)
    _, other = call([], root, tmp_path / "other", 1, seed=2)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert largest_difference(alone, both) < 1e-5
    assert largest_difference(alone, other) > 1e-3
    assert (two["dev"], two["tests"]) == (one["dev"], one["tests"])
    assert two["files"] == one["files"]
