"""Short growing runs on a chosen device, and what is kept of them for a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpointing import RunCheckpoint
from callbacks.guards import NonFiniteGuard
from callbacks.metrics import TrainingMetrics
from callbacks.throughput import ThroughputCallback
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.precision import CudaSettings
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import make_data, make_module, make_stacking, make_trainer


class Losses(Callback):
    """Of every micro-batch; they stay on the device, since reading one is a wait."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(outputs["loss"].detach().clone())


@dataclass
class Fit:
    """What 12 steps through the depths 1, 2, 3 and 4 come to."""

    losses_S: Tensor
    weights_N: Tensor
    module: DistillationModule
    trainer: L.Trainer

    def loss_error(self, other: "Fit") -> float:
        """Of the step with the largest, relative to the other's loss; over the steps that both have, from the end."""
        steps = min(len(self.losses_S), len(other.losses_S))
        own_S, other_S = self.losses_S[-steps:], other.losses_S[-steps:]
        return float(((own_S - other_S).abs() / other_S.abs()).max())

    def distance(self, other: "Fit") -> float:
        """Between the final weights."""
        return float((self.weights_N - other.weights_N).norm())


@dataclass(frozen=True)
class Place:
    """Inputs (``teacher`` and ``corpus``), where runs write, and the device of the checks."""

    folder: Path
    device: str

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device == "cuda" else "cpu"

    def fit(
        self,
        name: str,
        callbacks: Sequence[Callback] = (),
        resume: Path | None = None,
        module: dict[str, Any] | DistillationModule | None = None,
        data: dict[str, Any] | None = None,
        guard: bool = True,
        **trainer: Any,
    ) -> Fit:
        """A run in ``folder/name``: float32 without TF32 and without dropout unless told otherwise."""
        losses, stacking = Losses(), make_stacking()
        guards = [NonFiniteGuard()] if guard else []
        settings = {"accelerator": self.accelerator, "gradient_clip_val": 1.0, "limit_val_batches": 0} | trainer
        settings["enable_checkpointing"] = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
        runner = make_trainer(
            self.folder / name,
            stacking,
            *guards,
            TrainingMetrics(),
            ThroughputCallback(),
            losses,
            *callbacks,
            **settings,
        )
        built = module if isinstance(module, DistillationModule) else self.build(**(module or {}))
        corpus = make_data(self.folder / "corpus", self.folder / "cache", **({"batch_size": 8} | (data or {})))
        runner.fit(built, datamodule=corpus, ckpt_path=str(resume) if resume else None)
        weights = [parameter.detach().flatten().cpu() for parameter in built.parameters()]
        return Fit(torch.stack(losses.values).double().cpu(), torch.cat(weights), built, runner)

    def build(self, float32: str = "ieee", **settings: Any) -> DistillationModule:
        """A module whose teacher computes in float32 unless told otherwise."""
        module = make_module(
            self.folder / "teacher", **({"dropout": 0.0, "teacher_settings": {"precision": "32"}} | settings)
        )
        module.cuda_settings = CudaSettings(float32=float32)  # type: ignore[arg-type]
        return module

    def wide(self) -> DistillationModule:
        """A student of 512 x 2048, which takes more memory and time than all around it."""
        teacher = HuggingFaceTeacher(str(self.folder / "teacher"), precision="32")
        return DistillationModule(
            teacher, StudentConfig(512, 2048, 8, 4), ObjectiveConfig(layers=[2], intermediate="prediction")
        )


def every_step() -> RunCheckpoint:
    """Keeps a checkpoint of each step."""
    return RunCheckpoint(every_n_steps=1, keep=1000)


def checkpoint_after(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step:09d}.ckpt"
