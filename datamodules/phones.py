"""A dataset of speech with phone alignments: random crops with a label per frame.

Shapes: B batch, T samples (16 kHz), F frames.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.alignments import Segment, find_audio, frame_labels, read_split
from datamodules.audio import SAMPLE_RATE, read_audio, usable_samples
from datamodules.errors import InputError
from datamodules.frames import WINDOW, count_windows

IGNORED = -100
"""Label of frames that are padding; torch's ``cross_entropy`` leaves it out by default."""


class FrameBatch(NamedTuple):
    """Crops of one length and their labels."""

    waveforms: Tensor  # (B, T) float32
    labels: Tensor  # (B, F) int64, IGNORED where the audio is padding


class FrameLabelDataset(Dataset[FrameBatch]):
    """A dataset of ``length`` random crops of aligned utterances; item i is a pure function of (seed, i).

    Items ``e N ... (e + 1) N - 1`` are a permutation of the N utterances, another one in every pass e, so
    that a loader that reads the items in order needs no state.

    Args:
        root: folder with the splits and ``alignments``.
        splits: splits to read.
        phones: the inventory; see ``alignments.phone_inventory``.
        crop_samples: samples per item; a shorter utterance is padded at its end.
        length: number of items; ``None``: one pass.
        seed: random seed of the order and the crops.

    Raises:
        InputError: an alignment has no audio, audio cannot be used, or a phone is not in the inventory.
    """

    def __init__(
        self,
        root: str | Path,
        splits: Sequence[str],
        phones: Sequence[str],
        crop_samples: int,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.phones, self.crop_samples, self.seed = phones, crop_samples, seed
        self.paths: list[str] = []
        self.segments: list[list[Segment]] = []
        for split in splits:
            alignment = read_split(root, split)
            self.paths += [str(path) for path in find_audio(root, split, alignment).values()]
            self.segments += alignment.values()
        self.num_samples = [usable_samples(path, SAMPLE_RATE, WINDOW, resample=True) for path in self.paths]
        self.length = len(self.paths) if length is None else length
        self._order = (-1, np.zeros(0, dtype=np.int64))
        if unknown := {s.phone for segments in self.segments for s in segments} - set(phones):
            raise InputError(f"phones {', '.join(sorted(unknown))} of {', '.join(splits)} are not in the inventory")

    def __len__(self) -> int:
        return self.length

    def crop(self, index: int) -> tuple[int, int]:
        """(utterance, first sample) of item ``index``."""
        epoch, position = divmod(index, len(self.paths))
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, generator.permutation(len(self.paths)))
        row = int(self._order[1][position])
        slack = max(0, self.num_samples[row] - self.crop_samples)
        return row, int(np.random.default_rng((self.seed, epoch, row)).integers(slack + 1))

    def __getitem__(self, index: int) -> FrameBatch:
        row, start = self.crop(index)
        stop = min(start + self.crop_samples, self.num_samples[row])
        waveform_T = torch.zeros(self.crop_samples)
        waveform_T[: stop - start] = torch.from_numpy(
            read_audio(self.paths[row], SAMPLE_RATE, start, stop, resample=True)
        )
        labels_F = torch.full((count_windows(self.crop_samples),), IGNORED)
        valid = count_windows(stop - start)
        labels_F[:valid] = torch.from_numpy(frame_labels(self.segments[row], valid, self.phones, start))
        return FrameBatch(waveform_T, labels_F)


def stack_crops(items: Iterable[FrameBatch]) -> FrameBatch:
    """Collate crops of one length."""
    waveforms, labels = zip(*items, strict=True)
    return FrameBatch(torch.stack(waveforms), torch.stack(labels))
