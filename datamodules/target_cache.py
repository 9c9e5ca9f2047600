"""Reading a cache of teacher targets for fixed segments, stored in a few large files for a whole corpus.

``interstack cache-targets`` writes it (:mod:`datamodules.target_writing`)::

    CACHE/targets.json           settings, measured error of each target, size and SHA-256 of every other file
    CACHE/places.npy             (N, 3) int64 by row: shard, first byte, frames
    CACHE/statistics.npy         (2, S, D) float32, mean and deviation, if the targets were standardized with them
    CACHE/speakers.txt           the speakers, one a line, if it is limited to some of the corpus's
    CACHE/00000.targets, ...     record after record (:mod:`datamodules.cached_records`), each at the byte in places.npy
    CACHE/validation/            the same of the validation data, if there are any

A row is a fixed segment (:class:`datamodules.batching.FixedSegments` numbers them): with one per utterance a row of
the manifest. Its record has the frames of the front end's features, if they are stored, then of the output and of each
hidden layer upwards. The settings identify the teacher (hashes of its weights), the corpus and the segments;
:meth:`TargetCache.require` refuses any others.

Shapes: S targets (the output and each hidden layer), B batch, N rows.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.cached_records import CachedRecords, RecordLayout, aligned
from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.shards import MappedFile, allow_open_files, first_damage, forget_folders, read_marker, remembered

logger = logging.getLogger(__name__)

MARKER = "targets.json"
PLACES = "places.npy"
STATISTICS = "statistics.npy"
SPEAKERS = "speakers.txt"
SHARDS = "*.targets"
VALIDATION = "validation"
NOT_IN_OLDER_CACHES = {
    "objective.normalize_targets": "none",
    "objective.masked": "none",
    "teacher.targets": "hidden",
    "data.length_grid": 1,
    "data.segments_per_utterance": 1,
}


class TargetCache:
    """A finished cache. It is pickled by its arguments, so that a loader's worker maps the files itself.

    Args:
        folder: folder made by ``interstack cache-targets``.
        layers: hidden layers to read besides the output, ascending; default: all.
        features: read the front end's features too, if the cache has them.

    Attributes:
        front_end: hash of the front end that computed the features; ``None`` if none are read.

    Raises:
        InputError: the folder has no finished cache.
    """

    def __init__(self, folder: str, layers: Sequence[int] | None = None, features: bool = True) -> None:
        self.folder = os.path.abspath(folder)
        if not os.path.isfile(os.path.join(self.folder, MARKER)):
            raise InputError(
                f"{folder} holds no finished cache of targets: make one with `interstack cache-targets --output "
                f"{folder}` and the options of this run; the same command continues an unfinished one"
            )
        marker = read_marker(self.folder, MARKER)
        allow_open_files(len(marker["parts"]), self.folder, "--shard_megabytes")
        self.settings: dict[str, Any] = marker["settings"]
        stored: list[int] = self.settings["layers"]
        self.layers = list(stored if layers is None else layers)
        self._stored = RecordLayout.of(self.settings)
        self._chosen = [0, *(1 + stored.index(layer) for layer in self.layers)][: self._stored.num_targets]
        self.has_features = features and self._stored.features_width > 0
        self.layout = self._stored.chosen(self._chosen, self.has_features)
        self.front_end: str | None = self.settings["student.front_end_weights"] if self.has_features else None

    def __reduce__(self) -> tuple[type["TargetCache"], tuple[str, list[int], bool]]:
        return TargetCache, (self.folder, self.layers, self.has_features)

    @property
    def masked(self) -> bool:
        """Whether these are the targets of a student whose input is masked."""
        return self.settings.get("objective.masked", "none") != "none"

    def differences(self, settings: Mapping[str, Any]) -> str:
        """The settings that this cache was not made with, with both values; empty if there are none."""
        own = NOT_IN_OLDER_CACHES | self.settings
        return "; ".join(
            f"{name} was {own[name]}, is {value}" if name in own else f"{name} is not in it"
            for name, value in (NOT_IN_OLDER_CACHES | dict(settings)).items()
            if own.get(name) != value
        )

    def require(self, settings: Mapping[str, Any]) -> None:
        """Refuse a cache that was not made with these settings; it may have more layers.

        Raises:
            InputError: a setting differs. The message names each with both values.
        """
        if differing := self.differences(settings):
            raise InputError(
                f"{self.folder} holds the targets of another teacher, corpus or segments: {differing}. Use "
                f"the settings that made it, or make another with `interstack cache-targets --output NEW` and the "
                f"options of this run"
            )

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: a file is missing or differs; the first is named.
        """
        forget_folders()  # the cache may have been made again
        if (damage := first_damage(self.folder, read_marker(self.folder, MARKER)["parts"])) is not None:
            raise _damaged(*damage)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation (S, D) of the chosen targets before they were standardized; ``None`` if they were not.

        Raises:
            InputError: the file is missing or has changed its size.
        """
        if STATISTICS not in read_marker(self.folder, MARKER)["parts"]:
            return None
        _require_size(self.folder, STATISTICS)
        mean_SD, deviation_SD = torch.from_numpy(np.load(os.path.join(self.folder, STATISTICS)))[:, self._chosen]
        return mean_SD, deviation_SD

    def read(self, rows_B: np.ndarray) -> CachedRecords:
        """Read the records of rows whose segments have one length.

        Raises:
            InputError: a file is missing or has changed its size.
        """
        places_B3 = _places(self.folder)[rows_B]
        num_frames = int(places_B3[0, 2])
        spans = self._stored.spans(num_frames, self._chosen, self.has_features)
        # numpy asks for huge pages for a large array, torch does not: small ones took 80 % of the time of reading.
        records = np.empty((len(rows_B), aligned(self.layout.num_bytes(num_frames))), np.uint8)
        pieces = [(_shard(self.folder, shard_name(shard)), start) for shard, start, _ in places_B3.tolist()]
        for shard, start in pieces:  # all of the batch before the first is waited for
            for first, _, size in spans:
                shard.will_need(start + first, size)
        for record_R, (shard, start) in zip(records, pieces, strict=True):
            for first, place, size in spans:
                record_R[place : place + size] = shard.values[start + first : start + first + size]
        return CachedRecords(torch.from_numpy(records), self.layout, num_frames)


def kept_speakers(folder: str) -> list[str] | None:
    """The speakers to which a finished cache is limited; ``None`` if it is not finished or has the whole corpus.

    Raises:
        InputError: the list is missing or has changed its size.
    """
    folder = os.path.abspath(folder)
    if not os.path.isfile(os.path.join(folder, MARKER)) or SPEAKERS not in read_marker(folder, MARKER)["parts"]:
        return None
    _require_size(folder, SPEAKERS)
    return read_lines(os.path.join(folder, SPEAKERS))


def open_caches(
    folder: str, settings: Mapping[str, Mapping[str, Any]], layers: Sequence[int], features: bool
) -> dict[str, TargetCache]:
    """Open the caches of the training and the validation data (``train``, ``val``) in ``folder``.

    Validation data that are others than those of the cache are left out with a warning.

    Raises:
        InputError: the cache was not made with the ``settings`` of the training data.
    """
    TargetCache(folder).require(settings["train"])
    caches = {"train": TargetCache(folder, layers, features)}
    validation = os.path.join(folder, VALIDATION)
    if "val" in settings and os.path.isdir(validation):
        if differing := TargetCache(validation).differences(settings["val"]):
            logger.warning("the teacher runs in validation, whose cached targets are others: %s", differing)
        else:
            caches["val"] = TargetCache(validation, layers, features)
    return caches


def shard_name(number: int) -> str:
    return f"{number:05d}.targets"


def _damaged(path: str, problem: str) -> InputError:
    return InputError(
        f"{path} {problem} since the targets were cached: copy the cache again, or make it again with "
        f"`interstack cache-targets --overwrite true` (features in a run's folder: delete them, and the run makes them "
        f"again)"
    )


@remembered
def _places(folder: str) -> np.ndarray:
    _require_size(folder, PLACES)
    return np.load(os.path.join(folder, PLACES), mmap_mode="r")


@remembered
def _shard(folder: str, name: str) -> MappedFile:
    _require_size(folder, name)
    return MappedFile(os.path.join(folder, name), np.uint8)


def _require_size(folder: str, name: str) -> None:
    """Refuse a file of another size, since reading past the end of a mapped file kills the process silently."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise _damaged(path, "is missing")
    if os.path.getsize(path) != read_marker(folder, MARKER)["parts"][name]["bytes"]:
        raise _damaged(path, "has changed its size")
