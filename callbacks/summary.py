"""RunSummary: writes the results of a finished run to ``RUN/summary.json`` and to the W&B summary."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.guards import NonFiniteGuard
from callbacks.hardware import hardware
from callbacks.lookup import find_callback
from callbacks.metrics import TrainingMetrics
from callbacks.stacking import StackingCallback
from callbacks.summary_record import Summary
from callbacks.throughput import ThroughputCallback
from callbacks.validation import validate_after_this_batch
from datamodules.files import write_json
from datamodules.speech_data import speech_data
from lightning_modules.distillation import DistillationModule
from lightning_modules.growth.schedules import mean_depth


class RunSummary(Callback):
    """Writes the summary when ``fit`` ends normally. A run without a summary is not finished.

    Resumes: a run that was interrupted between its last checkpoint and its summary writes it when it is continued, even
    with nothing left to train. The last validation's metrics are then those in the checkpoint. The summary of a run
    that was finished before stays as it is.

    Validates: after the last step too, whatever ``trainer.check_val_every_n_epoch`` and ``trainer.val_check_interval``
    are, since the last validation is the run's result.

    Attributes:
        trained: whether this ``fit`` has begun to train.
        kept: whether the run was finished before, so that this ``fit`` trained and wrote nothing.
    """

    def __init__(self) -> None:
        self._saved_metrics: Mapping[str, float] = {}
        self.trained = self.kept = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_metrics = checkpoint.get("interstack", {}).get("metrics", {})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.trained = True
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last_batch and trainer.current_epoch + 1 == trainer.max_epochs:
            validate_after_this_batch(trainer)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "summary.json"
        self.kept = not self.trained and path.is_file()
        if self.kept:
            return
        guard = find_callback(trainer, NonFiniteGuard)
        if trainer.current_epoch < (trainer.max_epochs or 0) or (guard and guard.learned_nothing(trainer)):
            return
        metrics = {**self._saved_metrics, **trainer.callback_metrics}
        summary = summarise(trainer, pl_module, metrics).to_plain()
        write_json(path, summary)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(summary)


def summarise(trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, Any]) -> Summary:
    """Summarise a run; ``metrics`` are those of its last validation."""
    assert isinstance(module, DistillationModule)
    stacking, training = find_callback(trainer, StackingCallback), find_callback(trainer, TrainingMetrics)
    clock, data = find_callback(trainer, ThroughputCallback), speech_data(trainer)
    return Summary(
        name=Path(trainer.default_root_dir).name,
        policy=stacking.policy if stacking else "none",
        schedule=stacking.schedule if stacking else None,
        growth=stacking.settings if stacking else None,
        seed=module.seed,
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        depth=module.student.depth,
        mean_depth=mean_depth(stacking.stages, stacking.lengths) if stacking else float(module.student.depth),
        plans=_joined(event.plan for event in stacking.events) if stacking else None,
        ancestry=_joined(event.ancestry for event in stacking.events[-1:]) if stacking else None,
        parameters=sum(p.numel() for p in module.student.parameters()),
        train_seconds=clock.train_seconds if clock else None,
        students=clock.students if clock else 1,
        audio_seconds=clock.audio_seconds if clock else None,
        utterances=clock.utterances if clock else None,
        train_loss=training.epoch_loss if training else None,
        val_loss=float(metrics.get("val/loss", "nan")),
        val_output=float(metrics.get("val/output", "nan")),
        loss_function=module.objective.loss_function,
        without_transcript=data.without_transcript if data else None,
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        teacher_precision=module.teacher.precision_used,
        cached_features=data is not None and data.reads_features,
        hardware=hardware(trainer.strategy.root_device, trainer.world_size),
        versions={
            "torch": str(torch.__version__),
            "lightning": L.__version__,
            "transformers": transformers.__version__,
        },
    )


def _joined(rows: Iterable[Iterable[int | None]]) -> str:
    """Plans or ancestries as text, one growth after the other; ``*`` stands for a layer without a source."""
    return " | ".join(" ".join("*" if place is None else str(place) for place in row) for row in rows)
