"""Files of a model that did not arrive whole: pointers of git-lfs, and copies that were cut off.

The libraries that read them name no file. So when loading has failed, and only then, the files are looked at.
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
TORCH_STARTS = (b"PK", b"\x80")  # of a zip archive, and of a pickle as older versions of torch wrote it
DESCRIPTIONS = ("config.json", "interstack.json")


@contextlib.contextmanager
def naming_damage(folder: str | Path) -> Iterator[None]:
    """Replace an error by one that names the damaged file of a model's folder; others, and of hub names, stay.

    Raises:
        ValueError: a file is damaged. It says how to get it whole.
    """
    try:
        yield
    except Exception as error:
        problems = map(damage_of, _files_of(Path(folder)))
        if (problem := next(filter(None, problems), None)) is not None:
            raise InputError(problem) from error
        raise


def damage_of(path: Path) -> str | None:
    """What is wrong with a file of a model and how to get it whole; ``None`` where nothing is seen."""
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
            return "no file of torch"
        else:
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: a cut may fall anywhere
        text = str(error).strip().removeprefix(f"{path}, ")
        if "Unsupported global" in text:  # whole, but with objects that torch does not load
            return None
        return re.split(r"[;\n]|\. ", text)[0] or type(error).__name__
    return None


def _files_of(folder: Path) -> list[Path]:
    """What is read of a model: its descriptions, and the weights of the first kind that is there."""
    for kind in ("safetensors", "bin"):
        weights = sorted(folder.glob(f"*.{kind}"))
        indices = sorted(folder.glob(f"*.{kind}.index.json"))
        if weights or indices:
            return [*(folder / name for name in DESCRIPTIONS), *indices, *weights]
    return [folder / name for name in DESCRIPTIONS]
