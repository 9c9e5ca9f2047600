"""StudentEMA: an exponential moving average of the student's weights that grows when the student does.

Turn it on with ``--trainer.callbacks+=callbacks.ema.StudentEMA`` (and ``--trainer.callbacks.decay=0.9995``).
"""

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from datamodules.errors import InputError
from lightning_modules.student import Initialise, Student


class StudentEMA(WeightAveraging):
    """Average student and objective: average <- decay x average + (1 - decay) x weights, after optimizer steps.

    Acts: as Lightning's ``WeightAveraging``. The first update copies the weights. Validation and the model that
    ``fit`` leaves behind have the averaged weights; training does not see them.

    Changes: nothing of the training itself, bit for bit. At a growth ``StackingCallback`` calls :meth:`grow`: copies
    in the average are made of the average's own source layers, so that source and copy start equal there too. The
    optimizer-state and learning-rate settings of a growth do not concern it.

    Resumes: exactly, from a checkpoint of any depth. Its ``state_dict`` holds the average (what validation and
    export read), ``current_model_state`` the weights that training goes on with. A checkpoint made without the
    callback starts a new average at its weights.

    Memory: one copy of student and objective, on the student's device; never the teacher.

    Args:
        decay: weight of the past at each update, in [0, 1).
        every_n_steps: optimizer steps between updates, at least 1; the first follows the first step.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise InputError(
                f"StudentEMA has decay={decay}, every_n_steps={every_n_steps}: decay must be at least 0 and below 1, "
                "every_n_steps at least 1"
            )
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay, self.every_n_steps = decay, every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % self.every_n_steps == 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            # Not the module itself, as Lightning has it: a deep copy of that holds a copy of the teacher as well.
            self._average_model = AveragedModel(_weights(pl_module), use_buffers=self._use_buffers, **self._kwargs)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow what came after ``setup``: the student's first depth, loaded weights, the move to a device."""
        assert self._average_model is not None
        if self._average_model.n_averaged == 0:
            self._average_model.module.load_state_dict(_weights(pl_module).state_dict())
        self._average_model.to(pl_module.device)

    def grow(self, plan: Sequence[int | None], initialise: Initialise, seed: int) -> None:
        """Grow the average as :meth:`Student.grow` grows the student; fresh layers get the student's values."""
        self.student.grow(plan, initialise, seed)

    @property
    def student(self) -> Student:
        """The averaged student (during ``fit``)."""
        assert self._average_model is not None
        return cast(Student, cast(nn.ModuleDict, self._average_model.module)["student"])

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this average from another, in plain values."""
        return {"decay": self.decay, "every_n_steps": self.every_n_steps}


def _weights(module: L.LightningModule) -> nn.ModuleDict:
    """The registered parts of ``module`` under the names that its state dict has for them."""
    return nn.ModuleDict(dict(module.named_children()))
