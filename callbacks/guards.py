"""NonFiniteGuard: skips optimizer steps with a non-finite loss or gradient, so that a bad batch does not end a run."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from datamodules.errors import InputError

log = logging.getLogger(__name__)


class DivergedError(InputError, RuntimeError):
    """The losses or gradients of a run are not finite, and only other settings can help."""


class NonFiniteGuard(Callback):
    """Skip optimizer steps whose loss or gradient norm is not finite; stop a run that only has such steps.

    Acts: before each optimizer step, before gradients are clipped. A fused optimizer (AdamW's default on a GPU)
    skips a bad step by itself, on the device, so that no step waits. The host learns of it one step later, or
    when a checkpoint is written. With any other optimizer the host waits for the device once per optimizer step.

    Changes: a skipped step has no gradients, so parameters (under weight decay too) and optimizer state stay equal bit
    for bit. The step still counts for ``global_step``, the learning-rate schedule and the data. With a gradient scaler
    (``16-mixed``) the guard only counts, because the scaler skips by itself and lowers its scale.

    Logs: ``train/skipped_steps``, the total so far, at each skipped step. It warns of a validation whose metrics are
    not finite.

    Resumes: both counts are in the checkpoint.

    Args:
        max_skipped_steps: number of skipped steps in a row that stops the run; at least 1.

    Attributes:
        skipped_steps: number of all skipped steps.
        skipped_in_a_row: number of skipped steps since the last step that was not skipped.

    Raises:
        DivergedError: ``max_skipped_steps`` in a row were skipped. It names the step and the last checkpoint, which is
            good, because no skipped step changes the model. Also raised at the end of a run that skipped all steps.
    """

    def __init__(self, max_skipped_steps: int = 10) -> None:
        if max_skipped_steps < 1:
            raise InputError(f"guard.max_skipped_steps={max_skipped_steps} must be at least 1")
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = self.skipped_in_a_row = 0
        self._pending: _Verdict | None = None
        self._overdue: int | None = None  # the step after which the run is to stop
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer, self._pending, self._overdue = trainer, None, None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # A loss that is not finite can have finite gradients, and may occur on one rank only. So it makes them
        # NaN, which the reduction spreads to all ranks; a finite loss adds 0. This needs no wait and no collective.
        factor = loss.detach() * 0
        loss.register_hook(lambda gradient: gradient + factor)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # All ranks decide alike without communication, because the last backward pass of the accumulation window has
        # averaged the gradients over the ranks, and each rank computes the norm of the same bits.
        self._settle()
        self._stop_if_overdue(trainer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = ~torch.nn.utils.get_total_norm(gradients).isfinite()
        self._pending = _Verdict(trainer.global_step + 1, bad)  # Lightning counts the step, though it changes nothing
        if _skips_by_itself(optimizer) and not _has_scaler(trainer):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            return
        skipped = self.skipped_steps
        self._settle()
        self._stop_if_overdue(trainer)
        if self.skipped_steps > skipped and not _has_scaler(trainer):
            # Clipping and the update skip parameters without gradients.
            optimizer.zero_grad(set_to_none=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle()
        self._stop_if_overdue(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if bad := [f"{name} is {value}" for name, value in sorted(values.items()) if not math.isfinite(value)]:
            _warn("validation after step %d: %s; look at the data, or lower the learning rate", trainer, bad)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.learned_nothing(trainer):
            raise DivergedError(
                f"loss or gradient norm was not finite in any of {trainer.global_step} optimizer steps, so that "
                "nothing was learned: look at the data, or lower the learning rate (16-mixed skips its first steps to "
                "find the scale of the gradients: train for more)"
            )

    def learned_nothing(self, trainer: L.Trainer) -> bool:
        """Whether the run, with all that it was resumed from, has skipped every one of its steps."""
        if trainer.fast_dev_run and _has_scaler(trainer):  # type: ignore[attr-defined]
            return False  # the scaler has not found its scale yet
        return 0 < trainer.global_step <= self.skipped_steps

    def _settle(self) -> None:
        """Count the result of the last step that was checked."""
        if self._pending is None:
            return
        assert self._trainer is not None  # set before any step
        verdict, self._pending = self._pending, None
        if not verdict.is_bad():
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped_steps:
            self._overdue = verdict.step
        self._report(self._trainer, verdict.step)

    def _stop_if_overdue(self, trainer: L.Trainer) -> None:
        if self._overdue is None:
            return
        root = Path(trainer.default_root_dir)
        places = (root / "checkpoints" / "last.ckpt", root / "last.ckpt")  # files of RunCheckpoint and of a SUPERB head
        last = next((place for place in places if place.is_file()), None)
        found = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise DivergedError(
            f"loss or gradient norm was not finite in {self.skipped_in_a_row} optimizer steps in a row, up "
            f"to step {self._overdue}: stopped, {found}; look at the data, or lower the learning rate"
        )

    @rank_zero_only
    def _report(self, trainer: L.Trainer, step: int) -> None:
        log.warning(
            "step %d skipped: loss or gradient norm is not finite (%d in all, %d in a row)",
            *(step, self.skipped_steps, self.skipped_in_a_row),
        )
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped_steps}, step=step)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps, self.skipped_in_a_row = (
            state_dict["skipped_steps"],
            state_dict["skipped_in_a_row"],
        )


@rank_zero_only
def _warn(text: str, trainer: L.Trainer, bad: list[str]) -> None:
    log.warning(text, trainer.global_step, ", ".join(bad))


class _Verdict:
    """Whether a step is bad, while the flag is copied from the device to the host."""

    def __init__(self, step: int, bad: Tensor) -> None:
        self.step, self._bad = step, bad
        self._copied: torch.cuda.Event | None = None
        if bad.is_cuda:
            self._bad = torch.empty_like(bad, device="cpu", pin_memory=True).copy_(bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(bad.device))

    def is_bad(self) -> bool:
        """Whether the step is bad; waits for the step's gradients, but not for work submitted after them."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._bad)


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer is fused: then it reads a gradient scaler's flag and skips a bad step by itself."""
    return all(group.get("fused") for group in optimizer.param_groups)


def _has_scaler(trainer: L.Trainer) -> bool:
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None
