"""Masks of frames for masked distillation, as pure functions of a seed, an epoch and a segment.

Source: Jang et al., "Recycle-and-Distill", Interspeech 2023 (MaskHuBERT, ARMHuBERT). The student's input is masked. At
masked frames it learns what the teacher outputs for the whole input, and at visible frames what the teacher outputs for
the masked input.

The spans are those of fairseq's ``compute_mask_indices`` with the published settings: lengths uniform from 0 to twice
``mask_time_length``, no overlap, at least one visible frame between spans, at least two spans. One thing differs.
fairseq rounds the number of spans once for a batch without padding, and unmasks frames until all its items have as many
masked ones as the item with the fewest. The mask of an utterance would then depend on its batch, so here every item
keeps its own.

Shapes: B batch, F frames, D width.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import InputError
from datamodules.loading import AudioBatch

Masked = Literal["none", "drawn", "fixed"]
LEAST_SPANS, SPACE = 2, 1
"""Smallest number of spans of an utterance, and of visible frames between two spans."""
KEY = 1
"""Last word of the key of every generator, so that none has the numbers of another use of the same seed."""


def draw_mask(generator: np.random.Generator, num_frames: int, share: float, length: int) -> np.ndarray:
    """Draw the mask (F,) of one utterance, true where a frame is masked.

    Spans are placed from the longest to the shortest, each in a gap that is drawn with a probability proportional to
    its size. Once no gap has room, the remaining spans are left out.

    Args:
        generator: source of the random numbers.
        num_frames: frames of the utterance.
        share: share of the frames in spans, before spans are left out.
        length: mean length of a span in frames.
    """
    mask_F = np.zeros(num_frames, dtype=bool)
    if num_frames < 2:
        return mask_F
    number = max(LEAST_SPANS, int(share * num_frames / length + generator.random()))
    lengths = sorted(generator.integers(0, 2 * length, number, endpoint=True).tolist(), reverse=True)
    if lengths[0] == 0:
        lengths[0] = min(length, num_frames - 1)
    gaps, shortest = [(0, num_frames)], lengths[-1]
    for span, (place, offset) in zip(lengths, generator.random((number, 2)).tolist(), strict=True):
        sizes = [end - start if end - start >= span + SPACE else 0 for start, end in gaps]
        if not any(sizes):
            break
        start, end = gaps.pop(bisect_right(list(accumulate(sizes)), place * sum(sizes)))
        first = start + int(offset * (end - span - start))
        mask_F[first : first + span] = True
        if first - start - SPACE >= shortest:
            gaps.append((start, first - SPACE + 1))
        if end - first - shortest - SPACE > shortest:
            gaps.append((first + span + SPACE, end))
    return mask_F


def mixture(mask_BF: Tensor, unmasked: Mapping[int, Tensor], masked: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Targets (B, F, D) by layer: those of the whole input at masked frames, those of the masked input elsewhere."""
    return {layer: torch.where(mask_BF.unsqueeze(-1), whole, masked[layer]) for layer, whole in unmasked.items()}


def mask_states(
    model: Any, hidden_BFD: Tensor, mask_time_indices: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Put the model's mask embedding in place of the masked frames, as ``_mask_hidden_states`` of Hugging Face does.

    That method counts the masked frames on the device, for which a GPU's host must wait.
    """
    if mask_time_indices is None:
        return hidden_BFD
    return torch.where(mask_time_indices.unsqueeze(-1), model.masked_spec_embed.to(hidden_BFD.dtype), hidden_BFD)


@dataclass(frozen=True)
class FrameMasks:
    """Masks of batches, which depend on no batch, process or accumulation step.

    Args:
        kind: ``drawn`` has other masks in every epoch, ``fixed`` always the same mask for a segment.
        share: share of the frames in spans.
        length: mean length of a span in frames.
        seed: random seed.

    Raises:
        InputError: the share or the length is not positive.
    """

    kind: Literal["drawn", "fixed"]
    share: float
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.share <= 0 or self.length <= 0:
            raise InputError(
                f"model.objective.masked={self.kind} masks the student's input, but model.student.mask_time_prob="
                f"{self.share} and model.student.mask_time_length={self.length}: both must be positive (MaskHuBERT has "
                "0.8 and 10)"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a cache of masked targets must have been made with."""
        return {
            "objective.masked": self.kind,
            "objective.mask_seed": self.seed,
            "student.mask_time_prob": self.share,
            "student.mask_time_length": self.length,
        }

    def require_fixed(self) -> None:
        """Refuse masks whose targets cannot be cached.

        Raises:
            InputError: they change in every epoch.
        """
        if self.kind != "fixed":
            raise InputError(
                f"targets cannot be cached with model.objective.masked={self.kind}, which has other masks in every "
                "epoch: set model.objective.masked=fixed, or leave data.targets out"
            )

    def of(self, batch: AudioBatch, frames_B: Tensor, width: int, epoch: int) -> Tensor:
        """Masks (B, width) of a batch on the host; only valid frames are masked.

        For data that do not number their segments, ``drawn`` takes a number from torch's generator, which a run seeds
        at every micro-batch.

        Args:
            batch: the batch.
            frames_B: valid frames of each item.
            width: frames of the longest item of the global batch.
            epoch: epoch of the run, 0-based.

        Raises:
            InputError: the masks are fixed, and the data do not number their segments.
        """
        masks_BF = np.zeros((len(frames_B), width), dtype=bool)
        for item, (key, frames) in enumerate(zip(self._keys(batch, epoch), frames_B.tolist(), strict=True)):
            masks_BF[item, :frames] = draw_mask(np.random.default_rng([*key, KEY]), frames, self.share, self.length)
        return torch.from_numpy(masks_BF)

    def _keys(self, batch: AudioBatch, epoch: int) -> list[tuple[int, ...]]:
        if batch.segments is not None:
            when = (epoch,) if self.kind == "drawn" else ()
            return [(self.seed, *when, segment) for segment in batch.segments.tolist()]
        if self.kind == "fixed":
            raise InputError(
                "model.objective.masked=fixed needs batches with the numbers of their segments, as "
                "LibriSpeechDataModule makes them: set model.objective.masked=drawn"
            )
        number = int(torch.randint(2**31, ()))
        return [(self.seed, epoch, number, item) for item in range(len(batch.num_samples))]


def frame_masks(kind: Masked, share: float, length: int, seed: int, mask_seed: int) -> FrameMasks | None:
    """The masks of a run, of its own seed or with ``fixed`` of ``mask_seed``; ``None`` without masked distillation."""
    return None if kind == "none" else FrameMasks(kind, share, length, mask_seed if kind == "fixed" else seed)
