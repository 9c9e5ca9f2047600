"""Batches of noise with one length, or with lengths like LibriSpeech's, batched and cropped as in the data module."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.audio import SAMPLE_RATE
from datamodules.batching import CropRule, GlobalBatchSampler, plan_by_utterances

UTTERANCES = 281_241  # as in LibriSpeech's three training parts: with fewer, cropping loses more
MAX_SECONDS = 15.6


class BenchBatch(NamedTuple):
    """Noise in the form of a training batch without padding."""

    waveforms: Tensor
    num_samples: Tensor
    global_num_samples: Tensor
    cached: None = None
    features: None = None

    def to(self, device: torch.device) -> "BenchBatch":
        """Move the waveforms only, as the data module does: the step reads lengths on the host without waiting."""
        return self._replace(waveforms=self.waveforms.to(device, non_blocking=True))


def like_librispeech(utterances: int = UTTERANCES) -> np.ndarray:
    """Draw samples per utterance: three quarters near 14.5 s, the others anywhere from 2 to 14 s."""
    generator = np.random.default_rng(0)
    long, short = generator.normal(14.5, 1.2, utterances), generator.uniform(2, 14, utterances)
    seconds = np.where(generator.random(utterances) < 0.75, long, short).clip(2)
    return (seconds * SAMPLE_RATE).astype(np.int64)


def cropped_widths(batch_size: int, steps: int, epoch: int, grid: int = 1) -> list[int]:
    """Draw samples per utterance of each batch of an epoch; the same epoch number gives the same widths.

    The grid changes widths only, not the utterances of a batch. In training a batch may have one utterance less than
    the others; that is ignored here.
    """
    lengths_N, most = like_librispeech(), round(MAX_SECONDS * SAMPLE_RATE)
    plan = plan_by_utterances(np.minimum(lengths_N, most), batch_size)
    rule = CropRule(lengths_N, most, "crop", seed=0, grid=grid)
    sampler = GlobalBatchSampler(plan, rule, seed=0, steps_per_epoch=steps, epoch=epoch)
    return [int(batch.num_samples[0]) for batch in sampler]


def noise(batch_size: int, widths: list[int], pinned: bool) -> list[BenchBatch]:
    """Make a batch for each width; all are views of one piece of noise on the host, pinned if ``pinned``."""
    values = torch.randn(batch_size * max(widths), generator=torch.Generator().manual_seed(0))
    values = values.pin_memory() if pinned else values
    batches = []
    for width in widths:
        lengths_B = torch.full((batch_size,), width)
        batches.append(BenchBatch(values[: batch_size * width].view(batch_size, width), lengths_B, lengths_B))
    return batches
