"""Assignment of utterances to optimizer steps: length buckets, an order per epoch, and its split over devices.

A *global batch* is the batch of one optimizer step, over all ranks and accumulation steps. Rows are sorted by
effective length (at most ``max_samples``) and split into contiguous buckets. Every pass over the corpus
permutes the rows inside each bucket, fills the batches from them and shuffles the order of the batches. All
of it is a pure function of (seed, pass), so an exact resume needs no stored state, and ranks need not communicate.

Shapes: N rows, M micro-batches of a global batch, G items of a global batch, B items of a micro-batch.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from datamodules.errors import InputError

logger = logging.getLogger(__name__)

# With more buckets, cropping to the shortest loses less audio; with fewer, batches mix more. Measured on 281,241
# lengths drawn like LibriSpeech's (4,395 batches of 64, at most 15.6 s): 63 buckets of 69 or 70 batches lose 0.9 %
# of the audio, 32 lose 1.7 %, 16 lose 3.4 %; without any mixing 0.01 % is lost.
MOST_BUCKETS = 64
# A small corpus has fewer buckets, of at least two batches, or an epoch would only reorder fixed batches. On 1,003
# clips of 1.5 to 32 s in batches of 8 this loses 1.4 %, with four batches 2.5 %; on 144 clips in batches of 8, 7 %
# and 15 %.
FEWEST_BATCHES_PER_BUCKET = 2
MOST_IDLE = 0.01  # part of the micro-batches of a pass that may have nothing to count before a warning


@dataclass(frozen=True)
class BatchPlan:
    """The fixed part of the order. Batch b has positions ``starts[b]`` to ``starts[b + 1]`` of ``rows``."""

    rows: np.ndarray  # (N,) rows in order of (effective length, row)
    starts: np.ndarray  # (number of batches + 1,) positions
    buckets: np.ndarray  # (number of buckets + 1,) batches

    @property
    def num_batches(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(number of batches,) rows of each."""
        return np.diff(self.starts)


class PassOrder(NamedTuple):
    """One pass over the corpus: the rows that fill the batches, and the order of the batches."""

    rows: np.ndarray  # (N,)
    batches: np.ndarray  # (number of batches,)


class MicroBatch(NamedTuple):
    """The segments that one rank reads for one accumulation step; fully resolved, so that workers need no state."""

    rows: np.ndarray  # (B,)
    starts: np.ndarray  # (B,) first sample to read
    num_samples: np.ndarray  # (B,) samples to read
    global_num_samples: np.ndarray  # (G,) samples to read of all items of the global batch; the largest is its width
    segments: np.ndarray | None = None  # (B,) numbers of fixed segments; None: one per row, with the row's number
    counts: bool = True  # False: the global batch has no item for this part, which has one of another part's instead


class Crop(Protocol):
    """Chooses the segments to read for the rows of a global batch."""

    def resolve(self, rows_G: np.ndarray, pass_index: int) -> MicroBatch:
        """The whole global batch, before it is split."""


@dataclass(frozen=True)
class CropRule:
    """Brings the items of one global batch to one length.

    ``length="crop"`` crops all to the shortest effective length; "pad" keeps each one's own, padded to the longest.
    All start positions of a crop are equally likely, and the position is a function of (seed, pass, row). Without a
    seed a crop starts at 0. With a ``grid`` the shortest length is reduced further, see :func:`on_grid`.
    """

    num_samples: np.ndarray = field(repr=False)  # (N,)
    max_samples: int
    length: str
    seed: int | None
    grid: int = 1

    def resolve(self, rows_G: np.ndarray, pass_index: int) -> MicroBatch:
        available_G = np.asarray(self.num_samples[rows_G], dtype=np.int64)
        taken_G = np.minimum(available_G, self.max_samples)
        if self.length == "crop":
            taken_G = np.full_like(taken_G, on_grid(taken_G.min(), self.grid))
        starts_G = np.zeros_like(taken_G)
        if self.seed is not None:
            starts_G = _places(self.seed, pass_index, rows_G, available_G - taken_G)
        return MicroBatch(rows_G, starts_G, taken_G, taken_G)


def on_grid(num_samples: int, grid: int) -> int:
    """Round ``num_samples`` down to a multiple of ``grid``; a number below ``grid`` does not change."""
    return int(num_samples // grid * grid or num_samples)


@dataclass(frozen=True)
class FixedSegments:
    """``num_places`` segments of each row, known in advance, so that their targets can be cached on disk.

    Pass p over the corpus takes place p modulo ``num_places``. Segment k * N + row is place k of a row.
    """

    starts: np.ndarray = field(repr=False)  # (num_places * N,) first sample, by segment
    num_samples: np.ndarray = field(repr=False)  # (num_places * N,), by segment
    num_places: int = 1

    def resolve(self, rows_G: np.ndarray, pass_index: int) -> MicroBatch:
        return self.take(pass_index % self.num_places * self.num_rows + rows_G)

    def take(self, segments_G: np.ndarray) -> MicroBatch:
        """The batch of these segments, in any places."""
        taken_G = self.num_samples[segments_G]
        return MicroBatch(segments_G % self.num_rows, self.starts[segments_G], taken_G, taken_G, segments_G)

    @property
    def num_rows(self) -> int:
        return len(self.starts) // self.num_places

    @property
    def digest(self) -> str:
        """Hash of all places and lengths."""
        return hashlib.sha256(self.starts.tobytes() + self.num_samples.tobytes()).hexdigest()[:16]


def fix_segments(
    plan: BatchPlan,
    num_samples_N: np.ndarray,
    max_samples: int,
    length: str,
    seed: int,
    grid: int = 1,
    num_places: int = 1,
) -> FixedSegments:
    """Choose segments that fit into every batch of a row's bucket.

    ``length="crop"`` gives every row of a bucket the shortest effective length of the bucket. This loses more audio
    than cropping each batch to its shortest row, and the same audio whenever a place comes again. "pad" gives each row
    its own effective length. The position is a function of (seed, place, row).
    """
    available_N = np.asarray(num_samples_N, dtype=np.int64)
    taken_N = np.minimum(available_N, max_samples)
    if length == "crop":
        for first, end in itertools.pairwise(plan.starts[plan.buckets]):
            rows = plan.rows[first:end]
            taken_N[rows] = on_grid(taken_N[rows].min(), grid)
    rows_N = np.arange(len(available_N))
    starts = [_places(seed, place, rows_N, available_N - taken_N) for place in range(num_places)]
    return FixedSegments(np.concatenate(starts), np.tile(taken_N, num_places), num_places)


def middle_rows(plan: BatchPlan, most: int) -> np.ndarray:
    """At most ``most`` rows of the bucket of middle length, whose fixed segments have one length."""
    edges = plan.starts[plan.buckets]
    bucket = int(np.searchsorted(edges, len(plan.rows) // 2, side="right"))
    return plan.rows[edges[bucket - 1] : edges[bucket]][:most]


def segments_of_batches(plan: BatchPlan, crop: Crop) -> FixedSegments:
    """The segments that ``crop`` takes if the batches of ``plan`` never change, as in validation."""
    starts_N, num_samples_N = np.zeros(len(plan.rows), np.int64), np.zeros(len(plan.rows), np.int64)
    for first, end in itertools.pairwise(plan.starts):
        batch = crop.resolve(plan.rows[first:end], 0)
        starts_N[batch.rows], num_samples_N[batch.rows] = batch.starts, batch.num_samples
    return FixedSegments(starts_N, num_samples_N)


def plan_by_utterances(lengths_N: np.ndarray, batch_size: int) -> BatchPlan:
    """Plan ceil(N / batch_size) batches of sizes that differ by at most one.

    Sizes are balanced, because the utterances of a short last batch would have a larger weight.
    """
    sizes = balanced_sizes(len(lengths_N), batch_size)
    num_buckets = max(1, len(sizes) // _batches_per_bucket(len(sizes)))
    buckets = np.arange(num_buckets + 1) * len(sizes) // num_buckets
    return BatchPlan(_length_order(lengths_N), np.concatenate([[0], np.cumsum(sizes)]), buckets)


def plan_by_samples(lengths_N: np.ndarray, batch_samples: int) -> BatchPlan:
    """Plan batches of at most ``batch_samples`` samples, padding included, for any choice of rows of the bucket.

    A bucket's batches have floor(batch_samples / its longest) utterances or fewer, so that their number, and
    with it an epoch's number of steps, never changes.

    Raises:
        InputError: the longest utterance alone has more than ``batch_samples``.
    """
    order = _length_order(lengths_N)
    sorted_N = lengths_N[order]
    if sorted_N[-1] > batch_samples:
        raise InputError(
            f"data.batch_seconds holds {batch_samples} samples, but the longest utterance (after data.max_samples) has "
            f"{sorted_N[-1]}; raise data.batch_seconds or lower data.max_samples"
        )
    # Buckets of whole batches are filled from the longest row down. Equal parts of the corpus, each rounded up to
    # whole batches, made 40 % more batches than the audio needs on a corpus of 3 hours (now 3 %).
    per_bucket = _batches_per_bucket(int(-(-sorted_N.sum() // batch_samples)))
    end, sizes_per_bucket = len(order), []
    while end > 0:
        most = int(batch_samples // sorted_N[end - 1])
        first = end - most * per_bucket
        if first < most:  # the few shortest are no bucket: alone they would be a step as heavy as a whole batch's
            first = 0
        sizes_per_bucket.append(balanced_sizes(end - first, most))
        end = first
    sizes_per_bucket.reverse()
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes_per_bucket))])
    buckets = np.concatenate([[0], np.cumsum([len(sizes) for sizes in sizes_per_bucket])])
    return BatchPlan(order, starts, buckets)


def order_of_pass(plan: BatchPlan, seed: int, pass_index: int) -> PassOrder:
    """Permute rows inside their buckets and shuffle batches, as a pure function of (seed, pass)."""
    generator = np.random.default_rng([seed, pass_index])
    rows = plan.rows.copy()
    edges = plan.starts[plan.buckets]
    for first, end in itertools.pairwise(edges):
        generator.shuffle(rows[first:end])
    return PassOrder(rows, generator.permutation(plan.num_batches))


def fixed_order(plan: BatchPlan) -> PassOrder:
    """The order of validation, by length and the same in every pass."""
    return PassOrder(plan.rows, np.arange(plan.num_batches))


def uniform(seed: int, pass_index: int, rows: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one per row, each a function of (seed, pass, row) alone.

    It applies the finaliser of SplitMix64 (Steele, Lea and Flood, 2014) to a counter. A generator per row would take
    seconds per epoch.
    """
    key = np.random.SeedSequence([seed, pass_index]).generate_state(1, np.uint64)
    state = key + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def cut(batch: MicroBatch, part: int, num_parts: int) -> MicroBatch:
    """Take every ``num_parts``-th item. Parts differ by at most one item, and all have the global lengths.

    A part for which there is no item gets the last one and does not count, so that its process has something to
    compute.
    """
    last = len(batch.rows) - 1
    chosen = slice(min(part, last), None, num_parts)
    return batch._replace(
        rows=batch.rows[chosen],
        starts=batch.starts[chosen],
        num_samples=batch.num_samples[chosen],
        segments=None if batch.segments is None else batch.segments[chosen],
        counts=part <= last,
    )


class GlobalBatchSampler(Sampler[MicroBatch]):
    """This rank's micro-batches of one epoch, ``accumulate`` per global batch.

    Epoch e takes ``steps_per_epoch`` global batches from an endless stream of passes, after those of the
    epochs before it; by default that is pass e. Micro-batch (step s, rank r) is part ``s * world_size + r``
    of its global batch, so that 1 process with 2A accumulation steps and 2 processes with A have the same global
    batches. A smaller global batch may have fewer items than parts, see :func:`cut`.

    Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler`` only, hence the property ``sampler``. ``start``
    (number of micro-batches to skip) applies to the epoch that a resume continues.

    Raises:
        InputError: in training, a process or an accumulation step would never have an item.
    """

    def __init__(
        self,
        plan: BatchPlan,
        crop: Crop,
        seed: int | None = None,
        steps_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        epoch: int = 0,
    ) -> None:
        if seed is not None:
            _require_items(plan.sizes, world_size, accumulate, tell=rank == 0)
        self.plan, self.crop, self.seed = plan, crop, seed
        self.steps_per_epoch = steps_per_epoch or plan.num_batches
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch, self.start = epoch, 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of micro-batches of a full epoch, independent of ``start``."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        # Epoch and start are bound here, not at the first item, because the loader resets them in between.
        return self._micro_batches(self.epoch, self.start)

    def _micro_batches(self, epoch: int, start: int) -> Iterator[MicroBatch]:
        first_step, first_part = divmod(start, self.accumulate)
        for batch in self._global_batches(epoch, first_step):
            for step in range(first_part, self.accumulate):
                yield cut(batch, step * self.world_size + self.rank, self.world_size * self.accumulate)
            first_part = 0

    def _global_batches(self, epoch: int, first_step: int) -> Iterator[MicroBatch]:
        current = -1
        for step in range(first_step, self.steps_per_epoch):
            pass_index, position = divmod(epoch * self.steps_per_epoch + step, self.plan.num_batches)
            if pass_index != current:
                current, order = pass_index, self._order(pass_index)
            batch = order.batches[position]
            rows = order.rows[self.plan.starts[batch] : self.plan.starts[batch + 1]]
            yield self.crop.resolve(rows, pass_index)

    def _order(self, pass_index: int) -> PassOrder:
        return fixed_order(self.plan) if self.seed is None else order_of_pass(self.plan, self.seed, pass_index)


def _require_items(sizes: np.ndarray, world_size: int, accumulate: int, tell: bool) -> None:
    """Refuse processes or accumulation steps that never have an item, and tell if many parts have none."""
    parts, largest = world_size * accumulate, int(sizes.max())
    if world_size > largest or accumulate > -(-largest // world_size):
        raise InputError(
            f"the largest global batch has {largest} utterances, too few for {world_size} processes x {accumulate} "
            f"accumulation steps: use larger batches or at most {largest} parts"
        )
    idle = np.maximum(parts - sizes, 0).sum() / (parts * len(sizes))
    if idle > MOST_IDLE and tell:
        logger.warning(
            "%d of %d global batches have fewer utterances than %d processes x %d accumulation steps: %.0f %% of the "
            "micro-batches compute an utterance that does not count; use larger batches or fewer parts",
            *((sizes < parts).sum(), len(sizes), world_size, accumulate, 100 * idle),
        )


def _places(seed: int, pass_index: int, rows: np.ndarray, latest: np.ndarray) -> np.ndarray:
    """First samples of crops, int64 from 0 to ``latest``, each with equal probability."""
    return (uniform(seed, pass_index, rows) * (latest + 1)).astype(np.int64)


def _length_order(lengths_N: np.ndarray) -> np.ndarray:
    return np.argsort(lengths_N, kind="stable")


def _batches_per_bucket(num_batches: int) -> int:
    return max(FEWEST_BATCHES_PER_BUCKET, -(-num_batches // MOST_BUCKETS))


def balanced_sizes(num_rows: int, most: int) -> np.ndarray:
    """Sizes of ceil(num_rows / most) batches that differ by at most one."""
    num_batches = -(-num_rows // most)
    return np.diff(np.arange(num_batches + 1) * num_rows // num_batches)
