"""DistillationModule: connects teacher, student, objective and optimisation for Lightning.

Shapes: B batch, T samples, F frames, D width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import transformers
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import InputError
from datamodules.files import plain_values
from datamodules.speech_data import AudioBatch, SpeechDataModule, speech_data
from lightning_modules.checks import check_cached_features, check_data, check_frame_rates, check_shared_convolutions
from lightning_modules.export import CHECKPOINT_FORMAT
from lightning_modules.initial_weights import copy_first_layers, load_initial_weights
from lightning_modules.lengths import before_the_end, global_lengths, is_counted, is_padded
from lightning_modules.masking import frame_masks
from lightning_modules.objective import LossTerms, ObjectiveConfig, get_objective
from lightning_modules.optimisation import (
    LearningRates,
    OptimizerConfig,
    ParameterGroups,
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
)
from lightning_modules.precision import CudaSettings
from lightning_modules.stopwatch import StepStopwatch
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig
from lightning_modules.target_normalization import TargetStatistics, measure
from lightning_modules.teacher import Teacher, TeacherTargets, normalize_waveforms
from lightning_modules.teacher_building import build_teacher
from lightning_modules.teacher_identity import teacher_settings

log = logging.getLogger(__name__)


# Takes the function that computes the targets of this step's batch; returns the targets, computed or already known.
TargetSharing = Callable[[Callable[[], TeacherTargets]], TeacherTargets]


class DistillationModule(L.LightningModule):
    """Distil a frozen teacher into a student whose depth a callback may change.

    The teacher is not a submodule, so no checkpoint holds it, no gradient reducer sees it, and ``train()`` does not
    affect it.

    Args:
        teacher: the frozen encoder, or (from a checkpoint) ``{"class_path": ..., "init_args": ...}``.
        student: sizes and settings of the student. This and the other settings may also be a plain dict of the fields.
        objective: the losses.
        optimizer: optimizer and learning-rate schedule.
        seed: random seed of dropout, masking and fresh layers. Random numbers depend only on (seed, epoch, step, slice
            of the global batch). So a resumed run draws the same as the uninterrupted one, N processes draw the same as
            N accumulation steps of one process, and no generator state is saved.
        total_steps: length of the learning-rate schedule in optimizer steps; default: epochs x the data module's
            steps per epoch. The loader is never used to count them, because that would break resuming.
        init_from: checkpoint whose student and projections a new run starts from, with a new schedule. Use it to train
            a finished run further. A resumed run does not read it.
        cuda: CUDA settings of the whole process.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: StudentConfig = StudentConfig(),  # noqa: B008 (never mutated)
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        seed: int = 0,
        total_steps: int | None = None,
        init_from: str | None = None,
        cuda: CudaSettings = CudaSettings(),  # noqa: B008
    ) -> None:
        super().__init__()
        teacher = build_teacher(teacher)
        student, objective, optimizer, cuda = (
            StudentConfig(**student) if isinstance(student, dict) else student,
            ObjectiveConfig(**objective) if isinstance(objective, dict) else objective,
            OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer,
            CudaSettings(**cuda) if isinstance(cuda, dict) else cuda,
        )
        # Plain values only: a checkpoint with a dataclass in it cannot be loaded with weights_only=True.
        settings: dict[str, Any] = {"student": student, "objective": objective, "optimizer": optimizer, "cuda": cuda}
        plain = {name: plain_values(asdict(setting)) for name, setting in settings.items()}
        others = {"seed": seed, "total_steps": total_steps, "init_from": init_from}
        self.save_hyperparameters({"teacher": teacher.spec(), **plain, **others})
        self.init_from = init_from
        self._hidden_teacher = [teacher]  # in a list, or nn.Module would register it
        self.seed, self.total_steps, self.optimizer_config, self.cuda_settings = seed, total_steps, optimizer, cuda
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = Student(student, teacher.front_end)
            copy_first_layers(teacher, self.student)
            backend = student.compile_backend if student.compile else None
            sizes = student.hidden_size, teacher.hidden_size, teacher.num_layers
            self.objective = get_objective(objective.loss)(objective, *sizes, backend)
        if objective.targets == "feed_forward":
            teacher.use_feed_forward()
        spans = student.mask_time_prob, student.mask_time_length
        self.masks = frame_masks(objective.masked, *spans, seed, objective.mask_seed)
        if self.masks is not None:
            teacher.use_masks()
        self.objective.require_matched(student.num_layers)
        self.register_load_state_dict_post_hook(_train_matched)  # a checkpoint brings its depth
        teacher.select_layers(self.objective.layers, self.objective.output_layer)
        if student.front_end == "shared":
            teacher.share_front_end()
        check_frame_rates(teacher, self.student)
        self.stopwatch = StepStopwatch()
        self._target_sharing: TargetSharing | None = None
        self._growth_epochs: tuple[int, ...] = ()
        self._rewarm_steps = 0
        self._check_checkpoint: Callable[[dict[str, Any]], None] | None = None

    @property
    def teacher(self) -> Teacher:
        return self._hidden_teacher[0]

    def share_teacher(self, teacher: Teacher) -> None:
        """Replace this module's teacher by ``teacher``, which must be equal to it."""
        self._hidden_teacher = [teacher]
        if self.student.config.front_end == "shared":
            teacher.share_front_end()

    def share_targets(self, sharing: TargetSharing) -> None:
        """Take the targets of every step from ``sharing``, where other students train on the same batches."""
        self._target_sharing = sharing

    def plan_growth(self, epochs: Sequence[int], rewarm_steps: int) -> None:
        """Tell the learning-rate schedule when the student grows; a callback calls it before the optimizer is built.

        Args:
            epochs: epochs (0-based) at whose start the student grows.
            rewarm_steps: length in optimizer steps of the warm-up after each growth; 0 continues the one schedule.
        """
        self._growth_epochs, self._rewarm_steps = tuple(epochs), rewarm_steps

    def check_checkpoint_with(self, check: Callable[[dict[str, Any]], None]) -> None:
        """Call ``check`` with a checkpoint before its weights are loaded; callbacks' own hooks run after that."""
        self._check_checkpoint = check

    # -- one step -------------------------------------------------------------------------------------------------

    def inputs(self, batch: AudioBatch) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B, T) prepared for the teacher, and valid samples (B,); ``None`` if no item is padded."""
        assert batch.waveforms is not None
        num_samples = batch.num_samples if is_padded(batch.num_samples, batch.waveforms.shape[1]) else None
        waveforms_BT = batch.waveforms
        if self.teacher.normalize:
            waveforms_BT = normalize_waveforms(waveforms_BT, num_samples)
        return waveforms_BT, num_samples

    def mask_of(self, batch: AudioBatch) -> Tensor | None:
        """Mask (B, F) of a training batch, true where a frame is masked; ``None`` without masked distillation."""
        if self.masks is None:
            return None
        longest = batch.num_samples.max() if batch.waveforms is None else torch.tensor(batch.waveforms.shape[1])
        frames_B, width = self.student.num_frames(batch.num_samples), int(self.student.num_frames(longest))
        return self.masks.of(batch, frames_B, width, self.current_epoch).to(self.device, non_blocking=True)

    def targets(self, batch: AudioBatch, mask_BF: Tensor | None = None) -> TeacherTargets:
        """Targets of this share of a global batch: cached ones if the batch carries them, else a teacher forward.

        Cached targets are already normalised; those of a teacher forward are not yet, and may depend on a mask.
        """
        with self.stopwatch.section("teacher"):
            if batch.cached is not None:
                output_BFD, *hidden = batch.cached.targets.decoded()
                return TeacherTargets(output_BFD, dict(zip(self.teacher.hidden_layers, hidden, strict=True)))
            return self.teacher(*self.inputs(batch), mask_BF)

    def losses(self, batch: AudioBatch, scale: float = 1.0, targets: TeacherTargets | None = None) -> LossTerms:
        """Loss terms of this share of a global batch, times ``scale``; ``targets`` default to :meth:`targets`.

        Sums over this share's frames are divided by the *global* number of frames, or by infinity if the share does not
        count. ``scale`` = ranks x accumulation steps undoes the averaging of DDP and of accumulation, so that the
        gradient is that of the global mean.
        """
        mask_BF = self.mask_of(batch) if self.training else None
        if targets is None:
            targets = self.targets(batch, mask_BF)
        if batch.cached is None:
            targets = self.objective.normalizer(targets)
        # A batch of cached features has no audio, and a cached segment is not padded.
        waveforms_BT, num_samples = (None, None) if batch.waveforms is None else self.inputs(batch)
        features_BFC = self.student.known_features(targets.features_BFC, (batch.cached, batch.features))
        hidden_states = self.student(waveforms_BT, num_samples, features_BFC, mask_BF)
        valid_BF = None
        if num_samples is not None:
            frames_B = self.student.num_frames(num_samples)
            valid_BF = before_the_end(frames_B, hidden_states[-1].shape[1], self.device)
        frames = self._global_frames(batch, int(scale)) if is_counted(batch) else torch.inf
        return self.objective(hidden_states, targets, self.student.originals, valid_BF, frames / scale)

    def training_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Any]:
        accumulate = self.trainer.accumulate_grad_batches
        terms = self._step_losses(batch, scale=self.trainer.world_size * accumulate)
        if is_counted(batch):  # not for Lightning's progress bar, which would read it in every step and so wait
            self.log("train/loss", terms.total.detach(), logger=False, batch_size=1)
        return {"loss": terms.total, "terms": terms.named()}

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        data = speech_data(self.trainer)
        shares = self.trainer.world_size * (1 if data is None else data.validation_parts)
        terms = self._step_losses(batch, scale=shares)
        frames = self._global_frames(batch, shares)
        metrics = {f"val/{name}": value for name, value in terms.named().items()}
        self.log_dict(metrics, batch_size=frames, sync_dist=True, prog_bar=False, logger=False)  # by TrainingMetrics

    def _global_frames(self, batch: AudioBatch, num_shares: int) -> int:
        """Number of valid frames of the global batch that this is a share of."""
        return int(self.student.num_frames(global_lengths(batch, num_shares)).sum())

    def _step_losses(self, batch: AudioBatch, scale: float) -> LossTerms:
        share = self._target_sharing
        return self.losses(batch, scale, None if share is None else share(lambda: self.targets(batch)))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Slices are numbered as in ``GlobalBatchSampler``, so the result does not depend on which process computes one.
        step, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        place = part * self.trainer.world_size + self.global_rank
        words = np.random.SeedSequence([self.seed, self.trainer.current_epoch, step, place]).generate_state(2)
        torch.manual_seed(int(words[0]))
        if self.student.config.mask_time_prob > 0:
            np.random.seed(int(words[1]))  # noqa: NPY002 (Hugging Face's SpecAugment draws from numpy's global state)

    # -- optimisation ---------------------------------------------------------------------------------------------

    def train_matched(self) -> None:
        """Let the targets of the student's present depth be trained, and no others.

        It follows every change of depth: the cut to the first stage (callbacks are set up before the module), a loaded
        checkpoint (before DDP wraps the module), and a growth (new parameter groups, before DDP wraps it again).
        """
        depth, originals = self.student.depth, self.student.originals
        self.objective.train_matched(depth, originals)
        self.student.train_states({depth, *self.objective.positions(depth, originals).values()})

    def parameter_groups(self) -> ParameterGroups:
        """The optimizer's groups in canonical order, for a new optimizer and after a growth alike."""
        self.train_matched()
        modules: Iterator[tuple[str, nn.Module]] = iter([("student", self.student), ("objective", self.objective)])
        return parameter_groups(modules, self.optimizer_config.weight_decay)

    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, from the data module and ``limit_train_batches``, without using a loader."""
        if (datamodule := speech_data(self.trainer)) is None:
            raise InputError(
                "the learning-rate schedule needs model.total_steps, since this data has no `steps_per_epoch`"
            )
        accumulate, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        batches = datamodule.steps_per_epoch * accumulate
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // accumulate)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.optimizer_config
        if config.implementation == "auto" and self.trainer.precision == "16-mixed":
            # A fused optimizer unscales gradients itself, after clipping; Lightning refuses that combination.
            config = replace(config, implementation="foreach")
        optimizer = build_optimizer(self.parameter_groups(), config)
        if self._growth_epochs or self.total_steps is None:
            per_epoch = self.steps_per_epoch()
        total = self.total_steps or per_epoch * cast(int, self.trainer.max_epochs)
        growth_steps = [epoch * per_epoch for epoch in self._growth_epochs]

        def factor(step: int) -> float:
            return learning_rate_factor(step, total, self.optimizer_config, growth_steps, self._rewarm_steps)

        scheduler = LearningRates(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip with torch itself: Lightning refuses to clip for fused AdamW under any mixed precision.

        Gradients are unscaled at this point, because bf16 has no scaler. With a scaler, fused optimizers unscale in
        ``step`` and clipping scaled gradients would be wrong, so that case is left to Lightning, which refuses it.
        """
        if not gradient_clip_val:
            return
        if self.trainer.precision == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        clip([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)

    # -- set-up and checkpoints -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # The device with the least memory decides into how many parts all ranks cut a batch.
        parts = torch.tensor(self.trainer.accumulate_grad_batches, device=self.trainer.strategy.root_device)
        self.trainer.accumulate_grad_batches = int(self.trainer.strategy.reduce(parts, reduce_op="max"))
        self.train_matched()
        if (datamodule := speech_data(self.trainer)) is None:
            return
        check_data(datamodule, self.teacher, self.masks)
        if stage == "fit" and datamodule.targets is not None:
            masks = {} if self.masks is None else self.masks.settings
            settings = teacher_settings(self.teacher) | self.objective.normalizer.settings | masks
            frozen = self.student.config.starts_frozen
            datamodule.use_targets(settings, self.teacher.hidden_layers, features=frozen)

    def on_fit_start(self) -> None:
        if self.init_from is not None and self.trainer.ckpt_path is None:  # Lightning sets ckpt_path only now
            load_initial_weights(Path(self.init_from), self.student, self.objective)
        self.on_validation_start()
        check_cached_features(speech_data(self._trainer), self.student)
        if self.objective.normalizer.kind == "standardize":
            self._settle_statistics()

    def _settle_statistics(self) -> None:
        """Set the target statistics: from the checkpoint, else from the cache, else measured by the first process."""
        normalizer, datamodule = self.objective.normalizer, speech_data(self.trainer)
        pair = None if datamodule is None else datamodule.cached_statistics
        # Of the layers of all students that share the teacher.
        places = [0, *(1 + self.teacher.hidden_layers.index(layer) for layer in self.objective.layers)]
        cached = None if pair is None else TargetStatistics(*(values_SD[places] for values_SD in pair))
        if (known := normalizer.statistics) is None:
            found = cached
            if found is None and self.global_rank == 0:
                found = self.measure_targets(datamodule, self.device)
            normalizer.use(cast(TargetStatistics, self.trainer.strategy.broadcast(found)))
        elif cached is not None and not known.close_to(cached):
            raise InputError(
                "the cache of data.targets was standardized with another mean and deviation than those of this "
                "checkpoint: use the cache that the run began with, or begin a new run"
            )

    def measure_targets(self, datamodule: SpeechDataModule | None, device: torch.device) -> TargetStatistics:
        """Measure mean and standard deviation of the targets over a fixed part of the training data.

        Raises:
            InputError: the data module has no ``statistics_batches``.
        """
        seconds = self.objective.config.statistics_seconds
        batches = None if datamodule is None else datamodule.statistics_batches(seconds)
        if datamodule is None or batches is None:
            raise InputError(
                "model.objective.normalize_targets=standardize needs a data module with `statistics_batches`, as "
                "LibriSpeechDataModule has it: choose layer or none"
            )
        moved = (datamodule.transfer_batch_to_device(batch, device, 0) for batch in batches)
        return measure((self.targets(batch) for batch in moved), self.objective.layers)

    def on_validation_start(self) -> None:
        self.cuda_settings.apply(self.device)
        self.teacher.prepare(self.device)
        if self.student.config.front_end == "shared":
            check_shared_convolutions(self.teacher, self.student)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._check_checkpoint is not None:
            self._check_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint, in plain values, all that is needed to rebuild, export and describe the student."""
        trainer = self._trainer
        datamodule = speech_data(trainer)
        metrics = trainer.callback_metrics if trainer is not None else {}
        meta = checkpoint.setdefault("interstack", {})
        meta |= {
            "format": CHECKPOINT_FORMAT,
            "student_config": plain_values(self.student.hubert.config.to_dict()),
            "architecture": self.student.config.architecture,
            "normalize": self.teacher.normalize,
            "sample_rate": self.teacher.sample_rate,
            "teacher": self.teacher.spec(),
            "teacher_precision": self.teacher.precision_used,
            "recipe": plain_values(dict(self.hparams)),
            "ancestry": list(self.student.ancestry),
            "originals": list(self.student.originals),
            "data": datamodule.fingerprint() if datamodule is not None else {},
            "metrics": {name: float(value) for name, value in metrics.items()},
            "versions": {
                "torch": str(torch.__version__),
                "lightning": L.__version__,
                "transformers": transformers.__version__,
            },
        }


def _train_matched(module: nn.Module, _: Any) -> None:
    cast(DistillationModule, module).train_matched()
