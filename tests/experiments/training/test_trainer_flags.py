"""Each flag of Lightning's Trainer does what it says, or is refused by name."""

import inspect
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from experiments.records.settings_yaml import load_settings
from experiments.training.fit import DistillationCLI
from experiments.training.trainer_flags import HONOURED, REFUSED
from tests.tiny_run import fit

# By flag: values that are refused, each beside one that is not.
VALUES = {
    "devices": [("0", "1"), ("3.5", "0,"), ("[]", "[0, 1]")],
    "precision": [("64-true", "32-true"), ("bf16-true", "bf16-mixed"), ("transformer-engine", "bf16")],
    "accumulate_grad_batches": [("0", "1"), ("-2", "2")],
    "profiler": [("pytorch", "simple"), ("PyTorchProfiler", "AdvancedProfiler")],
    "plugins": [
        (f"lightning.pytorch.plugins.{refused}", "lightning.pytorch.plugins.environments.LightningEnvironment")
        for refused in ("AsyncCheckpointIO", "TorchSyncBatchNorm")
    ],
    "max_epochs": [("0", "1"), ("-1", "75"), ("null", "4")],
    "max_steps": [("3", "-1"), ("0", "-1")],
    "limit_train_batches": [("0", "1"), ("0.0", "0.5")],
    "overfit_batches": [("1", "0"), ("0.5", "0.0")],
    "limit_test_batches": [("1", "null")],
    "limit_predict_batches": [("1", "null")],
    "enable_checkpointing": [("false", "true"), ("false", "null")],
    "barebones": [("true", "false")],
    "use_distributed_sampler": [("true", "false")],
    "sync_batchnorm": [("true", "false")],
    "default_root_dir": [("elsewhere", "null")],
    "model_registry": [("name", "null")],
}


def test_every_flag_of_lightning_is_judged() -> None:
    flags = set(inspect.signature(Trainer).parameters)
    assert flags == HONOURED | set(REFUSED)
    assert not HONOURED & set(REFUSED)
    assert set(VALUES) == set(REFUSED)


@pytest.mark.parametrize(
    ("flag", "refused", "taken"), [(flag, *pair) for flag, pairs in VALUES.items() for pair in pairs]
)
def test_what_would_not_do_what_it_says_is_refused_by_name(
    flag: str, refused: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        """All checks are passed."""

    def reach(trainer: object) -> None:
        raise Reached

    monkeypatch.setattr("experiments.training.fit._refuse_half_precision_on_cpu", reach)
    arguments = ["fit", "--data.root", "none", "--runs_dir", str(tmp_path / "runs"), "--data.num_workers", "0"]
    option = f"--trainer.{flag}" + ("=" if flag != "plugins" else "+=")
    with pytest.raises(ValueError, match=rf"^--trainer\.{flag} .*: \w+"):
        DistillationCLI([*arguments, option + refused])
    with pytest.raises(Reached):
        DistillationCLI([*arguments, option + taken])
    assert not (tmp_path / "runs").exists()


@pytest.mark.ci
def test_a_run_does_not_keep_its_folder_in_its_configuration(inputs: Path, tmp_path: Path) -> None:
    fit(inputs, "--runs_dir", str(tmp_path), "--name", "first", "--trainer.max_epochs", "4")
    kept = tmp_path / "first" / "config_1.yaml"
    assert load_settings(kept.read_text())["trainer"]["default_root_dir"] is None
    (tmp_path / "first" / "run.json").unlink()  # as where the configuration is copied elsewhere
    again = DistillationCLI(["fit", "--config", str(kept), "--name", "again"])
    assert Path(again.trainer.default_root_dir) == tmp_path / "again"


def test_the_folder_that_an_earlier_version_has_kept_is_taken(tmp_path: Path) -> None:
    refused, _ = REFUSED["default_root_dir"]
    assert refused(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    assert not refused(str(tmp_path))


def weights(cli: DistillationCLI) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in cli.model.student.parameters()])


@pytest.fixture(scope="module")
def plain(inputs: Path) -> torch.Tensor:
    return weights(fit(inputs, "--runs_dir", str(inputs / "plain")))


@pytest.mark.parametrize(
    "flags",
    [
        ["reload_dataloaders_every_n_epochs=1"],
        ["num_sanity_val_steps=2"],
        ["val_check_interval=2"],
        ["check_val_every_n_epoch=null", "val_check_interval=2"],
        ["limit_val_batches=0"],
        ["detect_anomaly=true", "deterministic=true", "inference_mode=false", "log_every_n_steps=1"],
        ["profiler=simple"],
        ["min_epochs=2", "min_steps=1"],
    ],
    ids=" ".join,
)
def test_flags_that_must_not_change_the_student(
    flags: list[str], inputs: Path, plain: torch.Tensor, tmp_path: Path
) -> None:
    cli = fit(inputs, "--runs_dir", str(tmp_path), *(f"--trainer.{flag}" for flag in flags))
    assert (cli.trainer.global_step, cli.model.student.depth) == (12, 4)
    assert torch.equal(weights(cli), plain)


@pytest.mark.parametrize(
    ("flag", "steps"),
    [("gradient_clip_val=1e-3", 12), ("gradient_clip_algorithm=value", 12), ("limit_train_batches=1", 4)],
)
def test_control_flags_that_do_change_it(
    flag: str, steps: int, inputs: Path, plain: torch.Tensor, tmp_path: Path
) -> None:
    cli = fit(inputs, "--runs_dir", str(tmp_path), f"--trainer.{flag}")
    assert cli.trainer.global_step == steps
    assert not torch.equal(weights(cli), plain)


@pytest.mark.parametrize("value", ["true", "2"])
def test_a_fast_dev_run_of_a_growing_student_tries_both_loops_and_leaves_nothing(
    value: str, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")  # another run's, which it must not touch
    (run / "metrics.csv").write_text("step\n")
    arguments = ["--runs_dir", str(tmp_path), "--name", "run", "--trainer.fast_dev_run", value]
    cli = fit(inputs, *arguments, "--growth.schedule", "explicit-25,50,60", "--ckpt_path", "last")
    assert cli.trainer.global_step == {"true": 1, "2": 2}[value]
    assert "val/loss" in cli.trainer.callback_metrics
    assert cli.model.student.depth == 1
    assert "no growth" in caplog.text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.csv", "run", "run.json"]
    assert (run / "run.json").read_text() == "{}"


def test_a_fast_dev_run_does_not_go_on_from_a_checkpoint(inputs: Path, tmp_path: Path) -> None:
    arguments = ["--runs_dir", str(tmp_path), "--trainer.fast_dev_run", "true", "--ckpt_path", "a.ckpt"]
    with pytest.raises(ValueError, match=r"cannot go on from a\.ckpt: leave out --ckpt_path"):
        fit(inputs, *arguments)


def test_a_fast_dev_run_still_checks_the_whole_plan(inputs: Path, tmp_path: Path) -> None:
    arguments = ["--runs_dir", str(tmp_path), "--trainer.fast_dev_run", "true", "--growth.policy", "stackbert"]
    with pytest.raises(ValueError, match="stackbert"):
        fit(inputs, *arguments, "--growth.stages", "[3, 4]")
