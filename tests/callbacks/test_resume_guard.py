"""A checkpoint continues only in its own run, and the command line decides what a resumed run is."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from callbacks.resume_guard import differences
from experiments.training.fit import DistillationCLI
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_corpus, save_teacher
from tests.tiny_run import fit


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers and a wider one, two corpora, and in ``runs/whole`` a run of 4 epochs with 3 steps each."""
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher")
    save_teacher(folder / "wider", width=32)
    other = save_teacher(folder / "other")
    model = HuggingFaceTeacher(str(other)).model
    with torch.no_grad():
        model.encoder.layers[0].attention.q_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    save_corpus(folder / "corpus", {"train": 12, "dev": 4})
    save_corpus(folder / "other_corpus", {"train": 12, "dev": 4}, seed=1)
    fit(folder, "--name", "whole")
    return folder


def checkpoint(inputs: Path, step: int) -> Path:
    return inputs / "runs" / "whole" / "checkpoints" / f"step={step:09d}.ckpt"


EMA = ["--trainer.callbacks+=callbacks.ema.StudentEMA", "--trainer.callbacks.decay=0.9"]
OTHER_SETTINGS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "policy": (lambda _: ["--growth.policy", "midas"], r"growth.policy was interleaved, is midas"),
    "schedule": (
        lambda _: ["--growth.schedule", "explicit-1,2,3", "--trainer.max_epochs", "5"],
        r"growth.schedule was equal, is explicit-1,2,3; growth.stage_epochs was \[1, 1, 1, 1\], is \[1, 1, 1, 2\]",
    ),
    "epochs": (lambda _: ["--trainer.max_epochs", "8"], r"growth.stage_epochs was \[1, 1, 1, 1\], is \[2, 2, 2, 2\]"),
    "teacher": (lambda i: ["--model.teacher.init_args.model", str(i / "other")], r"teacher was \w{16}, is \w{16}"),
    "wider teacher": (
        lambda i: ["--model.teacher.init_args.model", str(i / "wider")],
        r"teacher was \w{16}, is \w{16}",
    ),
    "corpus": (lambda i: ["--data.root", str(i / "other_corpus")], r"data.row_hash was \w+, is \w+"),
    "seed": (lambda _: ["--seed_everything", "7"], r"data.seed was 0, is 7; model.seed was 0, is 7"),
    "learning rate": (
        lambda _: ["--model.optimizer.lr", "1e-2"],
        r"model.optimizer.lr was 0.0005, is 0.01",
    ),
    "student": (lambda _: ["--model.student.hidden_size", "32"], r"model.student.hidden_size was 16, is 32"),
    "front end": (
        lambda _: ["--model.student.front_end", "shared"],
        r"model.student.front_end was trained, is frozen",
    ),
    "average": (lambda _: EMA, r"ema.decay was not set, is 0.9; ema.every_n_steps was not set, is 1"),
    "batch": (lambda _: ["--data.batch_size", "6"], r"data.batch_size was 4, is 6"),
    "steps per epoch": (lambda _: ["--trainer.limit_train_batches", "2"], r"steps.per_epoch was 3, is 2"),
    "length of the schedule": (lambda _: ["--model.total_steps", "100"], r"steps.total was None, is 100"),
    "normalisation": (
        lambda _: ["--model.teacher.init_args.normalize", "true"],
        r"waveforms.normalize was False, is True",
    ),
    "clipping": (
        lambda _: ["--trainer.gradient_clip_val", "0.5", "--trainer.gradient_clip_algorithm", "value"],
        r"trainer.gradient_clip_algorithm was None, is value; trainer.gradient_clip_val was 5.0, is 0.5",
    ),
    "precision": (
        lambda _: ["--trainer.precision", "bf16-mixed"],
        r"trainer.precision was 32-true, is bf16-mixed",
    ),
    "precision by a plugin": (
        lambda _: [
            "--trainer.plugins",
            '{"class_path": "MixedPrecision", "init_args": {"precision": "bf16-mixed", "device": "cpu"}}',
        ],
        r"trainer.precision was 32-true, is bf16-mixed",
    ),
    "teacher's precision": (
        lambda _: ["--model.teacher.init_args.precision", "bf16"],
        r"teacher_settings.precision was auto, is bf16",
    ),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_another_runs_checkpoint_is_refused_by_what_differs(name: str, inputs: Path, tmp_path: Path) -> None:
    settings, message = OTHER_SETTINGS[name]
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(checkpoint(inputs, 5))]
    with pytest.raises(ValueError, match=f"belongs to another run: .*{message}.*--allow-config-change"):
        fit(inputs, *place, *settings(inputs))


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")  # told as it should be
@pytest.mark.parametrize("name", ["policy", "teacher", "corpus", "seed", "learning rate", "average"])
def test_it_is_taken_when_that_is_asked_for(name: str, inputs: Path, tmp_path: Path) -> None:
    settings, _ = OTHER_SETTINGS[name]
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(checkpoint(inputs, 5))]
    cli = fit(inputs, *place, *settings(inputs), "--allow-config-change")
    assert cli.trainer.global_step == 12
    assert cli.model.student.depth == 4


def test_what_an_older_checkpoint_does_not_record_is_not_compared(inputs: Path, tmp_path: Path) -> None:
    older = torch.load(checkpoint(inputs, 9), weights_only=True)
    for part in ("waveforms", "steps", "model"):
        del older["interstack"]["fingerprint"][part]
    torch.save(older, tmp_path / "older.ckpt")
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "older.ckpt")]
    assert fit(inputs, *place, "--model.total_steps", "12").trainer.global_step == 12


def test_a_setting_that_an_older_checkpoint_records_though_it_is_not_used_is_no_difference(
    inputs: Path, tmp_path: Path
) -> None:
    older = torch.load(checkpoint(inputs, 9), weights_only=True)
    model = older["interstack"]["fingerprint"]["model"]
    model["student"] = asdict(StudentConfig()) | model["student"]
    model["objective"] = asdict(ObjectiveConfig()) | model["objective"]
    torch.save(older, tmp_path / "older.ckpt")
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(tmp_path / "older.ckpt")]
    assert fit(inputs, *place).trainer.global_step == 12
    model["student"]["time_reduction"] = 2  # the control
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"another run: model\.student\.time_reduction was 2, is not set\."):
        fit(inputs, *place, "--name", "control")


def test_last_is_guarded_like_a_path(inputs: Path, tmp_path: Path) -> None:
    place = ["--runs_dir", str(tmp_path), "--name", "one"]
    fit(inputs, *place, "--ckpt_path", str(checkpoint(inputs, 9)))
    with pytest.raises(ValueError, match=r"growth\.policy was interleaved, is midas"):
        fit(inputs, *place, "--ckpt_path", "last", "--growth.policy", "midas")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look-up
@pytest.mark.parametrize(
    "settings",
    [
        ["--trainer.accumulate_grad_batches", "2"],
        ["--data.num_workers", "1"],
        ["--name", "renamed"],
        pytest.param(
            ["--model.teacher.init_args.compile", "true", "--model.teacher.init_args.compile_backend", "eager"],
            marks=pytest.mark.slow,
        ),
        ["--max_batch_per_device", "1"],
        pytest.param(
            ["--model.student.compile", "true", "--model.student.compile_backend", "eager"], marks=pytest.mark.slow
        ),
        ["--trainer.log_every_n_steps", "1", "--growth.measure_loss", "false", "--checkpoint.every_n_steps", "2"],
    ],
)
def test_how_a_run_is_run_may_change(settings: list[str], inputs: Path, tmp_path: Path) -> None:
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(checkpoint(inputs, 6))]
    assert fit(inputs, *place, *settings).trainer.global_step == 12


def test_a_corpus_may_move(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(inputs / "corpus")
    place = ["--runs_dir", str(tmp_path / "runs"), "--ckpt_path", str(checkpoint(inputs, 6))]
    assert fit(inputs, *place, "--data.root", str(tmp_path / "moved")).trainer.global_step == 12


# -- the command line wins over what the checkpoint holds ---------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "last"])
def test_the_command_line_wins_over_the_checkpoint(how: str, inputs: Path, tmp_path: Path) -> None:
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    shutil.copy(checkpoint(inputs, 6), last)
    place = ["--runs_dir", str(tmp_path), "--name", "one"]
    resume = str(last) if how == "path" else "last"
    other = ["--model.optimizer.lr", "1e-2", "--model.optimizer.betas", "[0.8, 0.9]"]
    other += ["--model.student.dropout", "0.3", "--allow-config-change"]
    cli = fit(inputs, *place, "--ckpt_path", resume, *other)
    assert cli.model.hparams["optimizer"]["lr"] == cli.model.optimizer_config.lr == 1e-2
    group = cli.trainer.optimizers[0].state_dict()["param_groups"][0]
    assert group["initial_lr"] == 1e-2
    assert tuple(group["betas"]) == (0.8, 0.9)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [1e-2, 1e-2]
    assert cli.model.student.config.dropout == 0.3
    saved = torch.load(checkpoint(inputs, 6), weights_only=True)["hyper_parameters"]
    assert cli.trainer.global_step == 12
    assert (saved["optimizer"]["lr"], saved["student"]["dropout"]) == (5e-4, 0.1)


def test_control_lightning_would_take_the_checkpoints_settings(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, Lightning has changed or renamed the step that ``DistillationCLI`` switches off."""
    assert L.__version__.startswith("2.6.")
    asked: list[str] = []

    def parse(self: LightningCLI) -> None:
        asked.append("before")
        LightningCLI._parse_ckpt_path(self)

    monkeypatch.setattr(DistillationCLI, "_parse_ckpt_path", parse)
    place = ["--runs_dir", str(tmp_path), "--ckpt_path", str(checkpoint(inputs, 6))]
    try:
        cli = fit(inputs, *place, "--model.optimizer.lr", "1e-2", "--allow-config-change")
    except SystemExit:
        pass  # it cannot even parse them
    else:
        assert cli.model.optimizer_config.lr == 5e-4
    assert asked == ["before"]


# -- pure parts ---------------------------------------------------------------------------------------------------


def test_differences_name_each_setting() -> None:
    saved: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "gone": 3}
    assert differences(saved, saved) == []
    assert differences(saved, {"a": {"b": 2, "c": [1, 2]}, "new": 4, "unset": None}) == [
        "a.b was 1, is 2",
        "gone was 3, is not set",
        "new was not set, is 4",
    ]
