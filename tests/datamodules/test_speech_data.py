"""Batches of a data module of a user's own: shares of processes, order by seed, and resuming."""

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.speech_data import AudioBatch, SpeechDataModule, audio_batch
from lightning_modules.lengths import global_lengths

UTTERANCES = [torch.full((4 + place,), float(place)) for place in range(10)]


class Data(SpeechDataModule):
    steps_per_epoch = 3

    def __init__(self, rank: int = 0, world_size: int = 1, accumulate: int = 1) -> None:
        super().__init__()
        progress = SimpleNamespace(current=SimpleNamespace(processed=0))
        self.trainer: Any = SimpleNamespace(
            global_rank=rank,
            world_size=world_size,
            accumulate_grad_batches=accumulate,
            fit_loop=SimpleNamespace(epoch_progress=progress),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )

    def train_dataloader(self) -> Any:
        return self.loader(UTTERANCES, 4, seed=0, num_workers=0)


def places(batch: AudioBatch) -> list[int]:
    return [int(value) for value in batch.waveforms[:, 0]]


def test_utterances_are_padded_to_a_batch() -> None:
    batch = audio_batch([torch.ones(2), torch.ones(3)])
    assert batch.waveforms.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.num_samples.tolist() == [2, 3]


def test_shares_make_up_the_batches_of_one_process() -> None:
    whole = [sorted(places(batch)) for batch in Data().train_dataloader()]
    assert sorted(map(len, whole)) == [3, 3, 4]
    order = list(chain(*whole))
    assert sorted(order) == list(range(10)) != order  # each utterance once, in another order
    ranks = [list(map(places, Data(rank, 2).train_dataloader())) for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == whole
    parts = list(map(places, Data(accumulate=2).train_dataloader()))
    assert [sorted(one + other) for one, other in zip(parts[::2], parts[1::2], strict=True)] == whole
    with pytest.raises(ValueError, match="fewer than 4 processes x 1 accumulation steps"):
        Data(0, 4).train_dataloader()


def test_epochs_differ_and_a_state_continues_in_the_middle_of_one() -> None:
    loader = Data().train_dataloader()
    first = list(map(places, loader))
    loader.batch_sampler.set_epoch(1)
    epoch = iter(loader)
    second = [places(next(epoch))]
    resumed = Data().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = list(map(places, epoch))
    assert list(map(places, resumed)) == rest
    assert second + rest != first  # control
    assert list(map(places, Data().train_dataloader())) == first


def test_validation_keeps_the_order() -> None:
    for accumulate, expected in (
        (1, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (2, [[0, 2, 4], [1, 3], [5, 7, 9], [6, 8]]),  # in parts, as in training
        (9, [[place] for place in range(10)]),  # as many as there can be
    ):
        assert list(map(places, Data(accumulate=accumulate).loader(UTTERANCES, 5, num_workers=0))) == expected
    with pytest.raises(ValueError, match="Data has no utterances to load"):
        Data().loader([], 5)


def test_shares_of_unknown_lengths_count_alike() -> None:
    batch = AudioBatch(torch.zeros(2, 3), torch.tensor([2, 3]))
    assert global_lengths(batch, 2).tolist() == [2, 3, 2, 3]
    assert global_lengths(batch._replace(global_num_samples=torch.tensor([2, 3, 9])), 2).tolist() == [2, 3, 9]


def test_what_a_subclass_leaves_out_has_a_default() -> None:
    data = Data()
    assert data.fingerprint() == {"class_path": f"{__name__}.Data"}
    assert (data.example_batch(4), data.statistics_batches(1.0), data.cached_statistics) == (None, None, None)
    with pytest.raises(ValueError, match="Data reads no cached targets"):
        data.use_targets({}, [])
