"""Checkpoint files: whether one is whole, and which of a folder's is the newest.

``torch.load`` finds a file that is cut off, but takes changed bytes in the middle of one without a word. The file is a
ZIP archive, though, and has a checksum of every tensor: to verify all of them takes 0.3 s per GB.
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
    """The bytes of a checkpoint file: torch's own writing to a path does not tell why it failed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in a few words; ``None`` where it is whole.

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
        return f"its {size} bytes are cut off, or are no checkpoint"
    except Exception as error:  # of many kinds: a changed byte may fall anywhere in the archive's own tables
        return f"its table of contents has changed, {error}"
    if damaged:
        return f"its bytes have changed in {damaged}"
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensors
    except RuntimeError as error:
        return str(error).split("\n")[0]
    except pickle.UnpicklingError:
        return None  # whole, but with objects that torch does not load: told where it is loaded
    return None


def require_sound(path: Path, advice: str = "") -> None:
    """Refuse a damaged checkpoint before anything is loaded from it.

    Args:
        path: the checkpoint.
        advice: how to go on; by default to copy the file again.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    if problem := damage(path):
        raise InputError(f"{path} is damaged ({problem}): {advice or 'copy it again, or use another checkpoint'}")


def newest_sound(paths: Iterable[Path]) -> Path | None:
    """The whole checkpoint with the most optimizer steps; of equal ones the last by name (``step=`` names)."""
    found = [(global_step(path), path.name, path) for path in paths if damage(path) is None]
    return max(found)[-1] if found else None


def global_step(path: Path) -> int:
    """Optimizer steps of a whole checkpoint, read without its tensors."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
