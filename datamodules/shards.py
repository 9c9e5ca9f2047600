"""Folders of large files that are written one after another: complete or absent, resumable, with checksums.

While it is being made, a folder ``NAME`` is called ``.unfinished-NAME``. Each finished file in it has a record
(``FILE.json`` with settings and checksum). After an interrupted call the next one continues with the first file that
has no record or one with other settings. The finished folder keeps the records, and a marker file with all checksums
marks it as finished (:mod:`datamodules.folders`).
"""

import contextlib
import hashlib
import mmap
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from datamodules.errors import InputError
from datamodules.files import FolderLock, clear_temporaries, read_json, replacing, write_json
from datamodules.folders import write_marker

P = ParamSpec("P")
R = TypeVar("R")
_FORGET: list[Callable[[], None]] = []
READ_AHEAD_BYTES = 128 * 1024
"""Bytes per request of :meth:`MappedFile.will_need`: Linux cuts a larger one to what it would read ahead by itself."""
MOST_OPEN_FILES = 65_536  # enough, and without the cost that some programs have where the limit is in the millions
OTHER_OPEN_FILES = 256  # of the libraries, the GPU, the network and the loaders
Part = dict[str, Any]
"""Description of a finished file: ``bytes``, ``sha256`` and further values of the code that writes it."""


def unfinished_folder(folder: Path) -> Path:
    """The temporary folder in which ``folder`` is made."""
    return folder.with_name(f".unfinished-{folder.name}")


def remembered(read: Callable[P, R]) -> Callable[P, R]:
    """Call ``read`` once per process for each argument, until :func:`forget_folders`."""
    caching = cache(read)
    _FORGET.append(caching.cache_clear)
    return cast(Callable[P, R], caching)


def forget_folders() -> None:
    """Forget all finished folders and close their mapped files; the next reading opens them again."""
    for forget in _FORGET:
        forget()


@remembered
def read_marker(folder: str, marker: str) -> dict[str, Any]:
    """Content of a finished folder's marker file."""
    return read_json(os.path.join(folder, marker))


class MappedFile:
    """A finished file in memory-mapped form, of which pieces at random places are read.

    Args:
        path: the file, which is not empty.
        dtype: type of its values.

    Attributes:
        values: all of its values; those that are not in memory are read from the storage when they are used.
    """

    def __init__(self, path: str, dtype: npt.DTypeLike) -> None:
        with open(path, "rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.values = np.frombuffer(self._pages, dtype)

    def will_need(self, first: int, number: int) -> None:
        """Begin to read ``number`` values from ``first`` on, in the background.

        Without it a piece is read page by page, each of which is waited for.
        """
        start, end = first * self.values.itemsize, (first + number) * self.values.itemsize
        for place in range(start - start % mmap.PAGESIZE, end, READ_AHEAD_BYTES):
            self._pages.madvise(mmap.MADV_WILLNEED, place, min(READ_AHEAD_BYTES, end - place))


def allow_open_files(number: int, folder: str, option: str) -> None:
    """Raise this process's limit of open files, which its children inherit, to the highest that is allowed.

    Args:
        number: files of ``folder`` that stay mapped, each of which counts as open.
        option: option that makes larger and thus fewer files, for the message.

    Raises:
        InputError: the limit is too low for that many.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if highest == resource.RLIM_INFINITY else min(highest, MOST_OPEN_FILES)
    if limit == resource.RLIM_INFINITY or limit >= number + OTHER_OPEN_FILES:
        return
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than their hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, highest))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < number + OTHER_OPEN_FILES:
        raise InputError(
            f"{folder} has {number} files, and this process may hold {limit} open: raise the limit "
            f"(`ulimit -n {number + OTHER_OPEN_FILES}`, or the hard limit of your system), or make larger files with "
            f"{option}"
        )


def only_writer(folder: Path) -> FolderLock:
    """Lock ``folder`` for one writer; a second call at the same time is refused.

    Raises:
        InputError: another process is making the folder.
    """
    return FolderLock(folder.parent, f".{folder.name}.lock", "wait for it, or choose another output folder")


def checksum(path: str) -> str | None:
    """SHA-256 of a file; ``None`` if the file is missing."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: Iterable[str]) -> Iterator[str | None]:
    """SHA-256 of each file, or ``None`` if it is missing, side by side: hashing releases the interpreter lock."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(checksum, paths)


def first_damage(folder: str, parts: Mapping[str, Part]) -> tuple[str, str] | None:
    """Path and problem of the first part that is missing or has another checksum."""
    paths = [os.path.join(folder, name) for name in parts]
    for path, part, sha256 in zip(paths, parts.values(), checksums(paths), strict=True):
        if sha256 != part["sha256"]:
            return path, "is missing" if sha256 is None else "has changed"
    return None


def kept_parts(folder: Path, names: Iterable[str], made_with: Mapping[str, Any]) -> dict[str, Part]:
    """Descriptions of the files that an earlier call finished with the same settings and that have their checksums."""
    records = {name: read_json(_record_path(folder, name)) for name in names if _record_path(folder, name).is_file()}
    parts = {name: record["part"] for name, record in records.items() if record["settings"] == made_with}
    found = checksums([str(folder / name) for name in parts])
    return {name: part for (name, part), sha256 in zip(parts.items(), found, strict=True) if sha256 == part["sha256"]}


def write_part(path: Path, chunks: Iterable[bytes]) -> Part:
    """Write a file under a temporary name, flush it to the disk and rename it."""
    digest, size = hashlib.sha256(), 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        for data in chunks:
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def record_part(folder: Path, name: str, made_with: Mapping[str, Any], part: Part) -> None:
    """Record a finished file for a later call."""
    write_json(_record_path(folder, name), {"settings": made_with, "part": part}, indent=None)


def part_of(path: Path) -> Part:
    """Description of a small file that was not written by :func:`write_part`."""
    return {"bytes": path.stat().st_size, "sha256": checksum(str(path))}


def free_bytes(folder: Path, files: str) -> int:
    """Bytes available to a folder; files of an earlier call (that match the pattern ``files``) count as free."""
    return shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob(files))


def finish_folder(
    folder: Path, shards: str, marker: str, made_with: Mapping[str, Any], parts: Mapping[str, Part], **more: Any
) -> None:
    """Write the marker of the unfinished folder and rename it; files of calls with other settings are removed first."""
    unfinished = unfinished_folder(folder)
    clear_temporaries(unfinished)
    for leftover in [*unfinished.glob(f"{shards}.json"), *unfinished.glob(shards)]:
        if leftover.name.removesuffix(".json") not in parts:
            leftover.unlink()
    write_marker(unfinished, marker, made_with, **more, parts=dict(parts))
    replaced = unfinished.with_name(f"{unfinished.name}-replaced")
    if folder.exists():
        # Left by a call that was killed before it deleted it. If ``folder`` is missing, it may be the only whole copy.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
