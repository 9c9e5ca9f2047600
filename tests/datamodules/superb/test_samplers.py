"""The samplings against the rules of s3prl, and every rank's part as a function of (seed, micro-batch)."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from datamodules.batching import MicroBatch
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

SHORT = np.full(40, 16_000)


def one_pass(sampling: Sampling, batches: int) -> list[list[int]]:
    return [sampling.rows(k).tolist() for k in range(batches)]


def test_windows_visit_every_start_once_and_clamp_the_last() -> None:
    lengths = np.random.default_rng(1).permutation(40)
    longest_first = np.argsort(-lengths).tolist()
    windows = one_pass(WindowSampling(lengths, SHORT, 16, seed=0), 40)
    starts = sorted(longest_first.index(window[0]) for window in windows)
    assert starts == [*range(24), *[24] * 16]
    for window in windows:
        start = longest_first.index(window[0])
        assert window == longest_first[start : start + 16]


def test_only_a_long_first_utterance_halves_a_window() -> None:
    samples = SHORT.copy()
    samples[0], samples[1] = 300_001, 300_000
    targets = np.arange(40, 0, -1)  # row 0 has the longest target
    windows = {window[0]: len(window) for window in one_pass(WindowSampling(targets, samples, 16, seed=0), 40)}
    assert windows[0] == 8
    assert windows[1] == 16  # at the limit, and row 0 is not in it
    samples[20] = 400_000
    windows = {window[0]: len(window) for window in one_pass(WindowSampling(targets, samples, 16, seed=0), 40)}
    assert [windows[first] for first in (0, 19, 20, 21)] == [8, 16, 8, 16]


def test_equal_targets_keep_their_order() -> None:
    assert WindowSampling(np.array([3, 5, 3, 5]), SHORT[:4], 4, 0).rows(0).tolist() == [1, 3, 0, 2]


def test_a_corpus_smaller_than_a_window_is_one_window() -> None:
    sampling = WindowSampling(np.arange(5), SHORT[:5], 16, 0)
    assert [len(sampling.rows(k)) for k in range(5)] == [5] * 5


def test_asr_trains_on_sixteen() -> None:
    """The shape of train-clean-100: 28,539 utterances, 891 groups of 32 and one of 27, as 1,783 batches."""
    samples = np.random.default_rng(0).integers(22_560, 392_400, 28_539)
    sampling = HalvedSampling(samples, 32, seed=0)
    assert sorted(map(len, sampling.batches)) == [*[16] * 1782, 27]
    order = np.concatenate(sampling.batches)
    assert (np.diff(samples[order]) <= 0).all()
    assert sorted(order) == list(range(28_539))


@pytest.mark.parametrize(
    ("utterances", "batch_size", "sizes"),
    [(65, 32, [16] * 4), (66, 32, [16] * 4 + [2]), (1, 32, [1]), (33, 16, [8] * 4), (3, 2, [1, 1]), (3, 1, [1] * 3)],
)
def test_asr_leaves_out_a_last_group_of_one(utterances: int, batch_size: int, sizes: list[int]) -> None:
    sampling = HalvedSampling(np.arange(utterances) + 5000, batch_size, 0)
    assert [len(batch) for batch in sampling.batches] == sizes
    assert (0 in np.concatenate(sampling.batches)) == (sum(sizes) == utterances)


def test_asr_groups_of_short_audio_stay_whole() -> None:
    assert [len(batch) for batch in HalvedSampling(np.full(64, 2000), 32, 0).batches] == [32, 32]
    assert [len(batch) for batch in HalvedSampling(np.full(64, 2001), 32, 0).batches] == [16] * 4


@pytest.mark.parametrize("sampling", [HalvedSampling(SHORT, 8, 3), ShuffledSampling(40, 7, 3)])
def test_a_pass_sees_everything_once_and_the_next_in_another_order(sampling: Sampling) -> None:
    per_pass = 10 if isinstance(sampling, HalvedSampling) else 6
    batches = one_pass(sampling, 2 * per_pass)
    for number in range(2):
        seen = itertools.chain(*batches[number * per_pass : (number + 1) * per_pass])
        assert sorted(seen) == list(range(40))
    assert batches[:per_pass] != batches[per_pass:]


def test_balanced_draws_give_classes_the_same_share() -> None:
    classes = np.array(["yes"] * 900 + ["no"] * 90 + ["_silence_"] * 6)
    sampling = BalancedSampling(classes, 32, seed=0)
    drawn = classes[np.concatenate(one_pass(sampling, 200))]
    shares = [np.mean(drawn == name) for name in ("yes", "no", "_silence_")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)
    dev = balanced_draw(classes, seed=0)
    assert (len(dev), np.mean(classes[dev] == "_silence_")) == (996, pytest.approx(1 / 3, abs=0.05))
    assert (dev == balanced_draw(classes, seed=0)).all()
    assert (dev != balanced_draw(classes, seed=1)).any()


def endless(sampling: Sampling, count: int, start: int = 0, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    crops = Crops(np.full(40, 200_000), np.full(40, 128_000), seed=9)
    return list(itertools.islice(EndlessSampler(sampling, crops, start, rank, world_size), count))


def equal(one: MicroBatch, other: MicroBatch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


MAKE: list[Callable[[int], Sampling]] = [
    lambda seed: WindowSampling(np.arange(40), SHORT, 16, seed),
    lambda seed: HalvedSampling(SHORT, 8, seed),
    lambda seed: ShuffledSampling(40, 7, seed),
    lambda seed: BalancedSampling(np.arange(40) % 3, 8, seed),
]


@pytest.mark.parametrize("make", MAKE)
def test_a_resumed_stream_is_the_rest_of_the_stream(make: Callable[[int], Sampling]) -> None:
    whole = endless(make(0), 60)
    resumed = endless(make(0), 25, start=35)
    assert all(map(equal, whole[35:], resumed))
    assert not all(map(equal, whole[:25], resumed))
    assert not all(map(equal, endless(make(1), 60), whole))


@pytest.mark.parametrize("make", MAKE)
def test_ranks_share_each_batch_and_know_its_longest(make: Callable[[int], Sampling]) -> None:
    whole = endless(make(0), 30)
    parts = [endless(make(0), 30, rank=rank, world_size=3) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert (share.rows == batch.rows[rank::3]).all()
            assert (share.starts == batch.starts[rank::3]).all()
            assert (share.global_num_samples == batch.num_samples).all()


@pytest.mark.parametrize(
    ("sampling", "size"),
    [
        (ShuffledSampling(36, 7, 0), 7),  # leaves a last batch of one
        (ShuffledSampling(5, 7, 0), 5),
        (WindowSampling(np.arange(40), np.full(40, 400_000), 16, 0), 16),  # all halved
        (WindowSampling(np.arange(9), SHORT[:9], 16, 0), 9),
        (HalvedSampling(SHORT, 32, 0), 16),
        (BalancedSampling(np.arange(40) % 3, 8, 0), 8),
    ],
)
def test_more_ranks_than_items_of_a_full_batch_is_an_error(sampling: Sampling, size: int) -> None:
    endless(sampling, 1, world_size=size)
    with pytest.raises(ValueError, match=f"a recipe batch has {size} utterances, fewer than {size + 1} processes"):
        endless(sampling, 1, world_size=size + 1)


def test_a_rank_beyond_a_short_batch_gets_its_last_item() -> None:
    whole = endless(ShuffledSampling(37, 7, 0), 6)
    assert [len(batch.rows) for batch in whole] == [7] * 5 + [2]
    parts = [endless(ShuffledSampling(37, 7, 0), 6, rank=rank, world_size=4)[-1] for rank in range(4)]
    first, last = whole[-1].rows.tolist()
    assert [part.rows.tolist() for part in parts] == [[first], [last], [last], [last]]
    assert [part.counts for part in parts] == [True, True, False, False]


def test_crops_are_within_the_utterance_and_differ_in_the_next_pass() -> None:
    crops = Crops(np.array([200_000, 100_000, 128_000]), np.full(3, 128_000), seed=0)
    rows = np.array([0, 1, 2, 0])
    batches = [crops.resolve(rows, k) for k in range(200)]
    starts = np.array([batch.starts for batch in batches])
    assert (batches[0].num_samples == [128_000, 100_000, 128_000, 128_000]).all()
    assert (starts[:, 1:3] == 0).all()
    assert starts[:, 0].min() >= 0
    assert 60_000 < starts[:, 0].max() <= 72_000
    assert len(set(starts[:, 0])) > 190
    # One utterance drawn twice in a batch is cropped twice.
    assert (starts[:, 0] != starts[:, 3]).mean() > 0.95


def test_evaluation_batches_are_dealt_whole() -> None:
    crops = Crops(np.full(10, 500), np.full(10, 500), seed=0)
    parts = [[b.rows.tolist() for b in EvaluationSampler(np.arange(10), crops, 4, rank, 2)] for rank in range(2)]
    assert parts == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]]
