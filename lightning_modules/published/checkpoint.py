"""Checkpoints of other projects, read without running any code that they name.

A checkpoint often holds more than weights, such as an optimizer with a learning-rate schedule that is an object of the
project's own class. ``torch.load(weights_only=True)`` refuses such a file whole. So every class and function that it
does not know is replaced by :class:`Unread`, which keeps nothing.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from datamodules.errors import InputError
from lightning_modules.checkpoint_files import require_sound

PARTS = ("Distiller", "Config", "state_dict", "hyper_parameters", "config")
"""Entries of the known layouts that are read."""


class Unread:
    """Stand-in for an object of a class that is not plain data; its contents are dropped."""

    def __new__(cls, *arguments: Any) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


def read_contents(path: Path) -> dict[str, Any]:
    """Read the entries of a checkpoint file, without loading tensors that are not used.

    Raises:
        InputError: there is no such file, it is damaged, or the entries that are needed are more than tensors and plain
            values.
    """
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}: give a checkpoint file as its authors published it")
    require_sound(path, "copy it again")
    names: list[str] = []
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
        with safe_globals([(Unread, name) for name in names]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, ValueError) as error:
        raise InputError(_not_plain(path, names)) from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}, not the entries of a checkpoint")
    for part in PARTS:
        if _holds_unread(contents.get(part)):
            raise InputError(_not_plain(path, names, f", in its entry {part!r}"))
    return contents


def _holds_unread(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_unread, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_unread, value))
    return isinstance(value, Unread)


def _not_plain(path: Path, names: list[str], where: str = "") -> str:
    return (
        f"{path} holds more than tensors and plain values{where}: it names {', '.join(names) or 'what torch refuses'}. "
        "Reading it could run any code. If you trust it, make a clean file where it loads: "
        "`c = torch.load(FILE, map_location='cpu', weights_only=False)`, then "
        f"`torch.save({{k: c[k] for k in {PARTS} if k in c}}, 'clean.pt')`"
    )
