"""Runs of a tiny student with and without a cache, and what compares them; for every test of caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.resume_guard import ResumeGuard
from datamodules.cached_records import encode
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.loading import AudioBatch
from lightning_modules.distillation import DistillationModule
from lightning_modules.student import Student
from lightning_modules.teacher import TeacherTargets
from tests.helpers import make_data, make_stacking, make_trainer

STUDENT = [
    *("--model.student.hidden_size", "16", "--model.student.intermediate_size", "24", "--model.student.num_heads", "2"),
    *("--model.student.num_layers", "4", "--model.objective.layers", "[2]"),
    *("--data.train_splits", "[train]", "--data.val_splits", "[dev]", "--data.batch_size", "4", "--data.crop", "fixed"),
    *("--data.num_workers", "0", "--trainer.accelerator", "cpu"),
]


def options(home: Path) -> list[str]:
    return [
        *("--model.teacher.init_args.model", str(home / "teacher"), "--data.root", str(home / "corpus")),
        *("--data.cache_dir", str(home / "manifests"), *STUDENT, "--batch_seconds", "0.1", "--shard_megabytes", "1"),
    ]


def fit_options(home: Path) -> list[str]:
    return [*options(home)[:-4], "--wandb.mode", "disabled"]


def data_of(home: Path, **settings: Any) -> LibriSpeechDataModule:
    return make_data(home / "corpus", home / "manifests", **({"crop": "fixed"} | settings))


def rounded(module: DistillationModule, dtype: str) -> Callable[[AudioBatch], TeacherTargets]:
    """The teacher on the fly, asked as the cache was made, an utterance at a time, and rounded as it was."""

    def targets(batch: AudioBatch, mask_BF: Tensor | None = None) -> TeacherTargets:
        assert batch.waveforms is not None
        masks = [None] * len(batch.waveforms) if mask_BF is None else mask_BF[:, None]
        said = [module.teacher(wave_T[None], None, mask) for wave_T, mask in zip(batch.waveforms, masks, strict=True)]
        each = [torch.stack([one.output_BFD, *one.hidden.values()]) for one in said]
        output_BFD, *hidden = encode(torch.cat(each, dim=1), dtype).decoded()
        return TeacherTargets(output_BFD, dict(zip(module.teacher.hidden_layers, hidden, strict=True)))

    return targets


class SaveAt(Callback):
    """Right after an optimizer step, in the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train(
    module: DistillationModule, data: LibriSpeechDataModule, folder: Path, *callbacks: Callback, **settings: Any
) -> tuple[list[Tensor], float]:
    """Final weights of a run that grows 1, 2, 3, 4, and its last validation loss."""
    resume = settings.pop("resume", None)
    trainer = make_trainer(folder, make_stacking(), ResumeGuard(), *callbacks, accumulate_grad_batches=2, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return [p.detach().clone() for p in module.parameters()], float(trainer.callback_metrics["val/loss"])


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Of two sets of weights, relative to how far the first is from an untrained student's scale."""
    pairs = zip(one, other, strict=True)
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a in one)) ** 0.5


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def features_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the features of each utterance alone: a convolution's last bits depend on what else is in its batch."""
    together = Student.features

    def alone(self: Student, waveforms_BT: Tensor) -> Tensor:
        return torch.cat([together(self, waveform_T[None]) for waveform_T in waveforms_BT])

    monkeypatch.setattr(Student, "features", alone)
