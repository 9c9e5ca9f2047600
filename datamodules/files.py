"""Text and JSON files: one way to read them, one way to write them.

Writing goes to a temporary name of this process and is renamed, so that a kill or a full disk leaves the old file.
"""

import contextlib
import io
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: str | Path) -> str:
    """Contents of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: the file is in another encoding. It names the file, the line and how to convert it.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        guess = BYTE_ORDER_MARKS.get(data[:2], "ISO-8859-1")
        raise ValueError(
            f"{path}, line {line}: this is not UTF-8 text, it looks like {guess}; convert it with "
            f"`iconv -f {guess} -t UTF-8`"
        ) from error


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 file, without their ends; errors as :func:`read_text`'s."""
    # str.splitlines would also cut at a line separator inside of a sentence.
    return [line.rstrip("\n") for line in io.StringIO(read_text(path), newline=None)]


def read_json(path: str | Path) -> Any:
    """Value of a JSON file.

    Raises:
        ValueError: the file is not UTF-8 or not JSON. It names the file and the line.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: this is not JSON ({error.msg}); restore the file") from error


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all; the folder is made where it is missing. Returns the path, as the others do."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text with newlines as they are."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> Path:
    """Write a value as JSON that every program reads: numbers that are not finite become ``null``."""
    return write_text(path, json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same containers, with ``None`` for every NaN and infinity: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to, of this process alone: renamed to ``path`` at the end, removed where that is not reached."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
