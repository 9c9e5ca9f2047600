"""NonFiniteGuard: one bad batch costs one step, not the run."""

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
    """A run whose numbers are lost, and which only other settings can save."""


class NonFiniteGuard(Callback):
    """Skip optimizer steps whose loss or gradient norm is not finite; stop a run that only has such steps.

    Acts: before each optimizer step, before gradients are clipped. A fused optimizer (AdamW's default on a GPU)
    leaves a bad step out by itself, on the device, so that no step waits: the host learns of it one step later, or
    when a checkpoint is written. Any other costs one wait of the host for the device per optimizer step.

    Changes: a skipped step has no gradients, so parameters (weight decay too) and optimizer state stay bit
    for bit. The step counts all the same: ``global_step``, the learning-rate schedule and the data go on.
    With a gradient scaler (``16-mixed``) nothing is touched: the scaler skips by itself and lowers its scale;
    the guard counts.

    Logs: ``train/skipped_steps``, the total so far, at each skipped step. Warns of a validation whose metrics are not
    finite.

    Resumes: both counts are in the checkpoint.

    Args:
        max_skipped_steps: this many skipped steps in a row stop the run; at least 1.

    Attributes:
        skipped_steps: in all.
        skipped_in_a_row: since the last step that was made.

    Raises:
        DivergedError: ``max_skipped_steps`` in a row. It names the step and the last checkpoint, a good one:
            no skipped step has touched the model. Also at the end of a run that has skipped all of its steps.
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
        # A loss that is not finite can have finite gradients, and may be known to one rank only. So it makes
        # them NaN, which the reduction spreads; a finite loss adds 0. This costs no wait and no collective.
        factor = loss.detach() * 0
        loss.register_hook(lambda gradient: gradient + factor)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # All ranks decide alike without asking each other: the last backward of the accumulation window has
        # averaged the gradients over the ranks, so each computes the norm of the same bits.
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
            # Clipping and the update leave out parameters without gradients.
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
            return False  # the scaler is still looking for its scale
        return 0 < trainer.global_step <= self.skipped_steps

    def _settle(self) -> None:
        """Count the step that was looked at last."""
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
        places = (root / "checkpoints" / "last.ckpt", root / "last.ckpt")  # of RunCheckpoint, of a SUPERB head
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
    """Whether a step is bad, on its way from the device to the host."""

    def __init__(self, step: int, bad: Tensor) -> None:
        self.step, self._bad = step, bad
        self._copied: torch.cuda.Event | None = None
        if bad.is_cuda:
            self._bad = torch.empty_like(bad, device="cpu", pin_memory=True).copy_(bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(bad.device))

    def is_bad(self) -> bool:
        """Waits for the step's gradients, not for what was submitted after them."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._bad)


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """A fused optimizer takes gradient scalers' flag of a bad step; it leaves parameters and state as they are."""
    return all(group.get("fused") for group in optimizer.param_groups)


def _has_scaler(trainer: L.Trainer) -> bool:
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None
