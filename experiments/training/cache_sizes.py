"""Sizes of a cache before it is made: what reading it takes, and the speakers that fit into a limit."""

import math
from collections.abc import Callable, Sequence

from datamodules.librispeech import LibriSpeechDataModule
from datamodules.speaker_choice import most_that_fit, share, speaker_order

# Audio seconds per second that a training run reads. The second is what a fast GPU at 40 % of its peak needs if only
# the student's Transformer is left to compute.
TRAINING_SPEEDS = (9_000, 47_000)
# Sequential reading of usual storage, up to so many GB/s.
STORAGE = (
    (0.1, "network storage of 1 Gbit/s"),
    (0.5, "a SATA SSD"),
    (3.0, "any NVMe disk"),
    (7.0, "a fast NVMe disk"),
    (math.inf, "memory"),
)


def reading_needs(num_bytes: int, seconds: float) -> str:
    """Describe the rates at which a cache of ``num_bytes`` for ``seconds`` of audio is read."""
    per_second = num_bytes / seconds
    speeds = [f"{speed:,}" for speed in TRAINING_SPEEDS]
    slow, fast = (speed * per_second / 1e9 for speed in TRAINING_SPEEDS)
    return (
        f"reading: {per_second / 1e3:,.0f} kB per audio second, so {slow:.2g} GB/s at {speeds[0]} audio seconds "
        f"per second ({storage_for(slow)}) and {fast:.2g} GB/s at {speeds[1]} ({storage_for(fast)})"
    )


def storage_for(gigabytes_per_second: float) -> str:
    """The slowest usual storage that delivers a rate."""
    return next(name for rate, name in STORAGE if gigabytes_per_second <= rate)


def limit_speakers(
    datamodule: LibriSpeechDataModule, limit: float, num_bytes: Callable[[], int]
) -> tuple[Sequence[str] | None, str]:
    """Leave out whole speakers until the cache of the training data has at most ``limit`` bytes.

    Args:
        datamodule: data module that is set up; afterwards it trains on the speakers that are kept.
        limit: largest size in bytes.
        num_bytes: function that returns the size of the cache of what the data module trains on.

    Returns:
        The speakers that are kept, ``None`` if none is left out, and a description.

    Raises:
        InputError: the limit is too small for one speaker.
    """
    whole = datamodule.train_manifest

    def num_bytes_of(speakers: Sequence[str]) -> int:
        datamodule.train_on(whole.of_speakers(speakers))
        return num_bytes()

    order = speaker_order(whole.speakers, datamodule.segment_seed)
    kept = most_that_fit(order, num_bytes_of, limit)
    datamodule.train_on(whole.of_speakers(kept) if len(kept) < len(order) else whole)
    return (kept if len(kept) < len(order) else None), share(datamodule.train_manifest, whole, datamodule.sample_rate)
