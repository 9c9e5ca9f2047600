"""The rows of a corpus as memory-mapped columns, cached on disk and rebuilt when the corpus has changed.

:func:`prepare_manifest` builds a manifest (in one process), :func:`load_manifest` opens it (in every process). A
manifest is a folder of plain ``.npy`` columns; strings are one UTF-8 blob and offsets. Opened with
``mmap_mode="r"`` it needs no memory of its own per process. 281,241 rows open in milliseconds, and loader
workers share the pages.

Cache layout::

    CACHE/manifests/KEY/     KEY: hash of the settings
        current              name of the newest finished manifest, replaced atomically after that is complete
        SIGNATURE/           hash of path, size and modification time of every file of the corpus

A changed corpus makes a new SIGNATURE folder; the old one stays, so that a run that is reading it is not
disturbed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from datamodules.corpus import CorpusFile, CorpusSettings, list_files, split_folders
from datamodules.corpus import utterance_id as utterance_id_of
from datamodules.errors import InputError
from datamodules.files import read_json, read_text, write_json, write_text
from datamodules.packed import is_packed, verify_packed
from datamodules.scanning import Problem, Row, scan

FORMAT = 1


class StringColumn:
    """Strings as one UTF-8 blob with offsets, both memory-mapped."""

    def __init__(self, folder: str, name: str) -> None:
        self._blob = np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")
        self._offsets = np.load(os.path.join(folder, f"{name}_offsets.npy"), mmap_mode="r")

    def __getitem__(self, row: int) -> str:
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

    @staticmethod
    def write(folder: str, name: str, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        np.save(os.path.join(folder, f"{name}.npy"), np.frombuffer(b"".join(encoded), dtype=np.uint8))
        np.save(os.path.join(folder, f"{name}_offsets.npy"), offsets)


class Manifest:
    """One corpus table; row i is an utterance. It is pickled as its folder's name and its choice of rows.

    Args:
        folder: folder of the columns.
        chosen: (N,) ascending rows of the table that are the rows of this manifest; default: all.

    Attributes:
        num_samples: (N,) int64, samples at the manifest's sample rate.
        skipped: (path, reason) of each file that was left out.
    """

    def __init__(self, folder: str, chosen: np.ndarray | None = None) -> None:
        self.folder = folder
        self._meta: dict[str, Any] = read_json(os.path.join(folder, "meta.json"))
        self.skipped = [Problem(*entry) for entry in self._meta["skipped"]]
        self.num_samples: np.ndarray = np.load(os.path.join(folder, "num_samples.npy"), mmap_mode="r")
        self._has_transcript = np.load(os.path.join(folder, "has_transcript.npy"), mmap_mode="r")
        self._chosen = chosen
        if chosen is not None:
            self.num_samples, self._has_transcript = self.num_samples[chosen], self._has_transcript[chosen]
        self._paths = StringColumn(folder, "path")
        self._speakers = StringColumn(folder, "speaker")
        self._transcripts = StringColumn(folder, "transcript")

    def __len__(self) -> int:
        return len(self.num_samples)

    def __reduce__(self) -> tuple[type["Manifest"], tuple[str, np.ndarray | None]]:
        return Manifest, (self.folder, self._chosen)

    def of_speakers(self, speakers: Collection[str]) -> "Manifest":
        """The rows of these speakers alone."""
        kept = set(speakers)
        rows = np.flatnonzero([speaker in kept for speaker in self.speakers])
        return Manifest(self.folder, rows if self._chosen is None else self._chosen[rows])

    @cached_property
    def row_hash(self) -> str:
        """Hash of the table, which does not depend on the corpus's path: relative paths and lengths.

        With chosen rows it is that of speakers, utterances and lengths.
        """
        if self._chosen is None:
            return str(self._meta["row_hash"])
        lengths = enumerate(self.num_samples.tolist())
        return _digest([f"{self.speaker(row)} {self.utterance_id(row)} {length}" for row, length in lengths])

    @cached_property
    def speakers(self) -> list[str]:
        """The speaker of each row."""
        return [self.speaker(row) for row in range(len(self))]

    def path(self, row: int) -> str:
        return self._paths[self._place(row)]

    def speaker(self, row: int) -> str:
        return self._speakers[self._place(row)]

    def utterance_id(self, row: int) -> str:
        return utterance_id_of(self.path(row))

    @property
    def without_transcript(self) -> int | None:
        """Number of utterances without text; ``None`` if no utterance has text."""
        return int((~self._has_transcript).sum()) if self._has_transcript.any() else None

    def transcript(self, row: int) -> str | None:
        return self._transcripts[self._place(row)] if self._has_transcript[row] else None

    def _place(self, row: int) -> int:
        """The row in the columns of strings."""
        return row if self._chosen is None else int(self._chosen[row])


class _Listing(NamedTuple):
    files: list[CorpusFile]
    signature: str


def prepare_manifest(settings: CorpusSettings, cache_dir: str | None = None) -> Manifest:
    """Return the manifest of the present corpus, from the cache if no file has changed, else built and cached.

    Raises:
        InputError: a split is missing or empty, or (with ``on_bad_audio="error"``) a file cannot be used.
    """
    cache = _cache_folder(settings, cache_dir)
    listing = _list_corpus(settings)
    folder = os.path.join(cache, listing.signature)
    if not os.path.isdir(folder):
        for packed in filter(is_packed, {file.folder: None for file in listing.files}):
            verify_packed(packed)
        rows, problems = scan(listing.files, settings)
        write_manifest(folder, rows, problems)
    _point_to(cache, listing.signature)
    return Manifest(folder)


def load_manifest(settings: CorpusSettings, cache_dir: str | None = None) -> Manifest:
    """Open the manifest that :func:`prepare_manifest` made for these settings, without reading the corpus.

    Raises:
        InputError: there is no such manifest.
    """
    cache = _cache_folder(settings, cache_dir)
    pointer = os.path.join(cache, "current")
    if not os.path.isfile(pointer):
        raise InputError(f"there is no manifest of {', '.join(settings.splits)} in {cache}; call prepare_data first")
    return Manifest(os.path.join(cache, read_text(pointer)))


def write_manifest(folder: str, rows: Sequence[Row], problems: Sequence[Problem] = ()) -> None:
    """Write the columns to a temporary folder beside ``folder`` and rename it when they are complete."""
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix="unfinished-", dir=parent)
    try:
        _write_columns(unfinished, rows)
        meta = {"format": FORMAT, "row_hash": _row_hash(rows), "skipped": list(problems)}
        write_json(os.path.join(unfinished, "meta.json"), meta)
        os.chmod(unfinished, 0o755)  # only its owner can read mkdtemp's folder, but a cache may be shared
        os.replace(unfinished, folder)
    except OSError:
        if not os.path.isdir(folder):  # else another process has finished the same manifest
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def default_cache_dir() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "interstack")


def _cache_folder(settings: CorpusSettings, cache_dir: str | None) -> str:
    key = _digest([json.dumps(asdict(settings) | {"roots": settings.absolute_roots})])
    return os.path.join(cache_dir or default_cache_dir(), "manifests", key)


def _list_corpus(settings: CorpusSettings) -> _Listing:
    files = list_files(split_folders(settings))
    return _Listing(files, _digest([f"{FORMAT}", *(f"{file.path} {file.size} {file.mtime_ns}" for file in files)]))


def _write_columns(folder: str, rows: Sequence[Row]) -> None:
    np.save(os.path.join(folder, "num_samples.npy"), np.array([row.num_samples for row in rows], dtype=np.int64))
    has_transcript = np.array([row.transcript is not None for row in rows], dtype=bool)
    np.save(os.path.join(folder, "has_transcript.npy"), has_transcript)
    StringColumn.write(folder, "path", [row.path for row in rows])
    StringColumn.write(folder, "speaker", [row.speaker for row in rows])
    StringColumn.write(folder, "transcript", [row.transcript or "" for row in rows])


def _point_to(cache: str, signature: str) -> None:
    pointer = os.path.join(cache, "current")
    # A cache that others share may be read-only, and their runs may be reading this file.
    if not os.path.isfile(pointer) or read_text(pointer) != signature:
        write_text(pointer, signature)


def _row_hash(rows: Sequence[Row]) -> str:
    return _digest([f"{row.relative} {row.num_samples}" for row in rows])


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
