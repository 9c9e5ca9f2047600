"""The order of the data: purity, completeness, balance, and the cut over devices and accumulation steps."""

import numpy as np
import pytest

from datamodules.batching import (
    BatchPlan,
    CropRule,
    GlobalBatchSampler,
    MicroBatch,
    cut,
    fix_segments,
    on_grid,
    order_of_pass,
    plan_by_samples,
    plan_by_utterances,
    uniform,
)

MAX_SAMPLES = 250_000
LIBRISPEECH_960H_ROWS = 281_241


def librispeech_like(num_rows: int, seed: int = 0) -> np.ndarray:
    """Most utterances have 12 to 17 s, the others anything from 1.5 s; 12.1 s on average."""
    generator = np.random.default_rng(seed)
    long = generator.normal(14.4, 1.2, num_rows).clip(10, 17.5)
    seconds = np.where(generator.random(num_rows) < 0.3, generator.uniform(1.5, 12, num_rows), long)
    return (seconds * 16000).astype(np.int64)


LENGTHS_N = librispeech_like(1000)


def plan_of(kind: str, lengths_N: np.ndarray = LENGTHS_N) -> BatchPlan:
    effective_N = np.minimum(lengths_N, MAX_SAMPLES)
    if kind == "utterances":
        return plan_by_utterances(effective_N, 24)
    return plan_by_samples(effective_N, 200 * 16000)


def sampler_of(kind: str = "utterances", length: str = "crop", seed: int = 0, **cut_by: int) -> GlobalBatchSampler:
    return GlobalBatchSampler(plan_of(kind), CropRule(LENGTHS_N, MAX_SAMPLES, length, seed), seed=seed, **cut_by)


def as_lists(batches: list[MicroBatch]) -> list[list[list[int]]]:
    return [[np.asarray(column).tolist() for column in batch] for batch in batches]


def epoch_of(sampler: GlobalBatchSampler, epoch: int) -> list[MicroBatch]:
    sampler.set_epoch(epoch)
    return list(sampler)


both_kinds = pytest.mark.parametrize("kind", ["utterances", "seconds"])


@both_kinds
def test_every_row_exactly_once_in_every_pass(kind: str) -> None:
    for epoch in range(3):
        rows = np.concatenate([batch.rows for batch in epoch_of(sampler_of(kind), epoch)])
        assert sorted(rows.tolist()) == list(range(len(LENGTHS_N)))


@both_kinds
def test_the_order_is_a_function_of_seed_and_epoch(kind: str) -> None:
    sampler = sampler_of(kind)
    first = as_lists(epoch_of(sampler, 3))
    epoch_of(sampler, 1)
    assert as_lists(epoch_of(sampler, 3)) == first == as_lists(epoch_of(sampler_of(kind), 3))
    assert as_lists(epoch_of(sampler, 4)) != first
    assert as_lists(epoch_of(sampler_of(kind, seed=1), 3)) != first


@both_kinds
def test_the_composition_of_batches_changes_with_the_epoch(kind: str) -> None:
    def compositions(epoch: int) -> set[frozenset[int]]:
        return {frozenset(batch.rows.tolist()) for batch in epoch_of(sampler_of(kind), epoch)}

    assert len(compositions(0) & compositions(1)) <= 1


def test_utterance_batches_are_balanced_and_nothing_is_dropped() -> None:
    plan = plan_of("utterances")
    sizes = np.diff(plan.starts)
    assert plan.num_batches == 42  # ceil(1000 / 24)
    assert (sizes.sum(), sizes.min(), sizes.max()) == (1000, 23, 24)


def test_the_papers_number_of_batches() -> None:
    plan = plan_by_utterances(np.full(LIBRISPEECH_960H_ROWS, 1), 64)
    assert plan.num_batches == 4395
    assert set(np.diff(plan.starts).tolist()) == {63, 64}


@pytest.mark.parametrize("length", ["crop", "pad"])
@pytest.mark.parametrize("seconds", [16, 40, 200, 100_000])
def test_seconds_batches_keep_limit_and_number(seconds: int, length: str) -> None:
    plan = plan_by_samples(np.minimum(LENGTHS_N, MAX_SAMPLES), seconds * 16000)
    sampler = GlobalBatchSampler(plan, CropRule(LENGTHS_N, MAX_SAMPLES, length, 0), seed=0)
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == plan.num_batches
        padded = [len(batch.rows) * batch.global_num_samples.max() for batch in batches]
        assert max(padded) <= seconds * 16000


def test_seconds_batches_are_well_filled() -> None:
    plan = plan_of("seconds")
    total_seconds = np.minimum(LENGTHS_N, MAX_SAMPLES).sum() / 16000
    assert plan.num_batches <= 1.1 * np.ceil(total_seconds / 200)


@pytest.mark.parametrize("number", range(55, 75))
def test_no_seconds_batch_is_much_smaller_than_the_others(number: int) -> None:
    """Each is a step of the same weight, and is shared by processes."""
    plan = plan_by_samples(np.full(number, 32_000), 20 * 16_000)
    sizes = np.diff(plan.starts)
    assert (sizes.sum(), sizes.max() <= 10, sizes.min() >= 5) == (number, True, True)


def test_an_utterance_longer_than_a_seconds_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"160000 samples, but the longest .* has 250000; raise data.batch_seconds"):
        plan_by_samples(np.array([100, MAX_SAMPLES]), 160_000)


def test_little_audio_is_lost_by_cropping_to_the_shortest() -> None:
    """The number that the module states: under 1 % at LibriSpeech's size, with mixed batches."""
    lengths_N = np.minimum(librispeech_like(LIBRISPEECH_960H_ROWS), MAX_SAMPLES)
    plan = plan_by_utterances(lengths_N, 64)
    rows = order_of_pass(plan, seed=0, pass_index=0).rows
    shortest = np.minimum.reduceat(lengths_N[rows], plan.starts[:-1])
    lost = 1 - (shortest * np.diff(plan.starts)).sum() / lengths_N.sum()
    assert 0.005 < lost < 0.01
    assert np.diff(plan.buckets).min() >= 64


@pytest.mark.parametrize("grid", [1, 1600])
def test_a_grid_leaves_few_lengths_and_loses_little(grid: int) -> None:
    """The numbers that docs/performance.md states."""
    lengths_N = librispeech_like(LIBRISPEECH_960H_ROWS)
    plan = plan_by_utterances(np.minimum(lengths_N, MAX_SAMPLES), 64)
    sampler = GlobalBatchSampler(plan, CropRule(lengths_N, MAX_SAMPLES, "crop", 0, grid), seed=0)
    taken = np.array([batch.num_samples[0] for batch in sampler])
    audio = (taken * np.diff(plan.starts)[order_of_pass(plan, 0, 0).batches]).sum()
    lost = 1 - audio / np.minimum(lengths_N, MAX_SAMPLES).sum()
    lengths = len(set(taken.tolist()))
    if grid == 1:
        assert 0.005 < lost < 0.01
        assert lengths > 1000
    else:
        assert 0.01 < lost < 0.02  # under 1 % of what the crop to the shortest leaves
        assert lengths <= 156
        assert not (taken % grid).any()


def test_what_is_shorter_than_the_grid_stays_as_it_is() -> None:
    assert [on_grid(samples, 1600) for samples in (400, 1599, 1600, 3199, 3200)] == [400, 1599, 1600, 1600, 3200]
    assert on_grid(1599, 1) == 1599


def test_fixed_segments_lie_on_the_grid() -> None:
    plan, lengths_N = plan_of("utterances"), LENGTHS_N
    on, off = (fix_segments(plan, lengths_N, MAX_SAMPLES, "crop", 0, grid) for grid in (1600, 1))
    assert not (on.num_samples % 1600).any()
    assert (off.num_samples % 1600).any()
    assert ((off.num_samples - on.num_samples >= 0) & (off.num_samples - on.num_samples < 1600)).all()


def test_an_epoch_at_960_hours_has_every_utterance_once() -> None:
    lengths_N = librispeech_like(LIBRISPEECH_960H_ROWS)
    plan = plan_by_utterances(np.minimum(lengths_N, MAX_SAMPLES), 64)
    sampler = GlobalBatchSampler(plan, CropRule(lengths_N, MAX_SAMPLES, "crop", 0), seed=0, accumulate=2)
    rows = np.concatenate([np.asarray(batch.rows) for batch in sampler])
    assert np.array_equal(np.sort(rows), np.arange(LIBRISPEECH_960H_ROWS))


@both_kinds
@pytest.mark.parametrize("length", ["crop", "pad"])
def test_the_cut_changes_nothing_in_the_global_batches(kind: str, length: str) -> None:
    whole = as_lists(epoch_of(sampler_of(kind, length), 2))
    for world_size, accumulate in ((1, 4), (2, 2), (4, 1)):
        ranks = [
            epoch_of(sampler_of(kind, length, rank=rank, world_size=world_size, accumulate=accumulate), 2)
            for rank in range(world_size)
        ]
        assert as_lists(rejoin(ranks, accumulate)) == whole
    assert as_lists(epoch_of(sampler_of(kind, length), 1)) != whole


def rejoin(ranks: list[list[MicroBatch]], accumulate: int) -> list[MicroBatch]:
    """Global batches from the micro-batches of all ranks, by undoing the stride of the cut."""
    joined = []
    for first in range(0, len(ranks[0]), accumulate):
        parts = [rank[first + step] for step in range(accumulate) for rank in ranks]
        whole = parts[0].global_num_samples
        assert all(np.array_equal(part.global_num_samples, whole) for part in parts)
        columns = [np.empty_like(whole) for _ in range(3)]
        for number, part in enumerate(parts):
            for column, values in zip(columns, part[:3], strict=True):
                column[number :: len(parts)] = values
        joined.append(MicroBatch(*columns, whole))
    return joined


def test_steps_of_two_processes_are_pairs_of_steps_of_one() -> None:
    one = epoch_of(sampler_of(accumulate=4), 0)
    two = [epoch_of(sampler_of(rank=rank, world_size=2, accumulate=2), 0) for rank in range(2)]
    interleaved = [two[rank][step] for step in range(len(two[0])) for rank in range(2)]
    assert as_lists(interleaved) == as_lists(one)


def test_parts_differ_by_at_most_one_item() -> None:
    whole = MicroBatch(*(np.arange(23) for _ in range(4)))
    sizes = [len(cut(whole, part, 4).rows) for part in range(4)]
    assert sizes == [6, 6, 6, 5]


@pytest.mark.parametrize(("world_size", "accumulate"), [(6, 4), (23, 1), (24, 1), (5, 5), (7, 4)])
def test_a_part_without_an_item_does_not_count(world_size: int, accumulate: int) -> None:
    """The parts that count make up the global batch, which has 23 or 24 items."""
    whole = epoch_of(sampler_of(), 0)
    assert sorted({len(batch.rows) for batch in whole}) == [23, 24]
    ranks = [
        epoch_of(sampler_of(rank=rank, world_size=world_size, accumulate=accumulate), 0) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]]
        assert all(len(part.rows) and np.array_equal(part.global_num_samples, batch.num_samples) for part in parts)
        counted = [row for part in parts if part.counts for row in part.rows.tolist()]
        assert sorted(counted) == sorted(batch.rows.tolist())
        assert all(part.rows.tolist() == batch.rows[-1:].tolist() for part in parts if not part.counts)
        assert sum(not part.counts for part in parts) == max(0, world_size * accumulate - len(batch.rows))


@pytest.mark.parametrize(("world_size", "accumulate"), [(25, 1), (8, 4), (1, 25)])
def test_parts_that_never_have_an_item_are_an_error(world_size: int, accumulate: int) -> None:
    message = (
        f"largest global batch has 24 utterances, too few for {world_size} processes x {accumulate} acc.* 24 parts"
    )
    with pytest.raises(ValueError, match=message):
        sampler_of(world_size=world_size, accumulate=accumulate)


def test_many_parts_without_an_item_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    sampler_of(world_size=24)  # few
    assert not caplog.text
    for rank in (0, 1):
        sampler_of(rank=rank, world_size=5, accumulate=5)
    assert caplog.text.count("micro-batches compute an utterance that does not count") == 1
    assert "have fewer utterances than 5 processes x 5 accumulation steps: " in caplog.text


@both_kinds
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_virtual_epochs_walk_through_the_stream_of_passes(kind: str, steps: int) -> None:
    per_pass = plan_of(kind).num_batches
    passes = [batch for epoch in range(5) for batch in as_lists(epoch_of(sampler_of(kind), epoch))]
    virtual = sampler_of(kind, steps_per_epoch=steps)
    assert len(virtual) == steps
    epochs = -(-2 * per_pass // steps)
    stream = [batch for epoch in range(epochs) for batch in as_lists(epoch_of(virtual, epoch))]
    assert stream == passes[: epochs * steps]
    assert stream != passes[1 : epochs * steps + 1]


def test_a_start_continues_inside_an_accumulation_window_and_holds_for_one_epoch() -> None:
    sampler = sampler_of(accumulate=3)
    whole = as_lists(epoch_of(sampler, 1))
    sampler.start = 4
    assert as_lists(list(sampler)) == whole[4:]
    assert len(sampler) == len(whole)
    sampler.set_epoch(1)
    assert as_lists(list(sampler)) == whole[4:]
    assert len(epoch_of(sampler, 2)) == len(whole)


def test_an_iterator_keeps_the_epoch_and_start_it_was_made_with() -> None:
    sampler = sampler_of()
    expected = as_lists(epoch_of(sampler, 0))[2:]
    sampler.start = 2
    iterator = iter(sampler)
    sampler.start, sampler.epoch = 0, 5
    assert as_lists(list(iterator)) == expected


def test_crops_are_to_the_shortest_of_the_global_batch() -> None:
    for batch in epoch_of(sampler_of(rank=1, world_size=2, accumulate=2), 0):
        assert set(batch.num_samples.tolist()) == set(batch.global_num_samples.tolist())
        assert (batch.starts + batch.num_samples <= LENGTHS_N[batch.rows]).all()


def test_padding_keeps_everything_up_to_the_maximum() -> None:
    for batch in epoch_of(sampler_of(length="pad"), 0):
        assert batch.num_samples.tolist() == np.minimum(LENGTHS_N[batch.rows], MAX_SAMPLES).tolist()
        assert (batch.starts[LENGTHS_N[batch.rows] <= MAX_SAMPLES] == 0).all()


def test_a_crop_depends_on_seed_epoch_and_row_and_on_nothing_else() -> None:
    lengths_N = np.full(4000, 1010)
    rule = CropRule(lengths_N, max_samples=1000, length="crop", seed=5)
    rows = np.arange(4000)
    starts = rule.resolve(rows, 7).starts
    assert rule.resolve(rows[::-1], 7).starts[::-1].tolist() == starts.tolist()
    assert rule.resolve(rows[10:11], 7).starts[0] == starts[10]
    assert rule.resolve(rows, 8).starts.tolist() != starts.tolist()
    other = CropRule(lengths_N, max_samples=1000, length="crop", seed=6)
    assert other.resolve(rows, 7).starts.tolist() != starts.tolist()


def segments_by_row(batches: list[MicroBatch]) -> dict[int, tuple[int, int]]:
    return {int(row): (int(a), int(b)) for batch in batches for row, a, b in zip(*batch[:3], strict=True)}


@both_kinds
def test_fixed_segments_are_the_same_in_every_pass_while_batches_mix(kind: str) -> None:
    plan = plan_of(kind)
    segments = fix_segments(plan, LENGTHS_N, MAX_SAMPLES, "crop", seed=3)
    sampler = GlobalBatchSampler(plan, segments, seed=0)
    first, later = epoch_of(sampler, 0), epoch_of(sampler, 5)
    assert segments_by_row(first) == segments_by_row(later)
    assert as_lists(first) != as_lists(later)
    assert segments_by_row(first) == segments_by_row(epoch_of(GlobalBatchSampler(plan, segments, seed=1), 0))
    by_chance = sampler_of(kind)
    assert segments_by_row(epoch_of(by_chance, 0)) != segments_by_row(epoch_of(by_chance, 5))
    for batch in first:
        assert len(set(batch.num_samples.tolist())) == 1  # nothing is padded
        assert (batch.starts >= 0).all()
        assert (batch.starts + batch.num_samples <= LENGTHS_N[batch.rows]).all()


def test_fixed_segments_depend_on_their_seed_and_on_the_buckets() -> None:
    plan = plan_of("utterances")
    chosen = fix_segments(plan, LENGTHS_N, MAX_SAMPLES, "crop", seed=3)
    reseeded = fix_segments(plan, LENGTHS_N, MAX_SAMPLES, "crop", seed=4)
    assert chosen.num_samples.tolist() == reseeded.num_samples.tolist()
    assert chosen.starts.tolist() != reseeded.starts.tolist()
    rebatched = fix_segments(plan_of("seconds"), LENGTHS_N, MAX_SAMPLES, "crop", seed=3)
    assert chosen.num_samples.tolist() != rebatched.num_samples.tolist()
    padded = fix_segments(plan, LENGTHS_N, MAX_SAMPLES, "pad", seed=3)
    assert padded.num_samples.tolist() == np.minimum(LENGTHS_N, MAX_SAMPLES).tolist()


def test_little_audio_is_lost_by_fixed_segments() -> None:
    """The number that docs/caching.md states, at LibriSpeech's size."""
    lengths_N = librispeech_like(LIBRISPEECH_960H_ROWS)
    effective_N = np.minimum(lengths_N, MAX_SAMPLES)
    segments = fix_segments(plan_by_utterances(effective_N, 64), lengths_N, MAX_SAMPLES, "crop", seed=0)
    lost = 1 - segments.num_samples.sum() / effective_N.sum()
    assert 0.005 < lost < 0.01


def test_every_place_of_a_crop_is_equally_likely() -> None:
    rule = CropRule(np.full(11_000, 1010), max_samples=1000, length="crop", seed=0)
    counts = np.bincount(rule.resolve(np.arange(11_000), 0).starts)
    assert len(counts) == 11  # 0 to 10: the last crop ends with the utterance
    assert np.abs(counts - 1000).max() < 150  # five standard deviations


def test_uniform_numbers_are_uncorrelated_between_neighbours_and_passes() -> None:
    rows = np.arange(20_000)
    numbers = uniform(0, 0, rows)
    assert (numbers.min() >= 0, numbers.max() < 1) == (True, True)
    for other in (np.roll(numbers, 1), uniform(0, 1, rows), uniform(1, 0, rows)):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.035


def test_validation_is_in_order_of_length_and_cropped_at_the_start() -> None:
    sampler = GlobalBatchSampler(plan_of("utterances"), CropRule(LENGTHS_N, MAX_SAMPLES, "crop", None))
    first = epoch_of(sampler, 0)
    assert as_lists(first) == as_lists(epoch_of(sampler, 9))
    assert all((batch.starts == 0).all() for batch in first)
    assert np.diff([batch.num_samples[0] for batch in first]).min() >= 0


@pytest.mark.parametrize("num_rows", [1, 2, 3, 9])
def test_tiny_corpora(num_rows: int) -> None:
    lengths_N = np.arange(num_rows) + 500
    for plan in (plan_by_utterances(lengths_N, 2), plan_by_samples(lengths_N, 1100)):
        sampler = GlobalBatchSampler(plan, CropRule(lengths_N, MAX_SAMPLES, "crop", 0), seed=0)
        assert sorted(np.concatenate([batch.rows for batch in sampler]).tolist()) == list(range(num_rows))
