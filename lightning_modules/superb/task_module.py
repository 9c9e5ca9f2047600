"""TaskModule: a frozen upstream, a featurizer and a head, trained and scored on one task.

Shapes: B batch, F frames, D width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.superb.feature_cache import FeatureCache
from lightning_modules.superb.featurizer import Featurizer, States, frame_counts, without_padding
from lightning_modules.superb.specaug import spec_augment
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task
from lightning_modules.superb.upstream import Upstream

UPSTREAM_PREFIX = "upstream."


class Batch(Protocol):
    """This rank's part of a batch; ``datamodules.superb`` makes them."""

    @property
    def waveforms(self) -> list[Tensor]: ...

    @property
    def rows(self) -> Sequence[Item]: ...

    @property
    def num_samples(self) -> list[int]: ...

    @property
    def whole(self) -> list[bool]: ...

    @property
    def counts(self) -> bool: ...


@dataclass(frozen=True)
class TaskOptimisation:
    """The recipe's optimizer over featurizer and head in one group, as in s3prl.

    Args:
        lr: learning rate.
        decay_updates: updates over which it falls linearly to zero; ``None``: it is constant, as in SUPERB.
    """

    lr: float
    decay_updates: int | None = None


def build_parts(
    task: Task, num_states: int, width: int, probe: ProbeStart | None = None, states: States = "all"
) -> tuple[Featurizer, nn.Module]:
    """The featurizer and the head of a task, for ``num_states`` hidden states of width ``width``."""
    chosen = num_states - 1 if states == "last" or not task.recipe.updates else None
    return Featurizer(num_states, width, probe is not None, chosen), task.build_head(width, probe)


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Make cuDNN deterministic, as s3prl's runner does, and restore its settings afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


class TaskModule(L.LightningModule):
    """Trains and scores one task on one upstream.

    Random numbers (dropout, SpecAugment) depend only on (seed, micro-batch, rank), so that a resume is exact. On CUDA
    it is exact within rounding, because the gradients of CTC and of SpecAugment's time warp sum in no fixed order.
    Checkpoints hold featurizer and head, never the upstream.

    Args:
        upstream: the frozen encoder.
        task: the task that the head is trained for.
        optimisation: learning rate and its decay.
        seed: random seed of initialisation and training.
        cache: source of hidden states, computed for each utterance alone; ``None``: they are computed per batch.
        probe: start values of a linear probe, which replaces SUPERB's head and standardises hidden states.
        tests: the items of each test set by its name, in the order of the loaders.
        states: hidden states that the head sees.

    Attributes:
        scores: dev metrics of the last evaluation.
        test_scores: metrics of each test set.
        test_predictions: predictions for each test set, in the order of its items.
    """

    def __init__(
        self,
        upstream: Upstream,
        task: Task,
        optimisation: TaskOptimisation,
        seed: int = 1337,
        cache: FeatureCache | None = None,
        probe: ProbeStart | None = None,
        tests: Mapping[str, Sequence[Item]] = {},
        states: States = "all",
    ) -> None:
        super().__init__()
        self.upstream, self.task, self.optimisation = upstream, task, optimisation
        self.seed, self.cache, self.tests = seed, cache, tests
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.featurizer, self.head = build_parts(task, upstream.num_states, upstream.width, probe, states)
        self._dev = "dev" if probe is None else "probe_dev"  # prefix of its logged metrics
        self.strict_loading = False  # the upstream is not in a checkpoint
        self.scores: dict[str, float] = {}
        self.test_scores: dict[str, dict[str, float]] = {}
        self.test_predictions: dict[str, list[Prediction]] = {}
        self._predictions: list[Prediction] = []

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters of featurizer and head."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, batch: Batch) -> tuple[Any, list[int]]:
        """The head's output, and the number of frames of each utterance."""
        num_samples, longest = [len(waveform_T) for waveform_T in batch.waveforms], max(batch.num_samples)
        features_BFD, num_frames = self._features(batch, num_samples, longest)
        features_BFD = without_padding(features_BFD, num_frames)
        features_BFD, num_frames = self.task.features(features_BFD, num_frames, num_samples, longest)
        if self.training and self.task.recipe.spec_augment:
            features_BFD = spec_augment(features_BFD, num_frames)
        return self.head(features_BFD, num_frames), num_frames

    def _features(self, batch: Batch, num_samples: list[int], longest: int) -> tuple[Tensor, list[int]]:
        if self.cache is not None:
            return self._cached_features(batch, num_samples)
        states = self.upstream(batch.waveforms, longest)
        available = states[0].shape[1]
        kept = frame_counts([longest], self.upstream.rate, available)[0]
        features_BFD = self.featurizer([state_BFD[:, :kept] for state_BFD in states])
        return features_BFD, frame_counts(num_samples, self.upstream.rate, available)

    def _cached_features(self, batch: Batch, num_samples: list[int]) -> tuple[Tensor, list[int]]:
        assert self.cache is not None
        # In memory only training utterances are kept, because they are read again. A probe scores dev and test once.
        keep = self.training or self.cache.folder is not None
        pairs = zip(batch.waveforms, batch.whole, strict=True)
        utterances = [self.cache.states(waveform_T, keep and whole) for waveform_T, whole in pairs]
        states = [pad_sequence(list(layer), batch_first=True) for layer in zip(*utterances, strict=True)]
        rate = self.upstream.rate
        counts = [
            frame_counts([samples], rate, len(states[0]))[0]
            for samples, states in zip(num_samples, utterances, strict=True)
        ]
        return self.featurizer(states), counts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(self._step_seed(batch_idx))
        output, num_frames = self(batch)
        losses_B = self.task.losses(output, num_frames, batch.rows)
        # DDP takes the mean over ranks; a rank's items are weighted by their share of the whole batch.
        loss = losses_B.sum() * self.trainer.world_size / sum(map(self.task.weight, batch.num_samples))
        if not batch.counts:
            loss = 0 * loss  # so that this rank takes part in the reduction
        updates = self.trainer.global_step + 1.0
        self.log_dict({"train/loss": loss.detach(), "step": updates}, batch_size=len(batch.num_samples))
        return loss

    def _step_seed(self, batch_idx: int) -> int:
        accumulate = self.trainer.accumulate_grad_batches
        micro_batch = self.trainer.global_step * accumulate + batch_idx % accumulate
        text = f"{self.seed} {micro_batch} {self.trainer.global_rank}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

    def on_validation_epoch_start(self) -> None:
        self._predictions = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, num_frames = self(batch)
        self._predictions += self.task.predict(output, num_frames, batch.rows)

    def on_validation_epoch_end(self) -> None:
        self.scores = self._scores(self._gathered(self._predictions), "dev")
        scores = {f"{self._dev}/{name}": value for name, value in self.scores.items()}
        self.log_dict(scores | {"step": float(self.trainer.global_step)})

    def on_test_epoch_start(self) -> None:
        # A rank may have no batch of some set, but gathering needs all ranks for every set.
        self.test_predictions = {name: [] for name in self.tests}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        output, num_frames = self(batch)
        name = list(self.tests)[dataloader_idx]
        self.test_predictions[name] += self.task.predict(output, num_frames, batch.rows)

    def on_test_epoch_end(self) -> None:
        for name, items in self.tests.items():
            place = {item.key: number for number, item in enumerate(items)}
            predictions = sorted(self._gathered(self.test_predictions[name]), key=lambda one: place[one.key])
            self.test_predictions[name], self.test_scores[name] = predictions, self._scores(predictions, name)

    def _scores(self, predictions: list[Prediction], split: str) -> dict[str, float]:
        """Metrics, computed on one rank only, because some tasks keep all cores busy with them."""
        if self.trainer.world_size == 1:
            return self.task.score(predictions, split)
        scores = [self.task.score(predictions, split) if self.trainer.is_global_zero else {}]
        torch.distributed.broadcast_object_list(scores)
        return scores[0]

    def _gathered(self, predictions: list[Prediction]) -> list[Prediction]:
        """The predictions of all ranks."""
        if self.trainer.world_size == 1:
            return predictions
        parts: list[list[Prediction]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(parts, predictions)
        return [prediction for part in parts for prediction in part]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [*self.featurizer.parameters(), *self.head.parameters()]
        optimizer = self.task.recipe.optimizer(parameters, lr=self.optimisation.lr)
        total = self.optimisation.decay_updates
        if total is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def own_state(self) -> dict[str, Tensor]:
        """State of featurizer and head."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(UPSTREAM_PREFIX)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.own_state()
