"""Lengths in a batch. They stay on the host, and decisions that depend on them are made there, because reading a value
back from a device would make the host wait for all the work before it."""

from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.loading import AudioBatch


def is_padded(num_samples_B: Tensor | None, width: int) -> bool:
    """Whether an item ends before ``width``; with ``None`` none does."""
    return num_samples_B is not None and bool((num_samples_B != width).any())


def before_the_end(lengths_B: Tensor, width: int, device: torch.device) -> Tensor:
    """Mask (B, width) on ``device``, true before each item's end. The lengths are copied without waiting."""
    return torch.arange(width, device=device) < lengths_B.to(device, non_blocking=True).unsqueeze(1)


def window_and_hop(num_frames: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Samples of the first frame, and from one frame to the next; 0 where two seconds at 16 kHz do not have them.

    Args:
        num_frames: frames (N,) of lengths in samples (N,), such as :meth:`Teacher.num_frames`.
    """
    ends = num_frames(torch.arange(32_000)).diff().nonzero().flatten() + 1  # lengths at which there is another frame
    return int(ends[0]) if len(ends) else 0, int(ends[-1] - ends[-2]) if len(ends) > 1 else 0


def global_lengths(batch: AudioBatch, num_shares: int) -> Tensor:
    """Lengths of every item of a global batch; if they are not known, each of its shares is taken to be like this."""
    known = batch.global_num_samples
    return batch.num_samples.repeat(num_shares) if known is None else known


def is_counted(batch: AudioBatch) -> bool:
    """Whether a share counts in the losses; your own batch class may leave the field out."""
    return getattr(batch, "counts", True)
