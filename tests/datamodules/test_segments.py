"""Several fixed segments of each utterance: where they are, which pass takes which, and what they cover."""

from typing import Any

import numpy as np
import pytest

from datamodules.batching import CropRule, FixedSegments, GlobalBatchSampler, cut, fix_segments, plan_by_utterances
from tests.datamodules.test_batching import (
    LENGTHS_N,
    LIBRISPEECH_960H_ROWS,
    MAX_SAMPLES,
    both_kinds,
    epoch_of,
    librispeech_like,
    plan_of,
    segments_by_row,
)


def places_of(num_places: int, kind: str = "utterances", seed: int = 3) -> FixedSegments:
    return fix_segments(plan_of(kind), LENGTHS_N, MAX_SAMPLES, "crop", seed, num_places=num_places)


@both_kinds
def test_the_first_place_is_the_only_one_of_one_segment(kind: str) -> None:
    one, three = places_of(1, kind), places_of(3, kind)
    rows = np.arange(len(LENGTHS_N))
    for row in rows[::100]:
        crop = CropRule(LENGTHS_N, int(one.num_samples[row]), "crop", seed=3)  # that of each pass, at a place's length
        starts = [int(crop.resolve(rows[row : row + 1], place).starts[0]) for place in range(3)]
        assert starts == three.starts.reshape(3, -1)[:, row].tolist()
    assert three.starts[: len(rows)].tolist() == one.starts.tolist()
    for place in range(3):
        assert three.num_samples.reshape(3, -1)[place].tolist() == one.num_samples.tolist()
    assert three.starts[len(rows) :].tolist() != 2 * one.starts.tolist()
    assert places_of(2, kind).starts.tolist() == three.starts[: 2 * len(rows)].tolist()
    assert places_of(2, kind, seed=4).starts.tolist() != places_of(2, kind).starts.tolist()


@both_kinds
def test_every_pass_takes_the_next_place(kind: str) -> None:
    plan, segments = plan_of(kind), places_of(3, kind)
    sampler = GlobalBatchSampler(plan, segments, seed=0)
    passes = [segments_by_row(epoch_of(sampler, epoch)) for epoch in range(7)]
    for number, found in enumerate(passes):
        place = number % 3
        starts, lengths = (column.reshape(3, -1)[place] for column in (segments.starts, segments.num_samples))
        assert found == {row: (int(starts[row]), int(lengths[row])) for row in range(len(LENGTHS_N))}
        assert found != passes[(number + 1) % 3]
    for batch in epoch_of(sampler, 4):
        assert batch.segments is not None
        assert (batch.segments == len(LENGTHS_N) + batch.rows).all()
        assert len(set(batch.num_samples.tolist())) == 1
        assert (batch.starts >= 0).all()
        assert (batch.starts + batch.num_samples <= LENGTHS_N[batch.rows]).all()


def test_the_place_follows_the_pass_and_not_the_epoch() -> None:
    plan, segments = plan_of("utterances"), places_of(2)
    steps = 2 * plan.num_batches // 3
    thirds = [epoch_of(GlobalBatchSampler(plan, segments, seed=0, steps_per_epoch=steps), epoch) for epoch in range(3)]
    stream = [batch for epoch in thirds for batch in epoch]
    whole = GlobalBatchSampler(plan, segments, seed=0)
    expected = [*epoch_of(whole, 0), *epoch_of(whole, 1)]
    for batch, other in zip(stream, expected, strict=False):
        assert batch.segments is not None
        assert np.array_equal(batch.segments, other.segments)
    places = [set((batch.segments // len(LENGTHS_N)).tolist()) for batch in stream if batch.segments is not None]
    assert places == [{0}] * plan.num_batches + [{1}] * (len(stream) - plan.num_batches)


def test_shares_and_a_resume_keep_their_segments() -> None:
    plan, segments = plan_of("utterances"), places_of(2)
    (batch, *_) = epoch_of(GlobalBatchSampler(plan, segments, seed=0), 1)
    assert batch.segments is not None
    for part in range(4):
        share = cut(batch, part, 4)
        assert share.segments is not None
        assert share.segments.tolist() == batch.segments[part::4].tolist()
        assert (share.segments % len(LENGTHS_N)).tolist() == share.rows.tolist()
    sampler = GlobalBatchSampler(plan, segments, seed=0, accumulate=2, epoch=1)
    whole = epoch_of(sampler, 1)
    sampler.start = 3
    rest = list(sampler)
    assert len(rest) == len(whole) - 3
    for found, expected in zip(rest, whole[3:], strict=True):
        assert np.array_equal(found.segments, expected.segments)
        assert not np.array_equal(found.segments, found.rows)


def test_segments_of_any_places_are_taken_by_their_numbers() -> None:
    segments = places_of(3)
    numbers = np.array([2005, 5, 1005])
    batch = segments.take(numbers)
    assert batch.rows.tolist() == [5, 5, 5]
    assert batch.segments is numbers
    assert batch.starts.tolist() == segments.starts[numbers].tolist()
    assert len(set(batch.starts.tolist())) == 3


def test_every_start_of_every_place_is_equally_likely() -> None:
    lengths_N = np.append(np.full(11_000, 1010), 1000)
    plan = plan_by_utterances(lengths_N, len(lengths_N))
    segments = fix_segments(plan, lengths_N, MAX_SAMPLES, "crop", seed=0, num_places=3)
    starts_3N = segments.starts.reshape(3, -1)
    assert starts_3N[:, -1].tolist() == [0, 0, 0]
    for starts_N in starts_3N[:, :-1]:
        counts = np.bincount(starts_N)
        assert len(counts) == 11  # 0 to 10
        assert np.abs(counts - 1000).max() < 150  # five standard deviations
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(starts_3N[one], starts_3N[other])[0, 1]) < 0.05


def covered(segments: FixedSegments) -> np.ndarray:
    """(N,) samples of each row in one of its segments or more; a row's segments have one length."""
    starts_KN = np.sort(segments.starts.reshape(segments.num_places, -1), axis=0)
    taken_N = segments.num_samples[: segments.num_rows]
    return taken_N + np.minimum(np.diff(starts_KN, axis=0), taken_N).sum(0)


@pytest.mark.parametrize(
    ("max_seconds", "shares"), [(15.625, {1: 0.985, 2: 0.990, 4: 0.994}), (5.0, {1: 0.396, 2: 0.578, 4: 0.750})]
)
def test_what_several_places_cover(max_seconds: float, shares: dict[int, float]) -> None:
    """The numbers that docs/caching.md states, at LibriSpeech's size, of all audio."""
    lengths_N = librispeech_like(LIBRISPEECH_960H_ROWS)
    longest = int(max_seconds * 16_000)
    plan = plan_by_utterances(np.minimum(lengths_N, longest), 64)
    for places, share in shares.items():
        segments = fix_segments(plan, lengths_N, longest, "crop", seed=0, num_places=places)
        found = covered(segments).sum() / lengths_N.sum()
        assert found == pytest.approx(share, abs=5e-4), found


def test_covered_audio_is_counted_once() -> None:
    starts: Any = np.array([0, 0, 4, 0, 9, 0])
    assert covered(FixedSegments(starts, np.full(6, 5), num_places=3)).tolist() == [14, 5]
