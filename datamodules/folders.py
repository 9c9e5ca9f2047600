"""Folders that are complete or absent: made under a temporary name, and identified by the settings stored in them."""

import glob
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from datamodules.files import naming, read_json, write_json


def is_finished(folder: Path, marker: str, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether ``folder`` already holds the result of ``settings``.

    Args:
        folder: folder of the result.
        marker: name of the JSON file in it whose key ``settings`` has the settings that it was made with.
        settings: settings in plain values, as read back from JSON.
        overwrite: allow replacing a result of other settings.

    Raises:
        InputError: the folder was not made by this command, or has other settings and ``overwrite`` is off. A folder
            that was not made by this command is never replaced, so that no flag deletes a real corpus or model.
    """
    if not folder.exists():
        return False
    if not (folder / marker).is_file():
        raise InputError(f"{folder} exists and was not made by this command: choose another output folder")
    found = read_json(folder / marker)["settings"]
    if found == settings:
        return True
    if not overwrite:
        names = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        difference = ", ".join(f"{name} {found.get(name)} instead of {settings.get(name)}" for name in names)
        raise InputError(f"{folder} was made with {difference}: set overwrite to replace it, or choose another output")
    return False


def write_marker(folder: Path, marker: str, settings: Mapping[str, Any], **more: Any) -> None:
    """Store the settings and further values as readable JSON."""
    write_json(folder / marker, {"settings": settings, **more}, indent=2)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` when the block ends without an exception.

    The temporary folders of killed calls on this machine are removed; a folder that one had moved away is put back.
    """
    folder = folder.absolute()
    prefix = f".unfinished-{folder.name}-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_alive(left.name.removeprefix(prefix)):
            _put_back(left / "old", folder)
            shutil.rmtree(left, ignore_errors=True)
    home = folder.parent / f"{prefix}{os.getpid()}"
    (home / "new").mkdir(parents=True)
    try:
        with naming(folder):
            yield home / "new"
        if folder.exists():
            os.replace(folder, home / "old")
        os.replace(home / "new", folder)
    finally:
        _put_back(home / "old", folder)
        shutil.rmtree(home, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def _is_alive(process: str) -> bool:
    if process == str(os.getpid()):  # left by an earlier process: in a container numbers repeat
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
