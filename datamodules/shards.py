"""Folders of large files that are written one after another: whole or absent, resumable, known by their checksums.

While it is being made, a folder ``NAME`` is ``.unfinished-NAME`` beside its place. Each finished file of it has a
record (``FILE.json``: settings and checksum), so that an interrupted call goes on with the first file that has none,
or another's. The finished folder keeps the records, and what makes it finished is a marker file with the checksums of
all (:mod:`datamodules.folders`).
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datamodules.files import FolderLock, clear_temporaries, read_json, replacing, write_json
from datamodules.folders import write_marker

Part = dict[str, Any]
"""What is known of a finished file: ``bytes``, ``sha256`` and whatever its maker adds."""


def unfinished_folder(folder: Path) -> Path:
    """Where ``folder`` grows."""
    return folder.with_name(f".unfinished-{folder.name}")


def only_writer(folder: Path) -> FolderLock:
    """The right to make ``folder``: a second call at the same time is refused.

    Raises:
        InputError: another process makes it.
    """
    return FolderLock(folder.parent, f".{folder.name}.lock", "wait for it, or choose another output folder")


def checksum(path: str) -> str | None:
    """SHA-256 of a file; ``None`` where there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_damage(folder: str, parts: Mapping[str, Part]) -> tuple[str, str] | None:
    """Path and problem of the first part that is missing or does not have its checksum."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the interpreter lock
        found = pool.map(lambda name: checksum(os.path.join(folder, name)), parts)
        for (name, part), sha256 in zip(parts.items(), found, strict=True):
            if sha256 != part["sha256"]:
                return os.path.join(folder, name), "is missing" if sha256 is None else "has changed"
    return None


def kept_part(folder: Path, name: str, made_with: Mapping[str, Any]) -> Part | None:
    """What is known of a file that an earlier call finished with the same settings, if its content is right."""
    record_path = _record_path(folder, name)
    if not record_path.is_file():
        return None
    record = read_json(record_path)
    if record["settings"] != made_with or checksum(str(folder / name)) != record["part"]["sha256"]:
        return None
    return record["part"]


def write_part(path: Path, chunks: Iterable[bytes]) -> Part:
    """Write a file under a temporary name, bring it to the disk and rename it."""
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
    """Remember a finished file for a later call."""
    write_json(_record_path(folder, name), {"settings": made_with, "part": part}, indent=None)


def part_of(path: Path) -> Part:
    """What is known of a small file that was written otherwise."""
    return {"bytes": path.stat().st_size, "sha256": checksum(str(path))}


def free_bytes(folder: Path, shards: str) -> int:
    """Room for a folder that grows; what an earlier call has already written (files like ``shards``) is free."""
    return shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob(shards))


def finish_folder(
    folder: Path, shards: str, marker: str, made_with: Mapping[str, Any], parts: Mapping[str, Part], **more: Any
) -> None:
    """Give the unfinished folder its marker and its place, without what calls with other settings left in it."""
    unfinished = unfinished_folder(folder)
    clear_temporaries(unfinished)
    for leftover in [*unfinished.glob(f"{shards}.json"), *unfinished.glob(shards)]:
        if leftover.name.removesuffix(".json") not in parts:
            leftover.unlink()
    write_marker(unfinished, marker, made_with, **more, parts=dict(parts))
    replaced = unfinished.with_name(f"{unfinished.name}-replaced")
    if folder.exists():
        # Left by a call that was killed in its last line. Where ``folder`` is missing, it may be the only whole copy.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
