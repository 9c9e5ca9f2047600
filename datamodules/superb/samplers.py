"""Samplers that choose the utterances of micro-batch k of an endless training run, one for each SUPERB sampling.

Micro-batch k is a pure function of (seed, k), so an exact resume needs no stored state. A rank takes every
``world_size``-th item of it.

Shapes: N rows, G items of a micro-batch over all ranks, B of them on this rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from datamodules.batching import MicroBatch, cut, uniform
from datamodules.errors import InputError

HALVING_SAMPLES = 300_000
"""A window of the PR and SF lists is halved when its first utterance has more samples."""
GROUP_HALVING_SAMPLES = 2_000
"""A full group of the ASR list is split in two when its longest utterance has more samples, on LibriSpeech always."""


class Sampling(Protocol):
    """Chooses the rows of micro-batch k."""

    size: int  # items of a full micro-batch; halving and the end of a pass leave smaller ones

    def rows(self, micro_batch: int) -> np.ndarray: ...


class EpochOrder:
    """An endless stream of permutations, a new one for each pass; micro-batch k is item k of the stream."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items, self.seed = num_items, seed
        self._pass, self._order = -1, np.zeros(0, dtype=np.int64)

    def __getitem__(self, index: int) -> int:
        pass_index, position = divmod(index, self.num_items)
        return int(self.of_pass(pass_index)[position])

    def of_pass(self, pass_index: int) -> np.ndarray:
        if pass_index != self._pass:
            generator = np.random.default_rng([self.seed, pass_index])
            self._pass, self._order = pass_index, generator.permutation(self.num_items)
        return self._order


class WindowSampling:
    """Sampling of PR and SF: ``batch_size`` neighbours in the list sorted by target length, long first.

    A pass visits all N starts, shuffled. A start near the end is clamped, so that the last window occurs ``batch_size``
    times. Only the window's first utterance, the one with the longest target, decides on halving.
    """

    def __init__(self, target_lengths_N: np.ndarray, num_samples_N: np.ndarray, batch_size: int, seed: int) -> None:
        self.sorted_N = np.argsort(-np.asarray(target_lengths_N), kind="stable")
        self.num_samples_N, self.batch_size = num_samples_N, batch_size
        self._starts = EpochOrder(len(self.sorted_N), seed)
        self.size = min(batch_size, len(self.sorted_N))

    def rows(self, micro_batch: int) -> np.ndarray:
        return self._window(self._starts[micro_batch])

    def _window(self, start: int) -> np.ndarray:
        start = max(0, min(start, len(self.sorted_N) - self.batch_size))
        window = self.sorted_N[start : start + self.batch_size]
        too_long = self.num_samples_N[window[0]] > HALVING_SAMPLES
        return window[: max(1, self.batch_size // 2)] if too_long else window


class HalvedSampling:
    """Sampling of ASR: groups of ``batch_size`` in the list sorted by audio length, long first; full ones are halved.

    The composition of batches is fixed; their order changes with the pass. A last group that is not full stays whole,
    but is left out if it is a single utterance, the shortest one, as in s3prl.
    """

    def __init__(self, num_samples_N: np.ndarray, batch_size: int, seed: int) -> None:
        sorted_N = np.argsort(-np.asarray(num_samples_N), kind="stable")
        batches: list[np.ndarray] = []
        for start in range(0, len(sorted_N), batch_size):
            group = sorted_N[start : start + batch_size]
            halve = len(group) == batch_size and batch_size >= 2 and num_samples_N[group[0]] > GROUP_HALVING_SAMPLES
            batches += [group[: batch_size // 2], group[batch_size // 2 :]] if halve else [group]
        alone = len(sorted_N) > 1 and len(sorted_N) % batch_size == 1
        self.batches = batches[:-1] if alone else batches
        self._order = EpochOrder(len(self.batches), seed)
        self.size = len(self.batches[0])

    def rows(self, micro_batch: int) -> np.ndarray:
        return self.batches[self._order[micro_batch]]


class ShuffledSampling:
    """Sampling of IC and SID: a new permutation in each pass; the last batch of a pass may be smaller."""

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.batch_size, self.batches_per_pass = batch_size, -(-num_rows // batch_size)
        self._order = EpochOrder(num_rows, seed)
        self.size = min(batch_size, num_rows)

    def rows(self, micro_batch: int) -> np.ndarray:
        pass_index, position = divmod(micro_batch, self.batches_per_pass)
        return self._order.of_pass(pass_index)[position * self.batch_size : (position + 1) * self.batch_size]


class BalancedSampling:
    """Sampling of KS: independent draws with replacement, with weight 1 / class size, so classes are equally likely."""

    def __init__(self, classes_N: np.ndarray, batch_size: int, seed: int) -> None:
        _, inverse_N, counts = np.unique(classes_N, return_inverse=True, return_counts=True)
        self._edges_N = np.cumsum(1.0 / counts[inverse_N]) / len(counts)
        self.seed, self.size = seed, batch_size

    def rows(self, micro_batch: int) -> np.ndarray:
        draws_G = np.random.default_rng([self.seed, micro_batch]).random(self.size)
        # The last edge is 1 within rounding; a draw beyond it belongs to the last row.
        return np.minimum(np.searchsorted(self._edges_N, draws_G, side="right"), len(self._edges_N) - 1)


@dataclass(frozen=True)
class Crops:
    """Chooses the part of an utterance to read: at most ``most_N`` samples from a random start.

    The start is a function of (seed, micro-batch, position in it), so that an utterance drawn twice gives two crops.
    """

    num_samples_N: np.ndarray
    most_N: np.ndarray
    seed: int

    def resolve(self, rows_G: np.ndarray, micro_batch: int) -> MicroBatch:
        available_G = self.num_samples_N[rows_G]
        taken_G = np.minimum(available_G, self.most_N[rows_G])
        place_G = uniform(self.seed, micro_batch, np.arange(len(rows_G)))
        starts_G = (place_G * (available_G - taken_G + 1)).astype(np.int64)
        return MicroBatch(rows_G, starts_G, taken_G, taken_G)


class EndlessSampler(Sampler[MicroBatch]):
    """This rank's part of micro-batches ``start``, ``start + 1``, ... without end.

    A micro-batch that is smaller than usual may have fewer items than ranks. For example, VoxCeleb1's 138,361 training
    utterances leave one utterance in the last batch of a pass. See :func:`datamodules.batching.cut`.

    Raises:
        InputError: a full micro-batch has fewer items than ranks.
    """

    def __init__(self, sampling: Sampling, crops: Crops, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if sampling.size < world_size:
            raise InputError(
                f"a recipe batch has {sampling.size} utterances, fewer than {world_size} processes: "
                "use fewer devices (the recipe's batch size is part of the benchmark)"
            )
        self.sampling, self.crops, self.start = sampling, crops, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[MicroBatch]:
        micro_batch = self.start
        while True:
            batch = self.crops.resolve(self.sampling.rows(micro_batch), micro_batch)
            yield cut(batch, self.rank, self.world_size)
            micro_batch += 1


class EvaluationSampler(Sampler[MicroBatch]):
    """Fixed batches of ``rows_N`` in their order; the whole batch b belongs to rank b mod world size.

    Batches are the same as in a single process, because the effect of padding on an utterance depends on its batch.
    """

    def __init__(self, rows_N: np.ndarray, crops: Crops, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows_N, self.crops, self.batch_size = rows_N, crops, batch_size
        self.batches = range(rank, -(-len(rows_N) // batch_size), world_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self.batches:
            rows = self.rows_N[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.crops.resolve(rows, batch)


def balanced_draw(classes_N: np.ndarray, seed: int) -> np.ndarray:
    """The dev set of KS: N balanced draws, the same in every evaluation, as in s3prl."""
    return BalancedSampling(classes_N, len(classes_N), seed).rows(0)
