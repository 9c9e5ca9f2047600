"""Lengths of utterances after effects that cut silence: audio has to be decoded for them, so they are kept on disk."""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from datamodules.audio import SAMPLE_RATE, read_audio
from datamodules.files import read_json, write_json
from datamodules.manifest import default_cache_dir
from datamodules.superb.effects import Effects

logger = logging.getLogger(__name__)

SAVE_EVERY = 20_000
"""Files from one save to the next, so that a killed run keeps most of its work."""


class Lengths:
    """Lengths by path, valid as long as a file's size and time of modification stay the same.

    Args:
        paths: the files of the corpus; their common folder names the file in the cache.
        effects: effects after which lengths count.
        resample: whether files of other rates are converted.
        cache_dir: parent folder; ``None``: ``interstack`` in the user's cache folder.
    """

    def __init__(self, paths: Iterable[str], effects: Effects, resample: bool, cache_dir: str | None) -> None:
        self.effects, self.resample = effects, resample
        name = f"{os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])} {effects} {resample}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.path = Path(cache_dir or default_cache_dir()) / "lengths" / f"{digest}.json"
        self._known: dict[str, list[int]] = read_json(self.path) if self.path.is_file() else {}
        self._new = 0

    def of(self, path: str) -> int:
        """Samples (16 kHz) of a file after the effects; it is decoded if it is new or has changed.

        Raises:
            BadAudioError: the file cannot be decoded.
        """
        state = os.stat(path)
        key, stamp = os.path.abspath(path), [state.st_size, state.st_mtime_ns]
        known = self._known.get(key)
        if known is None or known[:2] != stamp:
            waveform_T = self.effects.apply(read_audio(path, SAMPLE_RATE, resample=self.resample))
            known = self._known[key] = [*stamp, len(waveform_T)]
            self._new += 1
        return known[2]

    def save(self, force: bool = True) -> None:
        """Write what is new, without ``force`` only if it is much."""
        if self._new >= (1 if force else SAVE_EVERY):
            self._new = 0  # before writing, so that lengths that other threads add meanwhile count for the next save
            write_json(self.path, dict(self._known), indent=None)
            logger.info("lengths without silence: %d files measured", len(self._known))
