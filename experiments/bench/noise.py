"""Noise: a corpus of it, and batches with one length or with lengths like LibriSpeech's, cropped as in the data module.

A batch can be one of a cache, with noise as the teacher's targets and as the features of the front end.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
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


def write_noise(folder: Path, utterances: int, seconds: float) -> None:
    """Write a split ``train-clean-100`` of utterances of noise, all of one length."""
    chapter = folder / "LibriSpeech" / "train-clean-100" / "100" / "0"
    chapter.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(utterances):
        samples = generator.standard_normal(round(seconds * SAMPLE_RATE)) * 0.1
        soundfile.write(chapter / f"100-0-{number:04d}.flac", samples.clip(-1, 1), SAMPLE_RATE)


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
    lengths = [torch.full((batch_size,), width) for width in widths]
    records: list[CachedRecords | None] = [None] * len(widths)
    if cached != "none":
        assert module is not None
        layout, frames = _layout(module, cached), module.student.num_frames(torch.tensor(widths)).tolist()
        # Two bytes are a value, so that both targets and features are noise.
        stored = _views(batch_size, [layout.num_bytes(number) // 2 for number in frames], torch.bfloat16, pinned)
        pairs = zip(stored, frames, strict=True)
        records = [CachedRecords(view.view(torch.uint8), layout, number) for view, number in pairs]
    if cached == "features":
        return [BenchBatch(None, known, known, each) for known, each in zip(lengths, records, strict=True)]
    waveforms = _views(batch_size, widths, torch.float32, pinned)
    return [BenchBatch(x, known, known, each) for x, known, each in zip(waveforms, lengths, records, strict=True)]


def _views(batch_size: int, widths: list[int], dtype: torch.dtype, pinned: bool) -> list[Tensor]:
    """Make a view (B, width) for each width of one piece of noise."""
    values = torch.randn(batch_size * max(widths), generator=torch.Generator().manual_seed(0)).to(dtype)
    values = values.pin_memory() if pinned else values
    return [values[: batch_size * width].view(batch_size, width) for width in widths]


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
