"""Batches of one SUPERB task: endless in training, since s3prl counts steps; dev and tests as in its evaluation."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.audio import SAMPLE_RATE, read_audio
from datamodules.batching import MicroBatch
from datamodules.errors import InputError
from datamodules.placement import trains_on_cuda, workers_for
from datamodules.superb.effects import Effects
from datamodules.superb.recipes import DataRecipe
from datamodules.superb.registry import SuperbData, find_source, read_corpus
from datamodules.superb.rows import Row, SuperbCorpus
from datamodules.superb.samplers import (
    BalancedSampling,
    Crops,
    EndlessSampler,
    EvaluationSampler,
    HalvedSampling,
    Sampling,
    ShuffledSampling,
    WindowSampling,
    balanced_draw,
)
from datamodules.superb.speech_commands import SILENCE

TargetLength = Callable[[Row], int]
Stage = Literal["train", "dev", "test"]


class SuperbBatch(NamedTuple):
    """This rank's part of a batch, unpadded."""

    waveforms: list[Tensor]  # (T_i,) float32 each, cropped and with the recipe's gain
    rows: list[Row]
    num_samples: list[int]  # of the batch's items over all ranks
    whole: list[bool]  # False: a random crop, which no cache may keep
    counts: bool = True  # False: the batch has no item for this rank, which has one of another rank's instead


class SuperbDataset(Dataset[SuperbBatch]):
    """Decodes batches.

    Args:
        rows: the utterances.
        resample: convert files of other sample rates.
        effects: effects on all waveforms.
        keep_bytes: most bytes of decoded whole utterances to keep in memory, in each loading process.

    Raises:
        BadAudioError: a file cannot be decoded.
    """

    def __init__(self, rows: list[Row], resample: bool, effects: Effects, keep_bytes: int = 0) -> None:
        self.rows, self.resample, self.effects = rows, resample, effects
        self._kept: dict[int, Tensor] = {}
        self._room = keep_bytes

    def __getitem__(self, batch: MicroBatch) -> SuperbBatch:
        rows = [self.rows[row] for row in batch.rows]
        places = zip(batch.rows.tolist(), batch.starts.tolist(), batch.num_samples.tolist(), strict=True)
        waveforms = [self._waveform(*place) for place in places]
        whole = [row.num_samples == taken for row, taken in zip(rows, batch.num_samples, strict=True)]
        return SuperbBatch(waveforms, rows, batch.global_num_samples.tolist(), whole, batch.counts)

    def _waveform(self, index: int, start: int, taken: int) -> Tensor:
        if index in self._kept:
            return self._kept[index][start : start + taken]
        row = self.rows[index]
        if self.effects.remove_silence:  # positions count from the first sample that is left
            whole_T = self.effects.apply(read_audio(row.path, SAMPLE_RATE, resample=self.resample))
            decoded_T = torch.from_numpy(whole_T[start : start + taken])
        else:
            first = row.start + start
            part_T = read_audio(row.path, SAMPLE_RATE, first, first + taken, self.resample)
            decoded_T = torch.from_numpy(self.effects.apply(part_T))
        if taken == row.num_samples and decoded_T.nbytes <= self._room:
            self._kept[index] = decoded_T
            self._room -= decoded_T.nbytes
        return decoded_T

    # The item of a batch sampler is a whole batch, which the loader passes to this method.
    __getitems__ = __getitem__


class SuperbLoader(DataLoader[SuperbBatch]):
    """A loader whose position follows from the trainer's step count; Lightning need not warn of a mid-epoch resume."""

    def __init__(
        self, dataset: SuperbDataset, batches: Sampler[MicroBatch], num_workers: int, pin_memory: bool
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Iterator[SuperbBatch]:  # type: ignore[override]
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the sampler starts at the trainer's step."""


class SuperbDataModule(L.LightningDataModule):
    """The data of one task.

    Training batches are endless: set ``max_steps`` and ``max_epochs=-1``. One item is this rank's part of one *recipe
    micro-batch*; ``accumulate_grad_batches`` is the recipe's ``accumulate``, for any number of ranks. A resume
    continues at ``global_step * accumulate_grad_batches``, so checkpoints must be made between optimizer steps.

    Args:
        task: a key of :data:`datamodules.superb.registry.SOURCES`.
        data: the corpus and the parts of it to use.
        target_length: function that returns the encoded length of a row's target; needed for window sampling (PR, SF).
        recipe: recipe of the batches; by default the task's.
        seed: random seed of order, draws and crops.
        corpus: a corpus that is already read; by default ``setup`` reads it, for an encoder with HuBERT's hop. ER needs
            the corpus of a fold.
        keep_bytes: most bytes of decoded training audio to keep in memory, in each loading process.

    Raises:
        InputError: window sampling has no ``target_length``; from ``setup``, the corpus has an error; from
            ``train_dataloader``, full recipe batches are smaller than the number of ranks.
    """

    def __init__(
        self,
        task: str,
        data: SuperbData,
        target_length: TargetLength | None = None,
        recipe: DataRecipe | None = None,
        seed: int = 1337,
        corpus: SuperbCorpus | None = None,
        keep_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.data, self.target_length, self.seed = task, data, target_length, seed
        self.recipe = recipe or find_source(task).recipe
        if self.recipe.sampling == "window" and target_length is None:
            raise InputError(f"task {task} sorts its utterances by target length: give target_length")
        self._corpus, self.keep_bytes = corpus, keep_bytes

    @property
    def corpus(self) -> SuperbCorpus:
        if self._corpus is None:
            raise InputError("the corpus is not read yet: call setup() first")
        return self._corpus

    def setup(self, stage: str | None = None) -> None:
        if self._corpus is None:
            if find_source(self.task).corpus_of(self.data).folds:
                raise InputError(f"task {self.task} has folds: give the corpus of one, read_corpus(..., fold=NAME)")
            self._corpus = read_corpus(self.task, self.data, self.seed)

    @property
    def _resample(self) -> bool:
        return self.data.resample or self.recipe.resample

    @cached_property
    def train_set(self) -> SuperbDataset:
        """The training set, made only once, because it keeps decoded utterances."""
        return SuperbDataset(self.corpus.train, self._resample, self.recipe.effects, self.keep_bytes)

    def train_dataloader(self) -> SuperbLoader:
        rows, trainer = self.corpus.train, self.trainer
        start = trainer.global_step * trainer.accumulate_grad_batches if trainer else 0
        sampler = EndlessSampler(self._sampling(rows), self._crops(rows, "train"), start, *self._place())
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> SuperbLoader:
        rows = self.corpus.dev
        order = np.arange(len(rows))
        if self.recipe.balanced_dev:
            order = balanced_draw(_classes(rows), self.seed)
        return self._evaluation(rows, order, "dev")

    def test_dataloader(self) -> list[SuperbLoader]:
        """One loader for each of ``corpus.tests``, in its order, with whole utterances in order."""
        return [self._evaluation(rows, np.arange(len(rows)), "test") for rows in self.corpus.tests.values()]

    def whole_utterances(self) -> tuple[list[Row], list[Row]]:
        """Those of train, and those of dev and the tests, each once, that are read whole, not as random crops."""
        corpus = self.corpus
        tests = [row for rows in corpus.tests.values() for row in self._whole(rows, "test")]
        return self._whole(corpus.train, "train"), list(dict.fromkeys([*self._whole(corpus.dev, "dev"), *tests]))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch._replace(waveforms=[wave.to(device, non_blocking=True) for wave in batch.waveforms])

    def _evaluation(self, rows: list[Row], order: np.ndarray, stage: Stage) -> SuperbLoader:
        batches = EvaluationSampler(order, self._crops(rows, stage), self.recipe.eval_batch_size, *self._place())
        return self._loader(SuperbDataset(rows, self._resample, self.recipe.effects), batches)

    def _sampling(self, rows: list[Row]) -> Sampling:
        size, lengths_N = self.recipe.batch_size, _lengths(rows)
        if self.recipe.sampling == "window":
            assert self.target_length is not None
            return WindowSampling(np.array([self.target_length(row) for row in rows]), lengths_N, size, self.seed)
        if self.recipe.sampling == "halved":
            return HalvedSampling(lengths_N, size, self.seed)
        if self.recipe.sampling == "balanced":
            return BalancedSampling(_classes(rows), size, self.seed)
        return ShuffledSampling(len(rows), size, self.seed)

    def _whole(self, rows: list[Row], stage: Stage) -> list[Row]:
        most_N = self._crops(rows, stage).most_N
        return [row for row, most in zip(rows, most_N, strict=True) if row.num_samples <= most]

    def _crops(self, rows: list[Row], stage: Stage) -> Crops:
        """Long utterances of train and the silence of train and dev are cropped; tests are read whole."""
        recipe = self.recipe
        most_N = lengths_N = _lengths(rows)
        if stage == "train" and recipe.train_max_samples is not None:
            most_N = np.minimum(most_N, recipe.train_max_samples)
        if stage != "test" and recipe.silence_samples is not None:
            is_silence_N = np.array([row.target == SILENCE for row in rows])
            most_N = np.where(is_silence_N, np.minimum(most_N, recipe.silence_samples), most_N)
        return Crops(lengths_N, most_N, self.seed)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: SuperbDataset, batches: Sampler[MicroBatch]) -> SuperbLoader:
        workers = workers_for(self.data.num_workers, self.trainer)
        return SuperbLoader(dataset, batches, workers, trains_on_cuda(self.trainer))


def _lengths(rows: list[Row]) -> np.ndarray:
    return np.array([row.num_samples for row in rows], dtype=np.int64)


def _classes(rows: list[Row]) -> np.ndarray:
    return np.array([row.target for row in rows])


def _as_it_is(batch: SuperbBatch) -> SuperbBatch:
    return batch
