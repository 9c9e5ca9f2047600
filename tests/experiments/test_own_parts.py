"""Own losses, teachers and data modules by their class paths, beyond the examples of docs/extending.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from datamodules.speech_data import SpeechDataModule
from experiments.training.cache_targets import TargetsCLI
from experiments.training.fit import DistillationCLI
from experiments.training.together import fit_together
from lightning_modules.objective import DISTANCES, ObjectiveConfig, l1
from tests.own_data import MyData
from tests.own_losses import WithDeltas
from tests.tiny_run import TINY

# One frame per 320 samples, as HuBERT's convolutions count them; no front end to copy.
OWN_TEACHER = """
from lightning_modules.teacher import Teacher, TeacherTargets


class Energy(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.init_args = 16_000, 4, 6, {}

    def num_frames(self, num_samples_B):
        return ((num_samples_B - 400) // 320 + 1).clamp(min=0)

    def forward(self, waveforms_BT, num_samples_B=None):
        energy_BF = waveforms_BT.unfold(-1, 400, 320).square().mean(-1)
        target_BFD = energy_BF[..., None].expand(-1, -1, self.hidden_size).contiguous()
        return TeacherTargets(target_BFD, {layer: layer * target_BFD for layer in self.hidden_layers})
"""


def fit(inputs: Path, *arguments: str) -> DistillationCLI:
    place = ["--data.root", str(inputs / "corpus"), "--data.cache_dir", str(inputs / "cache")]
    return DistillationCLI(["fit", *TINY, *place, "--trainer.fast_dev_run", "true", *arguments])


def farthest(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of two parameters of the same place."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def hugging_face(inputs: Path) -> list[str]:
    return ["--model.teacher.init_args.model", str(inputs / "teacher")]


def test_a_new_entry_of_the_registry_needs_no_other_change(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTANCES, "half_l1", lambda one, two: 0.5 * l1(one, two))
    cli = fit(inputs, *hugging_face(inputs), "--model.objective.distance", "half_l1")
    assert cli.trainer.global_step == 1
    projection = cli.model.objective.output_projection
    ones, zeros = torch.ones(1, 2, 16), torch.zeros(1, 2, 16)
    assert torch.equal(projection.distance(ones, zeros), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("name", ["msee", "my_missing.distance", "torch.no_such_function", ""])
def test_an_unknown_distance_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"unknown model\.objective\.distance '{name}'.*l1, l1_cosine, l1_cosine_raw, mse"
    ):
        ObjectiveConfig(distance=name)


def test_an_own_teacher_without_a_front_end_trains_by_the_option_that_the_error_names(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_teachers.py").write_text(OWN_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model.teacher", "my_teachers.Energy"]
    with pytest.raises(ValueError, match=r"set model\.student\.front_end_init=random"):
        fit(inputs, *arguments)
    assert fit(inputs, *arguments, "--model.student.front_end_init=random").trainer.global_step == 1


# -- a loss as a whole ------------------------------------------------------------------------------------------------

OWN_LOSS = ["--model.objective.loss", "tests.own_losses.WithDeltas"]


@pytest.mark.ci
def test_an_own_loss_trains_a_growing_student_and_is_another_run(inputs: Path, tmp_path: Path) -> None:
    settings = [*hugging_face(inputs), "--growth.stages", "[2,4]", "--trainer.max_epochs", "2"]
    place = ["--trainer.fast_dev_run", "false", "--runs_dir", str(tmp_path)]
    own, plain = (
        fit(inputs, *settings, *place, "--name", name, *more) for name, more in (("own", OWN_LOSS), ("plain", []))
    )
    assert isinstance(own.model.objective, WithDeltas)
    assert own.model.student.depth == 4
    outputs = [float(cli.trainer.callback_metrics["val/output"]) for cli in (own, plain)]
    assert outputs[0] > 1.1 * outputs[1]  # control: without it the loss has no second part
    checkpoints = {name: tmp_path / name / "checkpoints" / "step=000000002.ckpt" for name in ("own", "plain")}
    kept = {name: torch.load(path, weights_only=True)["interstack"] for name, path in checkpoints.items()}
    assert "loss" not in kept["plain"]["fingerprint"]["model"]["objective"]  # as in checkpoints from before it existed
    last = ["--ckpt_path", str(checkpoints["own"])]
    again = fit(inputs, *settings, *place, "--name", "again", *last, *OWN_LOSS)
    assert farthest(again.model, own.model) == 0 < farthest(again.model, plain.model)
    with pytest.raises(ValueError, match=r"model\.objective\.loss was tests\.own_losses\.WithDeltas, is not set"):
        fit(inputs, *settings, *place, "--name", "other", *last)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_missing.Loss", "unknown model.objective.loss 'my_missing.Loss' (No module named 'my_missing')"),
        ("lightning_modules.objective.mse", "model.objective.loss=lightning_modules.objective.mse is not a subclass"),
    ],
)
def test_a_loss_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveConfig(loss=name)


# -- a data module ----------------------------------------------------------------------------------------------------

PAIRS = list(zip(TINY[::2], TINY[1::2], strict=True))
WITHOUT_DATA = [word for pair in PAIRS if not pair[0].startswith("--data.") for word in pair]
OWN_DATA = ["--data", "tests.own_data.MyData"]


def fit_own(inputs: Path, runs: Path, name: str, *arguments: str) -> DistillationCLI:
    """Train 2 epochs of 3 steps on 12 of 16 files, growing once."""
    growth = ["--growth.stages", "[2,4]", "--trainer.max_epochs", "2"]
    common = [*WITHOUT_DATA, *hugging_face(inputs), *growth, "--runs_dir", str(runs), "--name", name]
    return DistillationCLI(["fit", *common, *arguments])


def data_settings(inputs: Path) -> list[str]:
    return [*OWN_DATA, "--data.init_args.root", str(inputs / "corpus"), "--data.batch_size", "4"]


@pytest.fixture(scope="module")
def own_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillationCLI]:
    runs = tmp_path_factory.mktemp("runs")
    return runs, fit_own(inputs, runs, "whole", *data_settings(inputs), "--log_samples", "true")


@pytest.mark.ci
def test_an_own_data_module_trains_a_growing_student(own_run: tuple[Path, DistillationCLI]) -> None:
    runs, cli = own_run
    assert isinstance(cli.datamodule, MyData)
    assert (cli.trainer.global_step, cli.model.student.depth) == (6, 4)
    assert float(cli.trainer.callback_metrics["val/loss"]) > 0
    assert len(list((runs / "whole" / "samples").glob("*.png"))) == 4
    (event,) = json.loads((runs / "whole" / "growth.json").read_text())
    assert event["loss_before"] > 0  # measured on its example batch
    config = yaml.safe_load((runs / "whole" / "config_1.yaml").read_text())
    assert config["data"]["class_path"] == "tests.own_data.MyData"
    assert config["data"]["init_args"]["batch_size"] == 4


@pytest.mark.ci
def test_its_kept_configuration_makes_the_same_run(inputs: Path, own_run: tuple[Path, DistillationCLI]) -> None:
    runs, whole = own_run
    config = str(runs / "whole" / "config_1.yaml")
    same, other = (
        fit_own(inputs, runs, f"seed {seed}", "--config", config, "--name", f"seed_{seed}", "--seed_everything", seed)
        for seed in ("0", "1")
    )
    assert farthest(same.model, whole.model) == 0 < farthest(other.model, whole.model)
    assert other.datamodule.seed == 1
    name = ["--runs_dir", str(runs), "--name", "whole", "--ckpt_path", "last"]
    metrics = DistillationCLI(["validate", "--config", config, *name]).trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(float(whole.trainer.callback_metrics["val/loss"]), rel=1e-6)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_it_resumes_in_mid_epoch(step: int, inputs: Path, own_run: tuple[Path, DistillationCLI]) -> None:
    runs, whole = own_run
    start = ["--ckpt_path", str(runs / "whole" / "checkpoints" / f"step={step:09d}.ckpt")]
    resumed = fit_own(inputs, runs, f"from_{step}", *data_settings(inputs), *start)
    assert farthest(resumed.model, whole.model) == 0
    with pytest.raises(ValueError, match=r"data\.batch_size was 4, is 6"):
        fit_own(inputs, runs, "other", *data_settings(inputs), "--data.batch_size", "6", *start)


def test_a_configuration_may_name_its_class(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    settings = {"class_path": "tests.own_data.MyData", "init_args": {"root": str(inputs)}}
    file.write_text(yaml.safe_dump({"data": settings}))

    def printed(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            DistillationCLI(["fit", *arguments, "--print_config"])
        printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return printed

    config = printed("--config", str(file), "--data.val_files", "2")
    assert config["name"] == "mine"
    assert config["data"] == settings | {"init_args": {"root": str(inputs), "batch_size": 8, "val_files": 2}}
    default = "datamodules.librispeech.LibriSpeechDataModule"
    for word in ("LibriSpeechDataModule", default):
        named = printed(f"--data={word}", "--data.init_args.root", "x")
        assert named == printed("--data.root", "x")  # in the form that it always had
        assert named["data"]["root"] == "x"
    file.write_text(yaml.safe_dump({"root": "x", "batch_size": 2}))
    assert printed("--data", str(file))["data"]["batch_size"] == 2  # a file of settings, as ever


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "my_missing.Data"], "unknown --data 'my_missing.Data' (No module named 'my_missing')"),
        (["--data", "LibriSpech"], "unknown --data 'LibriSpech': choose one of LibriSpeechDataModule"),
        (["--data", "pathlib.Path"], "--data pathlib.Path is not a subclass of datamodules.speech_data"),
        (
            ["--data", "tests.experiments.test_own_parts.Unfinished"],
            "does not define steps_per_epoch, train_dataloader",
        ),
    ],
)
def test_a_data_module_that_is_none_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillationCLI(["fit", *words])


class Unfinished(SpeechDataModule):
    """A data module without its two parts."""


def test_options_are_those_of_the_class(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        DistillationCLI(["fit", *data_settings(inputs), "--data.train_splits", "[train]"])
    assert "there is no option --data.train_splits" in capsys.readouterr().err


def test_commands_that_need_librispeechs_data_module_say_so(inputs: Path, tmp_path: Path) -> None:
    words = [*WITHOUT_DATA, *hugging_face(inputs), *data_settings(inputs), "--runs_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="cache-targets needs the fixed segments of LibriSpeechDataModule, which MyD"):
        TargetsCLI(["cache_targets", *words, "--output", str(tmp_path / "targets")])
    with pytest.raises(ValueError, match="students are trained together on LibriSpeechDataModule"):
        fit_together(["--configs", "full,a=full", *words])
