"""Reading and atomic writing of text and JSON files, and locks of folders.

A file is written under a temporary name of this process and renamed, so that a kill or a full disk leaves the old file.
A folder that one command fills over a long time is locked against a second command.
"""

import codecs
import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.errors import InputError

log = logging.getLogger(__name__)


def read_text(path: str | Path) -> str:
    """Contents of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: the file is in another encoding. It names the file, the line and how to convert it.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        guess = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "ISO-8859-1"
        raise InputError(
            f"{path}, line {line}: this is not UTF-8 text, it looks like {guess}; convert it with "
            f"`iconv -f {guess} -t UTF-8`"
        ) from error


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 file, without line ends; raises the errors of :func:`read_text`."""
    # str.splitlines would also split at a Unicode line separator inside a sentence.
    return [line.rstrip("\n") for line in io.StringIO(read_text(path), newline=None)]


def read_json(path: str | Path, remedy: str = "restore the file") -> Any:
    """Read the value of a JSON file.

    Args:
        path: the file.
        remedy: what the user should do if it is damaged, for the message.

    Raises:
        InputError: the file is not UTF-8 or not JSON. It names the file and the line.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: this is not JSON ({error.msg}); {remedy}") from error


def write_bytes(path: str | Path, content: bytes | memoryview) -> Path:
    """Write a whole file or nothing, make its folder if missing, and return the path, as the other functions do."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text without converting newlines."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> Path:
    """Write a value as standard JSON, in which numbers that are not finite become ``null``."""
    return write_text(path, json_text(value, indent))


def json_text(value: Any, indent: int | None = 1) -> str:
    """The text that `write_json` writes."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def clear_temporaries(folder: str | Path) -> None:
    """Remove the temporary files of killed processes below a locked folder."""
    for path in Path(folder).rglob("*.tmp"):
        if re.fullmatch(r".+-\d+\.tmp", path.name):  # as :func:`replacing` names them
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to a disk error in the block, since an error of a write has no file name.

    Raises:
        OSError: the error with the path; it also replaces the error of another type in which safetensors wraps it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise


def what_to_do(error: OSError) -> str:
    """Advice for the end of a message if a file could not be written; empty for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room there and give the same command again, what is finished is kept"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; make it writable, or choose another folder"
    return ""


def finite(value: Any) -> Any:
    """Copy containers with ``None`` for every NaN and infinity, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_values(value: Any) -> Any:
    """Convert to containers of primitives, as ``torch.load(weights_only=True)`` and YAML need them."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted names; lists do not change."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of this process; it is renamed to ``path`` at the end, or removed after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temporary.unlink()  # left by a killed process with the same number
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class FolderLock:
    """A lock on a folder, held by this process until it is released or the process ends in any way.

    The lock is the kernel's (POSIX, over NFS as well), so that no dead process holds it, but a dead machine may.
    Processes that this one forks do not have it. The lock file stays after release and has no meaning by itself.

    Args:
        folder: the folder to lock; made if missing.
        name: name of the lock file.
        remedy: what the user should do if another process has the lock, for the message.
        wait: wait until no other process has the lock.

    Raises:
        InputError: another process has the lock; the message names that process and its machine. An NFS server of
            version 3 keeps the lock of a machine that has died, so the message names the file to delete then.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, name: str, remedy: str, wait: bool = False) -> None:
        self._handle = -1
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # POSIX allows either
            holder = os.read(self._handle, 1000).decode().strip() or "just started"
            self.release()
            if (machine := holder.rpartition(" on ")[2]) not in (socket.gethostname(), holder):
                remedy += f". If {machine} is down, delete {folder / name}"
            raise InputError(f"{folder} is in use by another command ({holder}): {remedy}") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no second command write there", folder, error.strerror)
            return
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    __del__ = release

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
