"""StackingCallback: grows the student during training.

The depth is a pure function of the epoch, so the callback keeps no state that training depends on. A resumed run
grows exactly where an uninterrupted one would. The depth is checked in ``on_train_start`` and in
``on_train_epoch_start``, because Lightning skips the latter for the first epoch of some resumed runs.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks import ddp
from callbacks.ema import StudentEMA
from callbacks.feature_cache import FeatureCache
from callbacks.lookup import find_callback
from callbacks.stop_signals import signals_of
from callbacks.throughput import ThroughputCallback
from datamodules.errors import InputError
from datamodules.files import write_json
from datamodules.speech_data import speech_data
from lightning_modules.distillation import DistillationModule
from lightning_modules.growth.event import GrowthEvent
from lightning_modules.growth.policies import default_stages, get_policy, make_plan
from lightning_modules.growth.schedules import depth_at, growth_epochs, stage_lengths
from lightning_modules.optimisation import OptimizerState, carry_state, rebind
from lightning_modules.stopwatch import synchronize

log = logging.getLogger(__name__)

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


class StackingCallback(Callback):
    """Grow the student at epoch boundaries.

    A ``fast_dev_run`` has one epoch, so it trains at the depth of the first stage; the plans of all stages are checked.

    Acts: at the start of the first epoch of each stage, before its first batch. The checkpoint written at the end of
    the previous epoch has the shallower model, to which its metrics belong.

    Changes: the student's stack (``Student.grow``), its average if there is one (``StudentEMA``), the parameter lists
    and state of the one optimizer (the object and its scheduler stay), and DDP's wrapper (dropped before a growth,
    built again after it).

    Refuses: a run that is not measured in epochs (``max_steps``), layers of the L2L loss that fall between the
    student's at some depth, another depth than the schedule has; for a growing run also strategies other than single
    device and DDP, more than one optimizer, weight averaging other than ``StudentEMA``, fewer epochs than stages,
    stages that do not end at the student's ``num_layers`` or that part layers which stay together, and a checkpoint
    with an average in a run without ``StudentEMA``.

    Resumes: without state of its own; the depth follows from the state dict and the epoch.

    Args:
        policy: ``interleaved``, ``gradual`` (GradStack), ``midas``, ``lidas``, ``stackbert``, ``one_shot_stack``,
            ``one_shot_interleave``, ``random``, ``identity``, the path of a function (docs/extending.md), or ``none``
            to train at full depth throughout.
        schedule: ``equal``, ``prop-ALPHA``, ``explicit-E1,E2,...`` (the epochs at which to grow), or the path of a
            function (docs/extending.md).
        layers_per_stage: K, the number of layers added at each growth, unless the policy defines another.
        stages: depth of each stage, e.g. ``[3, 6, 12]``; replaces ``layers_per_stage``.
        offset: layer of each group that ``interleaved`` and ``identity`` clone: the ``last`` or the ``first``.
        optimizer_state: optimizer state after a growth: ``copy`` gives new layers their source's state, ``zero`` gives
            new layers a zero state, ``reset`` all layers.
        lr_after_growth: learning rate after a growth: ``continue`` the one global schedule, or ``rewarm`` over
            ``rewarm_steps``.
        rewarm_steps: length in optimizer steps of the warm-up after a growth.
        measure_loss: measure the loss before and after each growth, on one fixed batch without gradients.
        verify: compare a checksum of parameters and optimizer state across ranks after each growth.
    """

    def __init__(
        self,
        policy: str = "none",
        schedule: str = "equal",
        layers_per_stage: int = 3,
        stages: list[int] | None = None,
        offset: Literal["last", "first"] = "last",
        optimizer_state: OptimizerState = "copy",
        lr_after_growth: Literal["continue", "rewarm"] = "continue",
        rewarm_steps: int = 500,
        measure_loss: bool = True,
        verify: bool = True,
    ) -> None:
        if policy != "none":
            get_policy(policy)  # refuses an unknown name before anything is loaded
        self.policy, self.schedule, self.offset = policy, schedule, offset
        self.layers_per_stage, self.requested_stages = layers_per_stage, stages
        self.optimizer_state: OptimizerState = optimizer_state
        self.lr_after_growth, self.rewarm_steps = lr_after_growth, rewarm_steps
        self.measure_loss, self.verify = measure_loss, verify
        self.stages: Sequence[int] = ()
        self.lengths: Sequence[int] = ()
        self.events: list[GrowthEvent] = []

    # -- when -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not isinstance(pl_module, DistillationModule):
            return
        ddp.leave_inputs(trainer)
        epochs = _epochs(trainer)
        full_depth = pl_module.student.config.num_layers
        if self.policy == "none":
            self.stages, self.lengths = (full_depth,), (epochs,)
            if self.schedule != "equal" or self.requested_stages:
                log.warning(
                    "growth.policy=none: all %d layers train throughout; growth.schedule=%s and growth.stages=%s "
                    "have no effect",
                    *(full_depth, self.schedule, self.requested_stages),
                )
        else:
            self._refuse(trainer)
            self._divide(pl_module, full_depth, None if trainer.fast_dev_run else epochs)  # type: ignore[attr-defined]
        for depth in self.stages:  # every loss must exist before the first step
            pl_module.objective.positions(depth, range(self.stages[0]))

    def _divide(self, module: DistillationModule, full_depth: int, epochs: int | None) -> None:
        """Set stages and plans, and cut the student to the first depth. Without ``epochs`` each stage is one epoch."""
        self.stages = tuple(self.requested_stages or default_stages(self.policy, full_depth, self.layers_per_stage))
        if self.stages[-1] != full_depth:
            raise InputError(
                f"growth.stages={list(self.stages)} end at {self.stages[-1]} layers, but model.student.num_layers="
                f"{full_depth}: make them equal"
            )
        if epochs is None:
            self.lengths = (1,) * len(self.stages)
            log.warning("fast_dev_run: %d of %d layers, as in the first stage; no growth", self.stages[0], full_depth)
        else:
            self.lengths = stage_lengths(self.schedule, len(self.stages), epochs)
        for depth, target in zip(self.stages, self.stages[1:], strict=False):
            # Every plan must exist before the first step.
            make_plan(self.policy, depth, target, self.offset, module.student.layer_group)
        module.student.start_at(self.stages[0])
        module.plan_growth(growth_epochs(self.lengths), self.settings["rewarm_steps"])

    def _refuse(self, trainer: L.Trainer) -> None:
        ddp.require_supported(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for averaging in callbacks:
            if isinstance(averaging, AVERAGING) and not isinstance(averaging, StudentEMA):
                raise InputError(
                    f"{type(averaging).__name__} keeps a copy of the model that StackingCallback cannot grow: use "
                    "callbacks.ema.StudentEMA instead"
                )

    def depth_at(self, epoch: int) -> int:
        """Depth during ``epoch`` (0-based)."""
        return depth_at(epoch, self.stages, self.lengths)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy != "none" and len(trainer.optimizers) != 1:
            raise InputError(f"a growing run has one optimizer, not {len(trainer.optimizers)}")
        self.events = [event for event in self.events if event.epoch <= trainer.current_epoch]
        self._describe(trainer)
        if (signals := signals_of(trainer)) is not None:
            signals.listen(trainer)  # a growth may take long, and the callback with the signals comes after this one
        self._ensure(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ensure(trainer, pl_module)

    def _ensure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.stages:  # there is no student
            return
        assert isinstance(module, DistillationModule)
        wanted = self.depth_at(trainer.current_epoch)
        if module.student.depth > wanted or module.student.depth not in self.stages:
            raise InputError(
                f"the student has {module.student.depth} layers, but the schedule has {wanted} in epoch "
                f"{trainer.current_epoch}: this checkpoint was made with other stages or another schedule; a new run "
                "starts from its weights with --model.init_from and --growth.policy none"
            )
        while module.student.depth < wanted:
            position = list(self.stages).index(module.student.depth)
            self._grow(trainer, module, self.stages[position + 1])
        if (features := find_callback(trainer, FeatureCache)) is not None:
            features.store(trainer, module)

    # -- how ------------------------------------------------------------------------------------------------------

    def _grow(self, trainer: L.Trainer, module: DistillationModule, target: int) -> None:
        student, (optimizer,) = module.student, trainer.optimizers
        depth, policy = student.depth, get_policy(self.policy)
        plan = make_plan(self.policy, depth, target, self.offset, student.layer_group)
        loss_before, train_seconds = self._loss(trainer, module), _train_seconds(trainer)
        synchronize(module.device)  # the last step's work is no part of the growth's time, its own copies are
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)  # frees gradients that are views of the old reducer's buckets
        ddp.unwrap(trainer, module)
        sources = student.grow(plan, policy.initialise, module.seed)
        if (average := find_callback(trainer, StudentEMA)) is not None:
            average.grow(plan, policy.initialise, module.seed, student)
        carry_state(optimizer, sources, self.optimizer_state)  # before `rebind` drops the state of what is frozen now
        rebind(optimizer, module.parameter_groups())
        if self.verify:  # before DDP is built: its constructor overwrites drifted parameters with rank 0's
            ddp.verify_ranks(trainer, module, optimizer)
        ddp.rewrap(trainer)
        synchronize(module.device)
        seconds = time.perf_counter() - started
        event = GrowthEvent(
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            policy=self.policy,
            plan=tuple(plan),
            ancestry=tuple(student.ancestry),
            depth_before=depth,
            depth=target,
            parameters=sum(p.numel() for p in student.parameters()),
            seconds=seconds,
            loss_before=loss_before,
            loss_after=self._loss(trainer, module),
            train_seconds=train_seconds,
        )
        self.events.append(event)
        self._record(trainer, event)

    def _loss(self, trainer: L.Trainer, module: DistillationModule) -> float | None:
        """Loss on one fixed batch, in eval mode and without gradients, so that the run does not change.

        The run's clock is paused, since the measurement is not part of the cost of a growth. A compiled student is
        measured eagerly, because compiling graphs for evaluation would take longer than the measurement.
        """
        datamodule = speech_data(trainer)
        if not self.measure_loss or datamodule is None:
            return None
        clock = find_callback(trainer, ThroughputCallback)
        with nullcontext() if clock is None else clock.aside(module.device):
            if (examples := datamodule.growth_batch(4)) is None:
                return None
            batch = datamodule.transfer_batch_to_device(examples, module.device, 0)
            training = [part for part in module.modules() if part.training]
            module.eval()
            eagerly = torch.compiler.set_stance("force_eager")
            with eagerly, torch.no_grad(), trainer.precision_plugin.forward_context():
                loss = module.losses(batch).total.item()
            for part in training:
                part.training = True
        return loss

    # -- telling --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        meta = checkpoint.setdefault("interstack", {})
        meta |= {"growth": self.plain_events, "growth_settings": self.settings}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        averaged = find_callback(trainer, StudentEMA) is not None
        if trainer.state.fn == "fit" and "current_model_state" in checkpoint and not averaged:
            # Lightning would silently continue from the averaged weights, with the other weights' optimizer state.
            raise InputError(
                "this checkpoint holds an average of the weights beside them: add "
                "--trainer.callbacks+=callbacks.ema.StudentEMA to resume from it"
            )

    def state_dict(self) -> dict[str, Any]:
        """The log of past growths; training does not depend on it."""
        return {"events": self.plain_events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.events = [GrowthEvent.from_plain(event) for event in state_dict["events"]]

    @property
    def plain_events(self) -> list[dict[str, Any]]:
        """Plain values of the growths so far."""
        return [event.to_plain() for event in self.events]

    @property
    def settings(self) -> dict[str, Any]:
        """Growth settings of this run, for logs and summaries."""
        return {
            "policy": self.policy,
            "schedule": self.schedule,
            "stages": list(self.stages),
            "stage_epochs": list(self.lengths),
            "offset": self.offset,
            "optimizer_state": self.optimizer_state,
            "lr_after_growth": self.lr_after_growth,
            "rewarm_steps": self.rewarm_steps if self.lr_after_growth == "rewarm" else 0,
        }

    @rank_zero_only
    def _describe(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # Beside the section `growth` of the configuration, which the logger sends as a whole.
                found = {"growth_stages": list(self.stages), "growth_stage_epochs": list(self.lengths)}
                logger.experiment.config.update(found, allow_val_change=True)

    @rank_zero_only
    def _record(self, trainer: L.Trainer, event: GrowthEvent) -> None:
        log.info(
            "epoch %d, step %d: grown from %d to %d layers (%s, plan %s) in %.2f s%s",
            *(event.epoch, event.step, event.depth_before, event.depth, event.policy, list(event.plan), event.seconds),
            "" if event.loss_before is None else f", loss {event.loss_before:.4g} -> {event.loss_after:.4g}",
        )
        write_json(Path(trainer.default_root_dir) / "growth.json", self.plain_events)
        logged = ("depth", "parameters", "seconds", "loss_before", "loss_after")
        numbers = {f"growth/{name}": value for name in logged if (value := getattr(event, name)) is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=event.step)
            if isinstance(logger, WandbLogger):
                logger.experiment.summary["growth_events"] = self.plain_events


def _train_seconds(trainer: L.Trainer) -> float | None:
    clock = find_callback(trainer, ThroughputCallback)
    return clock.train_seconds if clock is not None else None


def _epochs(trainer: L.Trainer) -> int:
    """Length of the run in epochs; stages and learning-rate schedule depend on it."""
    epochs = trainer.max_epochs or 0
    # A fast_dev_run sets max_steps itself, to the length of its one epoch.
    if epochs < 1 or (trainer.max_steps != -1 and not trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise InputError(
            f"a run is measured in epochs: trainer.max_steps={trainer.max_steps}, trainer.max_epochs="
            f"{trainer.max_epochs}; set trainer.max_epochs, leave trainer.max_steps at -1, and shape the epochs with "
            "data.batches_per_epoch"
        )
    return epochs
