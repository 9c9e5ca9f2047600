"""Writing a cache of teacher targets (format: :mod:`datamodules.target_cache`), one shard after another.

A row is a fixed segment, as in the cache. Rows are in order of length, so that a batch for the teacher has one length
and nothing is padded. The caller passes a function that runs the teacher, from batches of rows to targets; this module
does not depend on the teacher.

Shapes: S targets (the output and each hidden layer), B batch, F frames, D width, N rows.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.batching import FixedSegments
from datamodules.cached_records import RecordLayout, encode
from datamodules.errors import InputError
from datamodules.files import write_text
from datamodules.folders import is_finished
from datamodules.shards import (
    Part,
    finish_folder,
    free_bytes,
    kept_parts,
    only_writer,
    part_of,
    record_part,
    unfinished_folder,
    write_part,
)
from datamodules.target_cache import (
    MARKER,
    PLACES,
    SHARDS,
    SPEAKERS,
    STATISTICS,
    TargetCache,
    shard_name,
)

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30
_SUMS = ("squared_error", "squared_norm")  # sums of each target over a shard, stored in its record


class Computed(NamedTuple):
    """What is stored of a batch of rows of one length, in float32."""

    targets: Tensor | None  # (S, B, F, D), the output first; None in a cache of features alone
    features: Tensor | None = None  # (B, F, C) of the front end, if the cache has them


Source = Callable[[Sequence[np.ndarray]], Iterator[Computed]]
"""Function from batches of rows to what is stored of each batch; called once, as it may start a loader's processes."""


@dataclass(frozen=True)
class TargetPlan:
    """Layout of a cache: the order of rows and their shards.

    Attributes:
        rows: (N,) rows in the order in which they are written.
        num_samples: (N,) number of samples of each row.
        num_frames: (N,) number of frames of each row.
        row_bytes: (N,) number of bytes of each row.
        shards: positions in ``rows`` of each shard.
    """

    rows: np.ndarray
    num_samples: np.ndarray
    num_frames: np.ndarray
    row_bytes: np.ndarray
    shards: list[range]

    @property
    def num_bytes(self) -> int:
        return int(self.row_bytes.sum())

    def batches(self, shard: int, batch_samples: int) -> list[np.ndarray]:
        """Rows of a shard in batches of one length and at most ``batch_samples`` samples, at least one row."""
        part = self.shards[shard]
        rows = self.rows[part.start : part.stop]
        lengths = self.num_samples[rows]
        batches: list[np.ndarray] = []
        for same in np.split(rows, np.flatnonzero(np.diff(lengths)) + 1):
            most = max(1, batch_samples // int(self.num_samples[same[0]]))
            batches += [same[first : first + most] for first in range(0, len(same), most)]
        return batches


def plan_targets(segments: FixedSegments, num_frames: np.ndarray, layout: RecordLayout, shard_bytes: int) -> TargetPlan:
    """Sort rows by (length, row) and split them into shards of at most ``shard_bytes``, each of at least one row."""
    rows = np.argsort(segments.num_samples, kind="stable")
    row_bytes = layout.num_bytes(num_frames)
    shards, first, filled = [], 0, 0
    for position, size in enumerate(row_bytes[rows].tolist()):
        if position > first and filled + size > shard_bytes:
            shards.append(range(first, position))
            first, filled = position, 0
        filled += size
    return TargetPlan(rows, segments.num_samples, num_frames, row_bytes, [*shards, range(first, len(rows))])


def room_for(folder: Path, plan: TargetPlan) -> int:
    """Bytes available to ``folder``, including the bytes that an interrupted call has already written.

    Raises:
        InputError: the targets need more bytes.
    """
    unfinished = unfinished_folder(folder)
    unfinished.mkdir(parents=True, exist_ok=True)
    if (free := free_bytes(unfinished, SHARDS)) < plan.num_bytes:
        raise InputError(
            f"{folder} has room for {free / 1e9:.1f} GB, the targets need {plan.num_bytes / 1e9:.1f} GB: choose "
            f"another output folder, fewer layers (model.objective.layers), less of the corpus, or int8 instead of bf16"
        )
    return free


def is_cached(folder: Path, made_with: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``folder`` has the finished cache of these settings; its checksums are verified.

    Raises:
        InputError: it was not made by this command, or is a cache of other settings and ``overwrite`` is off.
        ValueError: the cache is damaged.
    """
    if not is_finished(folder, MARKER, made_with, overwrite):
        return False
    TargetCache(str(folder)).verify()
    return True


def write_targets(
    folder: Path,
    made_with: dict[str, Any],
    plan: TargetPlan,
    source: Source,
    batch_samples: int,
    statistics: Callable[[], np.ndarray] | None = None,
    speakers: Sequence[str] | None = None,
) -> dict[str, float]:
    """Write the missing shards of a cache and finish its folder; return the relative L2 error of each target.

    Args:
        folder: folder of the finished cache.
        made_with: plain settings that determine the content, including ``dtype`` and ``layers``.
        plan: layout of the cache, made with the same settings.
        source: function that runs the teacher.
        batch_samples: largest number of samples in a batch for ``source``.
        statistics: measures mean and deviation (2, S, D), with which ``source`` standardizes; called before it.
        speakers: speakers to whom the corpus was limited; ``None`` if it was not.

    Raises:
        InputError: ``source`` returns other shapes than planned, or targets that are not finite.
    """
    with only_writer(folder):
        unfinished = unfinished_folder(folder)
        unfinished.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Part] = {}
        if statistics is not None:
            np.save(unfinished / STATISTICS, statistics())
            parts[STATISTICS] = part_of(unfinished / STATISTICS)
        if speakers is not None:
            parts[SPEAKERS] = part_of(write_text(unfinished / SPEAKERS, "\n".join([*speakers, ""])))
        progress = _Progress(plan)
        names = [shard_name(number) for number in range(len(plan.shards))]
        shards = kept_parts(unfinished, names, made_with)
        progress.skip(rows for rows, name in zip(plan.shards, names, strict=True) if name in shards)
        missing = [number for number, name in enumerate(names) if name not in shards]
        batches = {number: plan.batches(number, batch_samples) for number in missing}
        computed = source(list(itertools.chain.from_iterable(batches.values())))
        for number in missing:
            part = _ShardWriter(plan, made_with, progress).write(unfinished / names[number], batches[number], computed)
            record_part(unfinished, names[number], made_with, part)
            shards[names[number]] = part
            progress.tell(f"shard {number + 1} of {len(plan.shards)}")
        parts |= {name: shards[name] for name in names}
        errors = _relative_errors([shards[name] for name in names], made_with)
        np.save(unfinished / PLACES, _places(plan))
        parts[PLACES] = part_of(unfinished / PLACES)
        finish_folder(folder, SHARDS, MARKER, made_with, parts, relative_l2_error=errors)
    return errors


class _ShardWriter:
    """Writes one shard: rounds, measures the error and lays records out one after the other."""

    def __init__(self, plan: TargetPlan, made_with: dict[str, Any], progress: "_Progress") -> None:
        self.plan, self.progress = plan, progress
        self.layout = RecordLayout.of(made_with)
        parts = self.layout.num_targets + bool(self.layout.features_width)
        self.squared_error, self.squared_norm = (torch.zeros(parts, dtype=torch.float64) for _ in _SUMS)

    def write(self, path: Path, batches: list[np.ndarray], results: Iterator[Computed]) -> Part:
        """Take one of ``results`` for each of the shard's batches."""
        part = write_part(path, self._chunks(batches, itertools.islice(results, len(batches))))
        return part | {name: getattr(self, name).tolist() for name in _SUMS}

    def _chunks(self, batches: list[np.ndarray], results: Iterator[Computed]) -> Iterator[bytes]:
        layout = self.layout
        for rows_B, computed in zip(batches, results, strict=True):
            frames = int(self.plan.num_frames[rows_B[0]])
            pieces = []
            if computed.features is not None:
                _check("features", computed.features, (len(rows_B), frames, layout.features_width))
                features = self._rounded(rows_B, computed.features[None], layout.features, layout.num_targets)
                pieces.append([part.ljust(layout.first_target_byte(frames), b"\0") for part in features])
            if computed.targets is not None:
                _check("targets", computed.targets, (layout.num_targets, len(rows_B), frames, layout.width))
                pieces.append(self._rounded(rows_B, computed.targets, layout.dtype, first=0))
            for parts in zip(*pieces, strict=True):
                yield b"".join(parts)
            self.progress.add(rows_B)

    def _rounded(self, rows_B: np.ndarray, values_SBFD: Tensor, dtype: str, first: int) -> list[bytes]:
        """Bytes of each row; the errors are added to those of the parts from ``first`` on."""
        rounded = encode(values_SBFD, dtype)
        error_S = (rounded.decoded().float() - values_SBFD).square().sum((1, 2, 3)).cpu()
        norm_S = values_SBFD.square().sum((1, 2, 3)).cpu()
        if not bool(norm_S.isfinite().all()):
            raise InputError(f"the teacher's targets or features are not finite in one of the rows {rows_B.tolist()}")
        self.squared_error[first : first + len(error_S)] += error_S
        self.squared_norm[first : first + len(norm_S)] += norm_S
        arrays = [part.cpu() for part in (rounded.scales, rounded.values) if part is not None]
        return [
            b"".join(part_SBFD[:, item].contiguous().view(torch.uint8).numpy().tobytes() for part_SBFD in arrays)
            for item in range(len(rows_B))
        ]


def _check(name: str, found: Tensor, expected: tuple[int, ...]) -> None:
    if found.shape != expected:
        raise InputError(f"{name} have shape {tuple(found.shape)} instead of {expected}")


def _places(plan: TargetPlan) -> np.ndarray:
    places_N3 = np.zeros((len(plan.rows), 3), dtype=np.int64)
    places_N3[:, 2] = plan.num_frames
    for number, shard in enumerate(plan.shards):
        rows = plan.rows[shard.start : shard.stop]
        places_N3[rows, 0] = number
        places_N3[rows, 1] = np.cumsum(plan.row_bytes[rows]) - plan.row_bytes[rows]
    return places_N3


def _relative_errors(parts: list[Part], made_with: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each rounded target and of the features over all frames, against those before rounding."""
    names = ["output", *(f"layer_{layer}" for layer in made_with["layers"])] if made_with["width"] else []
    names += ["features"] if "features" in made_with else []
    sums = [[sum(values) for values in zip(*(part[k] for part in parts), strict=True)] for k in _SUMS]
    return {name: math.sqrt(e / n) if n else 0.0 for name, e, n in zip(names, *sums, strict=True)}


class _Progress:
    """Logs the progress of writing in frames; rates are those of this call."""

    def __init__(self, plan: TargetPlan) -> None:
        self._plan, self._total = plan, int(plan.num_frames.sum())
        self._done = self._written = 0
        self._start = self._last = time.monotonic()

    def skip(self, shards: Iterable[range]) -> None:
        rows = self._plan.rows
        self._done = sum(int(self._plan.num_frames[rows[shard.start : shard.stop]].sum()) for shard in shards)
        if self._done:
            self.tell("going on")

    def add(self, rows: np.ndarray) -> None:
        self._written += int(self._plan.num_frames[rows].sum())
        if time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self.tell("writing")

    def tell(self, what: str) -> None:
        self._last = time.monotonic()
        rate = self._written / max(self._last - self._start, 1e-9)
        done = self._done + self._written
        left = f"{(self._total - done) / rate / 60:.0f} minutes left" if rate else "kept from an earlier call"
        logger.info("%s: %.1f %% of the frames, %s", what, 100 * done / self._total, left)
