"""``interstack fit`` on real speech, with the paper's architecture; only epochs, data and the teacher's weights differ.

The teacher is HuBERT Base with random weights: the released ones cannot be had in a test.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from callbacks.policies import POLICIES, default_stages
from experiments.training import DistillationCLI


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        HubertModel(HubertConfig()).save_pretrained(folder)
    return folder


def fit(real_data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """The folder of a run with the recipe of the signatures, shortened."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    roots = [str(real_data / name) for name in ("LibriSpeech", "LibriSpeech_many_speakers")]
    arguments = ["fit", "--runs_dir", str(tmp_path), "--name", "run", "--data.root", json.dumps(roots)]
    arguments += ["--data.train_splits", "[train-clean-100]", "--data.val_splits", "[test-clean]"]
    arguments += ["--data.batch_size", "2", "--data.max_samples", "16000", "--data.num_workers", "0"]
    arguments += ["--model.teacher.init_args.model", str(teacher), "--model.teacher.init_args.normalize", "false"]
    arguments += ["--trainer.max_epochs", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    arguments += ["--wandb.mode", "disabled", "--log_samples", "false", "--checkpoint.every_n_steps", "0", *more]
    DistillationCLI(arguments)
    return tmp_path / "run"


@pytest.mark.slow  # tiny students are grown by every policy in other tests
@pytest.mark.parametrize(("policy", "offset"), [*((policy, "last") for policy in POLICIES), ("interleaved", "first")])
def test_every_policy_grows_the_papers_student(
    policy: str, offset: str, real_data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    few += ["--checkpoint.keep_stages", "false", "--growth.policy", policy, "--growth.offset", offset]
    run = fit(real_data, teacher, tmp_path, monkeypatch, *few)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["depth"], summary["parameters"], summary["steps"]) == (12, 26_872_960, 4)
    events = json.loads((run / "growth.json").read_text())
    assert [event["depth"] for event in events] == list(default_stages(policy)[1:])
    sizes = {3: 10_902_784, 6: 16_226_176, 9: 21_549_568, 12: 26_872_960}
    assert all(event["parameters"] == sizes[event["depth"]] for event in events)


def test_the_loss_falls_while_the_student_grows(
    real_data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(
        real_data, teacher, tmp_path, monkeypatch, "--config", "interleave_equal", "--data.batches_per_epoch", "6"
    )
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 24
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["depth"], summary["parameters"]) == (12, 26_872_960)
    assert sorted({int(float(row["growth/depth"])) for row in rows}) == [3, 6, 9, 12]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
