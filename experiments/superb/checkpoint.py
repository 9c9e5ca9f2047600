"""TaskCheckpoint: keep the best head by strict improvement on dev, and a checkpoint to resume from."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.ddp import require_same_step
from callbacks.guards import DivergedError
from datamodules.files import replacing, write_bytes
from lightning_modules.checkpoint_files import require_sound, serialised
from lightning_modules.superb.task_module import TaskModule

BEST, LAST = "best.ckpt", "last.ckpt"


class TaskCheckpoint(Callback):
    """Keep featurizer and head of the best evaluation on dev, the earliest of equal ones, as s3prl does.

    It saves after each evaluation and every ``save_every`` updates, only between two updates. ``best.ckpt`` is written
    on strict improvement; Lightning resumes from ``last.ckpt``. Both are written under another name first.

    Args:
        folder: folder of the run.
        save_every: updates from one resume point to the next.

    Attributes:
        best: dev metrics of the best evaluation; empty before the first.
        best_step: number of updates before the best evaluation.
        seconds: wall-clock time of training, over all attempts.
    """

    def __init__(self, folder: Path, save_every: int) -> None:
        self.folder, self.save_every = folder, save_every
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.seconds = 0.0
        self._loaded_step, self._since = 0, time.perf_counter()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_same_step(trainer, self._loaded_step)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_updates = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between_updates and trainer.global_step % self.save_every == 0 and not _evaluates(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        if self.is_better(pl_module):
            self.best, self.best_step = dict(pl_module.scores), trainer.global_step
            if trainer.is_global_zero:
                _write(
                    self.folder / BEST, {"state_dict": pl_module.own_state(), "dev": self.best, "step": self.best_step}
                )
        self._save(trainer)

    def is_better(self, module: TaskModule) -> bool:
        """Whether the new score is strictly better; NaN never is."""
        recipe = module.task.recipe
        new = module.scores[recipe.monitor]
        if not self.best:
            return new == new
        return new > self.best[recipe.monitor] if recipe.higher_is_better else new < self.best[recipe.monitor]

    def _save(self, trainer: L.Trainer) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        if trainer.is_global_zero:
            with replacing(self.folder / LAST) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(self.folder / LAST)  # writes nothing on this rank, but waits for rank zero
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.seconds = state_dict["seconds"]


def _evaluates(trainer: L.Trainer) -> bool:
    """Whether an evaluation follows this update; it writes a resume point anyway."""
    every = int(trainer.val_check_interval or 0) // trainer.accumulate_grad_batches
    return bool(every) and trainer.global_step % every == 0


def _write(path: Path, state: dict[str, Any]) -> None:
    write_bytes(path, serialised(state))


def load_best(folder: Path, module: TaskModule) -> None:
    """Load the best featurizer and head into the module.

    Raises:
        DivergedError: no evaluation gave a finite score, so there is no best one.
    """
    path = folder / BEST
    if not path.is_file():
        raise DivergedError(f"no evaluation on dev gave a number, so {folder} holds no {BEST}: lower --lr")
    require_sound(path, f"delete {folder} to run it again")
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"], strict=False)
