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
from lightning_modules.growth.policies import Initialise
from lightning_modules.student import Student


class StudentEMA(WeightAveraging):
    """Average student and objective: average <- decay x average + (1 - decay) x weights, after optimizer steps.

    Acts: as Lightning's ``WeightAveraging``. The first update copies the weights. Validation uses the averaged weights,
    and the model has them after ``fit``; training does not use them.

    Changes: nothing in the training itself, bit for bit. At a growth ``StackingCallback`` calls :meth:`grow`, which
    copies the average's own source layers, so that source and copy start equal in the average too. The
    optimizer-state and learning-rate settings of a growth do not affect it.

    Resumes: exactly, from a checkpoint of any depth. The checkpoint's ``state_dict`` is the average, which validation
    and export read, and ``current_model_state`` is the weights with which training continues. A checkpoint made without
    the callback starts a new average at its weights.

    Memory: one copy of student and objective on the student's device, but not of the teacher.

    Args:
        decay: weight of the old average at each update, in [0, 1).
        every_n_steps: optimizer steps between updates, at least 1; the first update follows the first step.
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
            # Lightning averages the module itself, but a deep copy of it would include a copy of the teacher.
            self._average_model = AveragedModel(_weights(pl_module), use_buffers=self._use_buffers, **self._kwargs)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply to the average what changed after ``setup``: the student's first depth, loaded weights, the device."""
        assert self._average_model is not None
        if self._average_model.n_averaged == 0:
            self._average_model.module.load_state_dict(_weights(pl_module).state_dict())
        self._average_model.to(pl_module.device)

    def grow(self, plan: Sequence[int | None], initialise: Initialise, seed: int, student: Student) -> None:
        """Grow the average like the ``student``, with :meth:`Student.grow`; fresh layers get the student's values.

        A front end that the growth froze is the student's from then on, which all later layers are trained on.
        """
        self.student.grow(plan, initialise, seed)
        if student.frozen_front_end:
            self.student.hubert.feature_extractor.load_state_dict(student.hubert.feature_extractor.state_dict())

    @property
    def student(self) -> Student:
        """The averaged student (during ``fit``)."""
        assert self._average_model is not None
        return cast(Student, cast(nn.ModuleDict, self._average_model.module)["student"])

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that distinguish this average from another, in plain values."""
        return {"decay": self.decay, "every_n_steps": self.every_n_steps}


def _weights(module: L.LightningModule) -> nn.ModuleDict:
    """The registered submodules of ``module``, under their names in its state dict."""
    return nn.ModuleDict(dict(module.named_children()))
