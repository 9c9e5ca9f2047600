"""Whole speakers to which a cache of targets is limited: which are chosen, and the corpus of a run that reads it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

from datamodules.errors import InputError
from datamodules.manifest import Manifest
from datamodules.target_cache import kept_speakers


def speaker_order(speakers: Iterable[str], seed: int) -> list[str]:
    """Distinct speakers in a pseudo-random order. The order of two of them does not depend on the others."""
    return sorted(set(speakers), key=lambda speaker: hashlib.sha256(f"{seed} {speaker}".encode()).digest())


def most_that_fit(order: Sequence[str], num_bytes: Callable[[Sequence[str]], int], limit: float) -> Sequence[str]:
    """The first speakers of ``order`` whose cache has at most ``limit`` bytes.

    The lengths of segments depend on all rows, so the size is asked for every number that is considered. Either all
    fit, or the result fits and one speaker more does not. A larger number may fit again, if its segments are shorter.

    Args:
        order: speakers in the order in which they are taken.
        num_bytes: function that returns the size of the cache of these speakers alone.
        limit: largest size in bytes.

    Raises:
        InputError: the first speaker alone needs more.
    """
    if num_bytes(order) <= limit:
        return order
    fits, exceeds = 0, len(order)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if num_bytes(order[:middle]) <= limit else (fits, middle)
    if not fits:
        raise InputError(
            f"max_gb leaves {max(0, limit) / 1e9:g} GB for the training data, but speaker {order[0]}, the first in the "
            f"order of data.segment_seed, needs {num_bytes(order[:1]) / 1e9:g} GB: raise it, or choose int8 or fewer "
            f"layers"
        )
    return order[:fits]


def of_cache(manifest: Manifest, folder: str) -> Manifest:
    """The rows of ``manifest`` of which the cache in ``folder`` has the targets: all, or those of its speakers.

    Raises:
        InputError: ``manifest`` has no utterance of one of the cache's speakers.
    """
    if (kept := kept_speakers(folder)) is None:
        return manifest
    if missing := sorted(set(kept).difference(manifest.speakers)):
        raise InputError(
            f"{folder} has the targets of {len(kept)} speakers, of whom the corpus has no utterance of {len(missing)} "
            f"(first: {missing[0]}): use data.root and data.train_splits of the call that made it"
        )
    return manifest.of_speakers(kept)


def share(part: Manifest, whole: Manifest, sample_rate: int) -> str:
    """Describe how many speakers and hours of ``whole`` are in ``part``, and how many hours are not."""
    kept, every = (manifest.num_samples.sum() / sample_rate / 3600 for manifest in (part, whole))
    speakers = f"{len(set(part.speakers))} of {len(set(whole.speakers))} speakers"
    return f"{speakers}, {kept:.2f} h of audio kept, {every - kept:.2f} h left out"
