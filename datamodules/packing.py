"""Writing a packed split (format: :mod:`datamodules.packed`), one shard after another.

Shards are written to ``ROOT/.unfinished-SPLIT``, which becomes ``ROOT/SPLIT`` when it is complete. After an interrupted
call the next one continues with the first unfinished shard; finished ones are kept if their checksum is right.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.audio import BadAudioError, read_audio
from datamodules.corpus import TRANSCRIPT_SUFFIX, CorpusSettings, split_folders
from datamodules.errors import InputError
from datamodules.files import write_text
from datamodules.folders import is_finished
from datamodules.manifest import Manifest, prepare_manifest
from datamodules.packed import (
    BYTES_PER_SAMPLE,
    FULL_SCALE,
    INDEX,
    MARKER,
    shard_name,
    unpacked_path,
    verify_packed,
)
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

logger = logging.getLogger(__name__)


class PackedTotals(NamedTuple):
    """Counts and sizes of a packed split."""

    utterances: int
    seconds: float
    num_bytes: int
    shards: int
    skipped: int


def pack_split(
    settings: CorpusSettings, output: Path, shard_bytes: int, overwrite: bool = False, cache_dir: str | None = None
) -> PackedTotals:
    """Pack the one split of ``settings`` into ``output/SPLIT``; a finished pack is verified and kept.

    Raises:
        InputError: ``output/SPLIT`` was not made by this command, or is a pack of another corpus.
        InputError: ``output/SPLIT`` is damaged.
        BadAudioError: a file cannot be decoded, or has samples of more than 16 bits. ``on_bad_audio="skip"``
            leaves out only files whose header shows that they cannot be used.
    """
    (split,) = settings.splits
    folder = output / split
    unfinished = unfinished_folder(folder)
    if str(output.resolve()) in map(os.path.realpath, settings.absolute_roots):
        raise InputError(f"{output} is the corpus itself: choose another output folder")
    manifest = prepare_manifest(settings, cache_dir)
    shards = list(_shards(manifest, shard_bytes))
    total = int(manifest.num_samples.sum())
    totals = PackedTotals(
        len(manifest), total / settings.sample_rate, total * BYTES_PER_SAMPLE, len(shards), len(manifest.skipped)
    )
    made_with = {
        "source": os.path.basename(manifest.folder),  # changes with any file of the corpus
        "sample_rate": settings.sample_rate,
        "shard_bytes": shard_bytes,
    }
    if is_finished(folder, MARKER, made_with, overwrite):
        verify_packed(str(folder))
        return totals
    with only_writer(folder):
        unfinished.mkdir(parents=True, exist_ok=True)
        _require_space(unfinished, totals.num_bytes)
        kept = kept_parts(unfinished, map(shard_name, range(len(shards))), made_with)
        parts: dict[str, Part] = {}
        for number, rows in enumerate(shards):
            name = shard_name(number)
            parts[name] = kept.get(name) or _write_shard(unfinished, number, rows, manifest, made_with)
            logger.info("%s: shard %d, %d of %d utterances", split, number, rows.stop, len(manifest))
        relative = _relative_paths(manifest, [source for _, source in split_folders(settings)])
        parts[INDEX] = _write_index(unfinished, manifest, shards, relative)
        _write_transcripts(unfinished, manifest, relative)
        finish_folder(folder, "*.pcm", MARKER, made_with, parts, sample_rate=settings.sample_rate)
    return totals


def _require_space(folder: Path, num_bytes: int) -> None:
    if (free := free_bytes(folder, "*.pcm")) < num_bytes:
        raise InputError(
            f"{folder} has room for {free / 1e9:.1f} GB, the packed split needs {num_bytes / 1e9:.1f} GB: "
            f"choose another output folder"
        )


def _relative_paths(manifest: Manifest, folders: list[str]) -> list[str]:
    """Path SPEAKER/CHAPTER/NAME of every row."""
    paths = [unpacked_path(manifest.path(row)) for row in range(len(manifest))]
    sources = [next(folder for folder in folders if path.startswith(folder + os.sep)) for path in paths]
    return [os.path.relpath(path, source).replace(os.sep, "/") for path, source in zip(paths, sources, strict=True)]


def _shards(manifest: Manifest, shard_bytes: int) -> Iterator[range]:
    """Rows of each shard, as many as fit and at least one."""
    first, filled = 0, 0
    for row, num_samples in enumerate(manifest.num_samples.tolist()):
        if row > first and filled + num_samples * BYTES_PER_SAMPLE > shard_bytes:
            yield range(first, row)
            first, filled = row, 0
        filled += num_samples * BYTES_PER_SAMPLE
    yield range(first, len(manifest))


def _write_shard(folder: Path, number: int, rows: range, manifest: Manifest, made_with: dict[str, Any]) -> Part:
    name = shard_name(number)
    part = write_part(folder / name, (x_T.tobytes() for x_T in _decoded(rows, manifest, made_with["sample_rate"])))
    record_part(folder, name, made_with, part)
    return part


def _decoded(rows: range, manifest: Manifest, sample_rate: int) -> Iterator[np.ndarray]:
    """16-bit samples of the rows, in order, decoded in threads (libsndfile releases the interpreter lock)."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for start in range(0, len(rows), 16 * workers):
            chunk = rows[start : start + 16 * workers]
            yield from pool.map(lambda row: _sixteen_bits(manifest.path(row), sample_rate), chunk)


def _sixteen_bits(path: str, sample_rate: int) -> np.ndarray:
    scaled_T = read_audio(path, sample_rate) * np.float32(FULL_SCALE)
    samples_T = scaled_T.clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    if not np.array_equal(samples_T, scaled_T):
        raise BadAudioError.of(path, "has more than 16 bits a sample; packing would change it: convert it first")
    return samples_T


def _write_index(folder: Path, manifest: Manifest, shards: list[range], relative: list[str]) -> Part:
    lines = []
    for number, rows in enumerate(shards):
        first = 0
        for row in rows:
            num_samples = int(manifest.num_samples[row])
            lines.append(json.dumps([number, first, num_samples, relative[row]], ensure_ascii=False))
            first += num_samples
    write_text(folder / INDEX, "\n".join(lines) + "\n")
    return part_of(folder / INDEX)


def _write_transcripts(folder: Path, manifest: Manifest, relative: list[str]) -> None:
    texts: dict[str, dict[str, str]] = {}
    for row, path in enumerate(relative):
        if (text := manifest.transcript(row)) is not None:
            texts.setdefault(os.path.dirname(path), {})[manifest.utterance_id(row)] = text
    for chapter, lines in texts.items():
        target = folder / chapter / (chapter.replace("/", "-") + TRANSCRIPT_SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(f"{name} {text}\n" for name, text in lines.items()))
