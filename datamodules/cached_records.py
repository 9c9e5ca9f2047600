"""Records of a cache: the rounded targets and features of one segment, one after the other in one piece of memory.

A batch of records is read with one copy per segment, pinned and copied to the device as one tensor, and taken apart
there without another copy.

Shapes: B batch, F frames, S targets (the output and each hidden layer), D width of the teacher, C width of the
features, R bytes of a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

INT8_MAX = 127
SCALE_BYTES = 4
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FEATURES_ALONE = "none"
"""Type of the targets in the settings of a cache that has features alone."""
ALIGNMENT = 64
"""Number of bytes of which the place of every part of a record in memory is a multiple, as in a cache with features."""


class Rounded(NamedTuple):
    """Values in their stored form."""

    values: Tensor  # (..., D) float32, bfloat16 or int8
    scales: Tensor | None  # (..., 1) float32 with int8

    def decoded(self) -> Tensor:
        """Decoded values, in the stored type, or in float32 from int8."""
        return self.values if self.scales is None else self.values * self.scales


def encode(values: Tensor, dtype: str) -> Rounded:
    """Round to ``bf16``, or to ``int8`` with one scale per frame, its largest value / 127; ``float32`` is exact."""
    if dtype != "int8":
        return Rounded(values.to(DTYPES[dtype]), None)
    scales = values.abs().amax(-1, keepdim=True).float() / INT8_MAX
    safe = scales.clamp(min=torch.finfo(torch.float32).tiny)
    return Rounded((values / safe).round().to(torch.int8), scales)


@dataclass(frozen=True)
class RecordLayout:
    """Sizes and types of the parts of a record: the front end's features (if it has any), then the targets.

    With int8, the scales of a part ((S, F) float32) are before its values ((S, F, D)).

    Args:
        num_targets: number of targets S; 0 for a record of features alone.
        width: width of the teacher D.
        dtype: type of the targets, ``bf16`` or ``int8``.
        features_width: width of the features C; 0 if the record has none.
        features: type of the features, ``float32``, ``bf16`` or ``int8``.
    """

    num_targets: int
    width: int
    dtype: str
    features_width: int = 0
    features: str = "bf16"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "RecordLayout":
        """Build the layout of a cache with these settings."""
        number = 0 if settings["dtype"] == FEATURES_ALONE else 1 + len(settings["layers"])
        targets = number, settings["width"], settings["dtype"]
        return cls(*targets, settings.get("features_width", 0), settings.get("features", "bf16"))

    @property
    def target_bytes(self) -> int:
        """Number of bytes of one frame of all targets."""
        return self.num_targets * _frame_bytes(self.width, self.dtype) if self.num_targets else 0

    @property
    def feature_bytes(self) -> int:
        """Number of bytes of one frame of the features."""
        return _frame_bytes(self.features_width, self.features) if self.features_width else 0

    def first_target_byte(self, num_frames: Any) -> Any:
        """Number of bytes before the targets, for one number of frames or an array of them."""
        return aligned(num_frames * self.feature_bytes)

    def num_bytes(self, num_frames: Any) -> Any:
        """Number of bytes of a record, for one number of frames or an array of them."""
        return self.first_target_byte(num_frames) + num_frames * self.target_bytes

    def chosen(self, targets: Sequence[int], features: bool) -> "RecordLayout":
        """The layout of a record with fewer parts."""
        return replace(self, num_targets=len(targets), features_width=self.features_width if features else 0)

    def spans(self, num_frames: int, targets: Sequence[int], features: bool) -> list[tuple[int, int, int]]:
        """(first byte, first byte in the chosen record, number of bytes) of the copies that make a chosen record.

        Args:
            num_frames: frames of the record.
            targets: chosen targets, ascending.
            features: whether the features are chosen.
        """
        kept, found = self.chosen(targets, features), []
        if kept.features_width:
            found.append((0, 0, num_frames * self.feature_bytes))
        if not targets:
            return found
        first, place = self.first_target_byte(num_frames), kept.first_target_byte(num_frames)
        sizes = [SCALE_BYTES * num_frames] if self.dtype == "int8" else []
        for size in [*sizes, num_frames * self.width * DTYPES[self.dtype].itemsize]:
            found += [(first + target * size, place + number * size, size) for number, target in enumerate(targets)]
            first, place = first + self.num_targets * size, place + len(targets) * size
        return _joined(found)


class CachedRecords(NamedTuple):
    """The records of a batch of segments of one length, in which each part is a view."""

    data: Tensor  # (B, R or more) uint8
    layout: RecordLayout
    num_frames: int

    @property
    def targets(self) -> Rounded:
        """The targets (S, B, F, D), the output first."""
        layout, frames = self.layout, self.num_frames
        shape = (layout.num_targets, frames)
        return self._part(layout.first_target_byte(frames), shape, layout.width, layout.dtype, transposed=True)

    @property
    def features_BFC(self) -> Tensor | None:
        """The features in float32; ``None`` if the records have none."""
        if not self.layout.features_width:
            return None
        shape = (self.num_frames,)
        return self._part(0, shape, self.layout.features_width, self.layout.features).decoded().float()

    def to(self, device: torch.device) -> "CachedRecords":
        """Copy all parts to ``device`` at once."""
        return self._replace(data=self.data.to(device, non_blocking=True))

    def _part(self, first: int, shape: tuple[int, ...], width: int, dtype: str, transposed: bool = False) -> Rounded:
        scales = None
        if dtype == "int8":
            scales, first = self._array(first, (*shape, 1), torch.float32)
        values, _ = self._array(first, (*shape, width), DTYPES[dtype])
        if transposed:
            return Rounded(values.transpose(0, 1), None if scales is None else scales.transpose(0, 1))
        return Rounded(values, scales)

    def _array(self, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
        """A view (B, *shape) from byte ``first`` of each record on, and the first byte after it."""
        end = first + torch.Size(shape).numel() * dtype.itemsize
        return self.data[:, first:end].view(dtype).view(len(self.data), *shape), end


def aligned(num_bytes: Any) -> Any:
    """Round up to a multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _frame_bytes(width: int, dtype: str) -> int:
    return width * DTYPES[dtype].itemsize + (SCALE_BYTES if dtype == "int8" else 0)


def _joined(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join copies that continue one another, on both sides."""
    joined = [spans[0]]
    for first, place, size in spans[1:]:
        last_first, last_place, last_size = joined[-1]
        if (first, place) == (last_first + last_size, last_place + last_size):
            joined[-1] = (last_first, last_place, last_size + size)
        else:
            joined.append((first, place, size))
    return joined
