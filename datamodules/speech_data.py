"""SpeechDataModule: what distillation needs of a data module, and help to write one.

A subclass has a ``steps_per_epoch`` and a ``train_dataloader`` whose batches are :class:`AudioBatch`; all else has a
default. :class:`datamodules.librispeech.LibriSpeechDataModule` is the one that ships.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batching import BatchPlan, GlobalBatchSampler, MicroBatch, balanced_sizes
from datamodules.errors import InputError
from datamodules.loading import AudioBatch, ResumableLoader
from datamodules.placement import trains_on_cuda, workers_for

__all__ = ["AudioBatch", "SpeechDataModule", "Utterances", "audio_batch", "speech_data"]


class Utterances(Protocol):
    """A sequence of waveforms (T,) float32, each read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> Tensor: ...


def audio_batch(waveforms: Sequence[Tensor]) -> AudioBatch:
    """Pad waveforms (T,) with zeros to a batch."""
    num_samples = torch.tensor([len(waveform_T) for waveform_T in waveforms])
    return AudioBatch(torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), num_samples)


def validation_parts(plan: BatchPlan, trainer: L.Trainer | None) -> int:
    """Micro-batches of a validation batch: as many as in training, or as the smallest batch can be cut into."""
    if trainer is None:
        return 1
    return max(1, min(trainer.accumulate_grad_batches, int(plan.sizes.min()) // trainer.world_size))


class SpeechDataModule(L.LightningDataModule, ABC):
    """Batches of speech for distillation.

    Attributes:
        sample_rate: sample rate of the waveforms in Hz; the teacher's must be the same.
        targets: folder of cached teacher targets that training batches carry; ``None`` if the teacher runs.
        validation_parts: micro-batches that a process computes one after the other of each global batch in validation:
            as many as in training, where batches are large enough, since both have to fit in a device's memory.
    """

    sample_rate: int = 16_000
    targets: str | None = None
    validation_parts: int = 1

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same for any number of processes; known after ``setup``."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """Loader of ``steps_per_epoch * accumulate_grad_batches`` batches for this process; see :meth:`loader`."""

    def loader(
        self, utterances: Utterances, batch_size: int, seed: int | None = None, num_workers: int | None = None
    ) -> ResumableLoader:
        """Load this process's shares of batches of ``batch_size`` utterances; a resumed run continues in mid-epoch.

        An epoch has ceil(N / batch_size) batches of N utterances, of sizes that differ by at most one.

        Args:
            utterances: the waveforms.
            batch_size: utterances per optimizer step, over all processes and accumulation steps.
            seed: random seed of the order; ``None``, for validation, keeps the order of ``utterances``.
            num_workers: loader processes per rank; by default as in ``LibriSpeechDataModule``.

        Raises:
            InputError: there are no utterances, or fewer in a batch than processes x accumulation steps.
        """
        if not len(utterances):
            raise InputError(f"{type(self).__name__} has no utterances to load: look at the folder that it reads")
        trainer = self.trainer
        plan = plan_in_order(len(utterances), batch_size)
        parts = trainer.accumulate_grad_batches if trainer else 1
        if seed is None:
            parts = self.validation_parts = validation_parts(plan, trainer)
        processes, smallest = trainer.world_size if trainer else 1, int(plan.sizes.min())
        if smallest < processes * parts:  # lengths are not known, so every share counts alike
            raise InputError(
                f"the smallest global batch has {smallest} utterances, fewer than {processes} processes x {parts} "
                f"accumulation steps; use larger batches or at most {smallest} parts"
            )
        sampler = GlobalBatchSampler(
            plan,
            Whole(),
            seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=processes,
            accumulate=parts,
            epoch=finished_epochs(trainer) if seed is not None else 0,
        )
        workers, pinned = workers_for(num_workers, trainer), trains_on_cuda(trainer)
        return ResumableLoader(_Batches(utterances), sampler, workers, pin_memory=pinned)

    def example_batch(self, num_items: int) -> AudioBatch | None:
        """The same few training utterances in every call, read without random numbers.

        The loss before and after a growth is measured on them, and their spectrograms are drawn. By default there are
        none, and both are left out.
        """
        return None

    def growth_batch(self, num_items: int) -> AudioBatch | None:
        """The batch on which the loss before and after a growth is measured; by default the example batch."""
        return self.example_batch(num_items)

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that determine the training data and their order; a run that resumes must have the same."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}"}

    @property
    def without_transcript(self) -> int | None:
        """Number of utterances without text, for the run's summary; ``None`` if not known."""
        return None

    def statistics_batches(self, seconds: float) -> Iterator[AudioBatch] | None:
        """Unpadded training utterances of ``seconds`` in all, for target statistics; ``None`` if there are none."""
        return None

    def use_targets(self, teacher: Mapping[str, Any], layers: Sequence[int], features: bool = False) -> None:
        """Add the cached targets of these hidden layers to training batches; called if ``targets`` is set.

        With ``features`` the student's front end is frozen, so that its cached features may be added too.

        Raises:
            InputError: the cache was made with other settings of the teacher or other data.
        """
        raise InputError(f"{type(self).__name__} reads no cached targets: leave out its `targets`")

    @property
    def cached_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation with which the cached targets were standardized; ``None`` if they were not."""
        return None

    @property
    def reads_features(self) -> bool:
        """Whether batches carry the features of a frozen front end."""
        return self.cached_front_end is not None

    @property
    def cached_front_end(self) -> str | None:
        """Hash of the front end whose features are in the cache of targets; ``None`` if they are not."""
        return None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move waveforms and records. Lengths are used on the host, since reading them back would stall a GPU."""
        waveforms = None if batch.waveforms is None else batch.waveforms.to(device, non_blocking=True)
        cached, features = (None if part is None else part.to(device) for part in (batch.cached, batch.features))
        return batch._replace(waveforms=waveforms, cached=cached, features=features)


def speech_data(trainer: L.Trainer | None) -> SpeechDataModule | None:
    """The trainer's data module; ``None`` if it trains on plain loaders or on data of another kind."""
    found = getattr(trainer, "datamodule", None)
    return found if isinstance(found, SpeechDataModule) else None


def finished_epochs(trainer: L.Trainer | None) -> int:
    """Epochs that a run has finished. On a resume a loader's iterator is created before ``set_epoch`` is called."""
    return 0 if trainer is None else trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def plan_in_order(num_rows: int, batch_size: int) -> BatchPlan:
    """Plan batches of rows in their order, in one bucket, so that an epoch's order permutes all rows."""
    sizes = balanced_sizes(num_rows, batch_size)
    return BatchPlan(np.arange(num_rows), np.concatenate([[0], np.cumsum(sizes)]), np.array([0, len(sizes)]))


@dataclass(frozen=True)
class Whole:
    """Reads every utterance whole; lengths are known only after reading."""

    def resolve(self, rows_G: np.ndarray, pass_index: int) -> MicroBatch:
        unknown_G = np.zeros_like(rows_G)
        return MicroBatch(rows_G, unknown_G, unknown_G, unknown_G)


class _Batches(Dataset[AudioBatch]):
    """Reads the rows of a micro-batch."""

    def __init__(self, utterances: Utterances) -> None:
        self.utterances = utterances
        self.notes: Tensor | None = None  # the loader's; nothing is noted

    def __getitem__(self, batch: MicroBatch) -> AudioBatch:
        return audio_batch([self.utterances[int(row)] for row in batch.rows])

    __getitems__ = __getitem__

    def last_read(self, process: int) -> str | None:
        return None
