"""Detection of damaged model files: git-lfs pointers, and copies that were cut off.

The errors of the libraries that read them name no file. So the files are examined, but only once loading has failed.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from datamodules.errors import InputError
from datamodules.files import read_json

POINTER = b"version https://git-lfs.github.com/spec/"
TORCH_STARTS = (b"PK", b"\x80")  # first bytes of a zip archive, and of a pickle, the format of older versions of torch
DESCRIPTIONS = ("config.json", "interstack.json")


@contextlib.contextmanager
def naming_damage(folder: str | Path) -> Iterator[None]:
    """Replace an error by one that names the damaged file of a model's folder.

    Other errors pass unchanged, as do all errors when ``folder`` is the name of a model on the hub.

    Raises:
        InputError: a file is damaged. The message says how to restore it.
    """
    try:
        yield
    except Exception as error:
        problems = map(damage_of, _files_of(Path(folder)))
        if (problem := next(filter(None, problems), None)) is not None:
            raise InputError(problem) from error
        raise


def damage_of(path: Path) -> str | None:
    """Describe what is wrong with a model's file and how to restore it; ``None`` if no damage is found."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        return f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in {path.parent}"
    reason = _unreadable(path, start)
    return reason and f"{path} is damaged or cut off ({reason}): copy it again"


def _unreadable(path: Path, start: bytes) -> str | None:
    if not start:
        return "0 bytes"
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif not start.startswith(TORCH_STARTS):
            return "not a file of torch"
        else:
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many types: the file may be cut off anywhere
        text = str(error).strip().removeprefix(f"{path}, ")
        if "Unsupported global" in text:  # undamaged, but with objects that torch does not load
            return None
        return re.split(r"[;\n]|\. ", text)[0] or type(error).__name__
    return None


def _files_of(folder: Path) -> list[Path]:
    """The files that are read to load a model: its descriptions, and the weights of the first kind that exists."""
    for kind in ("safetensors", "bin"):
        weights = sorted(folder.glob(f"*.{kind}"))
        indices = sorted(folder.glob(f"*.{kind}.index.json"))
        if weights or indices:
            return [*(folder / name for name in DESCRIPTIONS), *indices, *weights]
    return [folder / name for name in DESCRIPTIONS]
