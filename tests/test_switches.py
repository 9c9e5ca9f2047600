"""Runs with the switches of a fast step end where the plain run ends, as nearly as docs/performance.md says.

The measure is what another order of the data does to the same run: the negative control of every comparison.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.guards import NonFiniteGuard
from datamodules.librispeech import LibriSpeechDataModule
from experiments.training.cache_targets import TargetsTrainer
from lightning_modules.precision import CudaSettings
from tests.helpers import POLICY_STAGES, make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher
from tests.students import KINDS, PAIR_STAGES, POSITIONS


class Run(NamedTuple):
    """What 12 steps come to."""

    losses_S: Tensor
    weights_N: Tensor

    def loss_error(self, other: "Run") -> float:
        """Of the step with the largest, relative to the other's loss."""
        return float(((self.losses_S - other.losses_S).abs() / other.losses_S).max())

    def distance(self, other: "Run") -> float:
        """Between the final weights."""
        return float((self.weights_N - other.weights_N).norm())


class Losses(Callback):
    """Of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(outputs["loss"]))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus and the teacher's targets in bf16."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 1})
    writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    writer.cache_targets(make_module(folder / "teacher"), data_of(folder), str(folder / "targets"))
    return folder


def data_of(home: Path, **settings: Any) -> LibriSpeechDataModule:
    return make_data(home / "corpus", home / "manifests", crop="fixed", **settings)


def train(
    home: Path,
    folder: Path,
    implementation: str = "auto",
    precision: str = "32-true",
    teacher: str = "32",
    kernels: str = "plain",
    targets: str | None = None,
    seed: int = 0,
    float32: Literal["tf32", "ieee"] = "tf32",
    **trainer_settings: Any,
) -> Run:
    """12 steps through the depths 1, 2, 3 and 4, without dropout; ``seed`` is that of the data's order."""
    module = make_module(
        home / "teacher",
        dropout=0.0,
        optimizer={"implementation": implementation},
        teacher_settings={"precision": teacher, "kernels": kernels},
        kernels=kernels,
    )
    module.cuda_settings = CudaSettings(float32)
    losses = Losses()
    trainer = make_trainer(
        folder,
        make_stacking(),
        NonFiniteGuard(),
        losses,
        precision=precision,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **trainer_settings,
    )
    trainer.fit(module, datamodule=data_of(home, targets=targets and str(home / targets), seed=seed))
    assert (trainer.global_step, module.student.depth) == (12, 4)
    assert module.teacher.precision_used == teacher
    weights = [parameter.detach().cpu().flatten() for parameter in module.parameters()]
    return Run(torch.tensor(losses.values), torch.cat(weights))


@pytest.fixture(scope="module")
def plain(home: Path) -> Run:
    return train(home, home / "plain")


@pytest.fixture(scope="module")
def other_order(home: Path) -> Run:
    return train(home, home / "other_order", seed=1)


SWITCHES: dict[str, tuple[dict[str, str], float, float]] = {
    "foreach AdamW": ({"implementation": "foreach"}, 1e-6, 1e-4),
    "fused AdamW": ({"implementation": "fused"}, 1e-6, 1e-4),
    "teacher in bf16": ({"teacher": "bf16"}, 0.005, 0.2),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 0.005, 0.2),
    "channels last": ({"kernels": "channels_last"}, 1e-5, 0.001),
    "channels last, bf16-mixed": ({"kernels": "channels_last", "precision": "bf16-mixed"}, 0.005, 0.2),
    "targets in bf16": ({"targets": "targets"}, 0.001, 0.05),
    "all of them": (
        {"implementation": "fused", "precision": "bf16-mixed", "teacher": "bf16", "targets": "targets"},
        0.005,
        0.2,
    ),
}
"""Switches, bound on the relative error of a loss, and on the distance of weights as a share of the control's."""


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_stays_within_its_bounds(name: str, home: Path, tmp_path: Path, plain: Run, other_order: Run) -> None:
    settings, loss_bound, weight_bound = SWITCHES[name]
    run = train(home, tmp_path, **settings)
    assert not torch.equal(run.weights_N, plain.weights_N) or name == "foreach AdamW"  # the switch did something
    assert run.loss_error(plain) < loss_bound < other_order.loss_error(plain) / 2
    assert run.distance(plain) < weight_bound * other_order.distance(plain)


def test_the_same_run_again_is_bit_for_bit_the_same(home: Path, tmp_path: Path, plain: Run) -> None:
    again = train(home, tmp_path)
    assert (again.loss_error(plain), again.distance(plain)) == (0, 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hubert"])
def test_fast_switches_change_a_run_of_any_kind_little(kind: str, tmp_path: Path) -> None:
    save_corpus(tmp_path / "corpus", {"train": 8, "dev": 2})
    save_teacher(tmp_path / "teacher", layers=8, **POSITIONS)
    losses = {}
    for name, settings in {
        "plain": {},
        "fast": {"precision": "bf16-mixed", "optimizer": {"implementation": "fused"}},
        "other": {"seed": 1},
    }.items():
        own = {key: settings[key] for key in ("optimizer", "seed") if key in settings}
        stages = (PAIR_STAGES if kind == "reused maps" else POLICY_STAGES)["one_shot_stack"]
        module = make_module(
            tmp_path / "teacher", stages[-1], dropout=0.0, **own, **KINDS[kind] | {"input_dropout": 0.0}
        )
        trainer = make_trainer(
            tmp_path / name,
            make_stacking("one_shot_stack", stages=stages),
            max_epochs=2,
            limit_val_batches=0,
            precision=settings.get("precision", "32-true"),
        )
        trainer.fit(module, datamodule=make_data(tmp_path / "corpus", tmp_path / "cache", batch_size=8))
        losses[name] = float(trainer.callback_metrics["train/loss"])
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.02)
    assert losses["other"] != pytest.approx(losses["plain"], rel=0.005)
