"""Checks of checkpoint files: whether a file is undamaged, and which one of a folder is the newest.

``torch.load`` refuses a file that is cut off, but loads one whose bytes have changed in the middle. The file is a ZIP
archive with a checksum of every tensor. Verifying all checksums takes 0.3 s per GB.
"""

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from datamodules.errors import InputError
from lightning_modules.damage import POINTER


def serialised(state: Any) -> memoryview:
    """The bytes of a checkpoint file. When torch itself writes to a path, its error does not give the cause."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def damage(path: Path) -> str | None:
    """Describe in a few words what is wrong with a checkpoint file; ``None`` if it is undamaged.

    Raises:
        OSError: the file cannot be read at all.
    """
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            return "it is a pointer of git-lfs, not the file itself: run `git lfs pull`"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        return f"its {size} bytes are cut off, or are not a checkpoint"
    except Exception as error:  # many types: a changed byte may lie anywhere in the archive's tables
        return f"its table of contents has changed, {error}"
    if damaged:
        return f"its bytes have changed in {damaged}"
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensors
    except RuntimeError as error:
        return str(error).split("\n")[0]
    except pickle.UnpicklingError:
        return None  # undamaged, but with objects that torch does not load; loading it reports them
    return None


def require_sound(path: Path, advice: str = "") -> None:
    """Refuse a damaged checkpoint before anything is loaded from it.

    Args:
        path: the checkpoint.
        advice: what the user should do, for the message; default: copy the file again.

    Raises:
        InputError: the checkpoint is damaged. The message names the file and the damage.
    """
    if problem := damage(path):
        raise InputError(f"{path} is damaged ({problem}): {advice or 'copy it again, or use another checkpoint'}")


def newest_sound(paths: Iterable[Path]) -> Path | None:
    """The undamaged checkpoint with the most optimizer steps; of equal ones the last by name (``step=`` names)."""
    found = [(global_step(path), path.name, path) for path in paths if damage(path) is None]
    return max(found)[-1] if found else None


def global_step(path: Path) -> int:
    """Number of optimizer steps of an undamaged checkpoint, read without its tensors."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
