"""Batches of noise with one length, or with lengths like LibriSpeech's, batched and cropped as in the data module.

A batch can be one of a cache, with noise as the teacher's targets and as the features of the front end.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.audio import SAMPLE_RATE
from datamodules.batching import CropRule, GlobalBatchSampler, plan_by_utterances
from datamodules.cached_records import CachedRecords, RecordLayout
from datamodules.errors import InputError
from lightning_modules.distillation import DistillationModule

UTTERANCES = 281_241  # as in LibriSpeech's three training parts: with fewer, cropping loses more
MAX_SECONDS = 15.6
Cached = Literal["none", "targets", "features"]
"""What a batch has from a cache: nothing, the targets, or the targets and the features of a frozen front end."""


class BenchBatch(NamedTuple):
    """Noise in the form of a training batch without padding."""

    waveforms: Tensor | None
    num_samples: Tensor
    global_num_samples: Tensor
    cached: CachedRecords | None = None
    features: None = None

    def to(self, device: torch.device) -> "BenchBatch":
        """Move all but the lengths, as the data module does: the step reads them on the host without waiting."""
        waveforms_BT = None if self.waveforms is None else self.waveforms.to(device, non_blocking=True)
        return self._replace(waveforms=waveforms_BT, cached=None if self.cached is None else self.cached.to(device))


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


def noise(
    batch_size: int, widths: list[int], pinned: bool, module: DistillationModule | None = None, cached: Cached = "none"
) -> list[BenchBatch]:
    """Make a batch for each width; all are views of one piece of noise on the host, pinned if ``pinned``.

    With ``cached`` the batches have records in bf16 of the targets, and perhaps the features, of ``module``. Batches
    with features have no waveforms.
    """
    values = torch.randn(batch_size * max(widths), generator=torch.Generator().manual_seed(0))
    if cached != "none":
        assert module is not None
        layout = _layout(module, cached)
        frames = module.student.num_frames(torch.tensor(widths)).tolist()
        sizes = [layout.num_bytes(number) for number in frames]
        # Two bytes are a value, so that both targets and features are noise.
        stored = torch.randn(batch_size * max(sizes) // 2, generator=torch.Generator().manual_seed(1)).bfloat16()
        stored = (stored.pin_memory() if pinned else stored).view(torch.uint8)
    values = values.pin_memory() if pinned else values
    batches = []
    for number, width in enumerate(widths):
        lengths_B, records = torch.full((batch_size,), width), None
        if cached != "none":
            data_BR = stored[: batch_size * sizes[number]].view(batch_size, sizes[number])
            records = CachedRecords(data_BR, layout, frames[number])
        waveforms_BT = None if cached == "features" else values[: batch_size * width].view(batch_size, width)
        batches.append(BenchBatch(waveforms_BT, lengths_B, lengths_B, records))
    return batches


def _layout(module: DistillationModule, cached: Cached) -> RecordLayout:
    """Layout of the records that a run of ``module`` reads from a cache in bf16."""
    student, teacher = module.student, module.teacher
    if cached == "features" and not student.frozen_front_end:
        raise InputError(
            f"cached=features needs a front end that is frozen from the start, not {student.config.front_end}: set "
            "the student's front_end to frozen or shared"
        )
    width = student.hubert.config.conv_dim[-1] if cached == "features" else 0
    return RecordLayout(1 + len(teacher.hidden_layers), teacher.hidden_size, "bf16", width)
