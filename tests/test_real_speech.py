"""``interstack fit`` on real speech, with the paper's architecture; only epochs, data and the teacher's weights differ.

The teacher is HuBERT Base with random weights: the released ones cannot be had in a test.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from experiments.training.fit import DistillationCLI
from lightning_modules.growth.policies import POLICIES, default_stages
from tests.conftest import REPOSITORY


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


@pytest.mark.ci
def test_the_loss_falls_while_the_student_grows(
    real_data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(
        real_data,
        teacher,
        tmp_path,
        monkeypatch,
        "--config",
        "interleave_equal",
        "--data.batches_per_epoch",
        "4",
        "--data.max_samples",
        "8000",
    )
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 16
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["depth"], summary["parameters"]) == (12, 26_872_960)
    assert sorted({int(float(row["growth/depth"])) for row in rows}) == [3, 6, 9, 12]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.ci
def test_a_real_whisper_teaches_real_speech_by_the_command_of_its_page(
    real_data: Path, real_teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["fit", "--config", "interleave_equal_whisper", "--data.root", str(real_data / "LibriSpeech")]
    assert " ".join(arguments[:3]) in (REPOSITORY / "docs" / "teachers.md").read_text()
    arguments += ["--model.teacher.init_args.model", str(real_teachers / "whisper_base_encoder")]
    arguments += ["--model.student.hidden_size", "32", "--model.student.intermediate_size", "64"]
    arguments += ["--model.student.num_heads", "2", "--model.student.conv_channels", "16"]
    arguments += ["--data.train_splits", "[train-clean-100]", "--data.val_splits", "[test-clean]"]
    arguments += ["--data.batch_size", "4", "--data.max_samples", "16000", "--data.batches_per_epoch", "5"]
    arguments += ["--data.num_workers", "0", "--model.optimizer.lr", "0.003", "--trainer.max_epochs", "4"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.log_every_n_steps", "1"]
    arguments += ["--trainer.enable_progress_bar", "false", "--log_samples", "false", "--wandb.mode", "disabled"]
    DistillationCLI([*arguments, "--runs_dir", str(tmp_path), "--name", "run"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["depth"], summary["steps"], summary["teacher_precision"]) == (12, 20, "32")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/output"]) for row in csv.DictReader(file) if row["train/output"]]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert sum(losses[-5:]) / 5 < 1.1  # normed targets have variance 1
