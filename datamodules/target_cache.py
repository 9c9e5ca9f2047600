"""Reading a cache of teacher targets for fixed segments, stored in a few large files for a whole corpus.

``interstack cache-targets`` writes it (:mod:`datamodules.target_writing`)::

    CACHE/targets.json           settings, measured error of each target, size and SHA-256 of every other file
    CACHE/places.npy             (N, 3) int64 by manifest row: shard, first byte, frames
    CACHE/statistics.npy         (2, S, D) float32, mean and deviation, if the targets were standardized with them
    CACHE/00000.targets, ...     row after row, each at the byte in places.npy

A row has the frames of the output and then of each hidden layer upwards. With int8 all scales ((S, F) float32) come
first and then the values ((S, F, D) int8); with bf16 there are only the values. The settings identify the teacher
(hashes of its weights), the corpus and the segments; :meth:`TargetCache.require` refuses any others.

Shapes: S targets (the output and each hidden layer), B batch, F frames, D width of the teacher, N rows.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import InputError
from datamodules.shards import first_damage, read_marker

MARKER = "targets.json"
PLACES = "places.npy"
STATISTICS = "statistics.npy"
SHARDS = "*.targets"
INT8_MAX = 127
SCALE_BYTES = 4
VALUE_BYTES = {"bf16": 2, "int8": 1}
NOT_IN_OLDER_CACHES = {"objective.normalize_targets": "none"}


class StoredTargets(NamedTuple):
    """Targets in their stored form, in which they are also copied to the device."""

    values: Tensor  # (S, B, F, D) bfloat16 or int8; the output first
    scales: Tensor | None  # (S, B, F, 1) float32 with int8

    def decoded(self) -> Tensor:
        """Decoded targets (S, B, F, D), in bfloat16, or in float32 from int8."""
        return self.values if self.scales is None else self.values * self.scales

    def to(self, device: torch.device) -> "StoredTargets":
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        return StoredTargets(self.values.to(device, non_blocking=True), scales)


def encode(targets_SBFD: Tensor, dtype: str) -> StoredTargets:
    """Round targets to ``bf16``, or to ``int8`` with one scale per frame, its largest value / 127."""
    if dtype == "bf16":
        return StoredTargets(targets_SBFD.bfloat16(), None)
    scales_SBF1 = targets_SBFD.abs().amax(-1, keepdim=True).float() / INT8_MAX
    safe_SBF1 = scales_SBF1.clamp(min=torch.finfo(torch.float32).tiny)
    return StoredTargets((targets_SBFD / safe_SBF1).round().to(torch.int8), scales_SBF1)


def frame_bytes(num_targets: int, width: int, dtype: str) -> int:
    """Number of bytes of one frame of all targets."""
    return num_targets * (width * VALUE_BYTES[dtype] + (SCALE_BYTES if dtype == "int8" else 0))


class TargetCache:
    """A finished cache. It is pickled as folder and layers, so that a loader's worker maps the files itself.

    Args:
        folder: folder made by ``interstack cache-targets``.
        layers: hidden layers to read besides the output, ascending; default: all.

    Raises:
        InputError: the folder has no finished cache.
    """

    def __init__(self, folder: str, layers: Sequence[int] | None = None) -> None:
        self.folder = os.path.abspath(folder)
        if not os.path.isfile(os.path.join(self.folder, MARKER)):
            raise InputError(
                f"{folder} holds no finished cache of targets: make one with `interstack cache-targets --output "
                f"{folder}` and the options of this run; the same command continues an unfinished one"
            )
        self.settings: dict[str, Any] = read_marker(self.folder, MARKER)["settings"]
        stored: list[int] = self.settings["layers"]
        self.layers = list(stored if layers is None else layers)
        self._chosen = [0, *(1 + stored.index(layer) for layer in self.layers)]

    def __reduce__(self) -> tuple[type["TargetCache"], tuple[str, list[int]]]:
        return TargetCache, (self.folder, self.layers)

    def require(self, settings: Mapping[str, Any]) -> None:
        """Refuse a cache that was not made with these settings; it may have more layers.

        Raises:
            InputError: a setting differs. The message names each with both values.
        """
        own = NOT_IN_OLDER_CACHES | self.settings
        differing = [
            f"{name} was {own[name]}, is {value}" if name in own else f"{name} is not in it"
            for name, value in settings.items()
            if own.get(name) != value
        ]
        if differing:
            raise InputError(
                f"{self.folder} holds the targets of another teacher, corpus or segments: {'; '.join(differing)}. Use "
                f"the settings that made it, or make another with `interstack cache-targets --output NEW` and the "
                f"options of this run"
            )

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: a file is missing or differs; the first is named.
        """
        for remembered in (read_marker, _places, _shard):  # the cache may have been made again
            remembered.cache_clear()
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

    def read(self, rows_B: np.ndarray) -> StoredTargets:
        """Read the targets of rows whose segments have one length.

        Raises:
            InputError: a file is missing or has changed its size.
        """
        places_B3 = _places(self.folder)[rows_B]
        num_frames = int(places_B3[0, 2])
        width, int8 = self.settings["width"], self.settings["dtype"] == "int8"
        shape = (len(self._chosen), len(rows_B), num_frames)
        values_SBFD = torch.empty((*shape, width), dtype=torch.int8 if int8 else torch.bfloat16)
        scales_SBF1 = torch.empty((*shape, 1)) if int8 else None
        raw = values_SBFD.view(torch.int8).numpy()
        stored = (1 + len(self.settings["layers"]), num_frames)
        for item, (shard, first, _) in enumerate(places_B3.tolist()):
            data = _shard(self.folder, shard_name(shard))
            if scales_SBF1 is not None:
                end = first + stored[0] * num_frames * SCALE_BYTES
                scales_SBF1.numpy()[:, item, :, 0] = data[first:end].view("<f4").reshape(stored)[self._chosen]
                first = end
            values = data[first : first + stored[0] * num_frames * raw.shape[-1]].view(np.int8)
            values = values.reshape(*stored, raw.shape[-1])
            for target, place in enumerate(self._chosen):
                raw[target, item] = values[place]
        return StoredTargets(values_SBFD, scales_SBF1)


def shard_name(number: int) -> str:
    return f"{number:05d}.targets"


def _damaged(path: str, problem: str) -> InputError:
    return InputError(
        f"{path} {problem} since the targets were cached: copy the cache again, or make it again with "
        f"`interstack cache-targets --overwrite true`"
    )


@cache
def _places(folder: str) -> np.ndarray:
    _require_size(folder, PLACES)
    return np.load(os.path.join(folder, PLACES), mmap_mode="r")


@cache
def _shard(folder: str, name: str) -> np.ndarray:
    """All bytes of a shard, memory-mapped once per process."""
    _require_size(folder, name)
    return np.memmap(os.path.join(folder, name), dtype=np.uint8, mode="r")


def _require_size(folder: str, name: str) -> None:
    """Refuse a file of another size, since reading past the end of a mapped file kills the process silently."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise _damaged(path, "is missing")
    if os.path.getsize(path) != read_marker(folder, MARKER)["parts"][name]["bytes"]:
        raise _damaged(path, "has changed its size")
