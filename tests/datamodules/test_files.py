import errno
import json
import math
import socket
from pathlib import Path

import pytest

from datamodules.files import FolderLock, flatten, read_json, read_text, replacing, write_json, write_text
from tests.processes import holding


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("\ufeffpath,text\n".encode())
    assert read_text(path) == "path,text\n"


@pytest.mark.parametrize(("encoding", "guess"), [("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1")])
def test_another_encoding_is_named_with_file_and_line(tmp_path: Path, encoding: str, guess: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("path\ncafé\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"table.csv, line \d: .*{guess}.*iconv"):
        read_text(path)


def test_the_line_is_that_of_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"path\nplain\ncaf\xe9\n")
    with pytest.raises(ValueError, match="line 3"):
        read_text(path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"name":\n')
    with pytest.raises(ValueError, match=r"run.json, line 2: this is not JSON"):
        read_json(path)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf,)}], "d": "NaN"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = path.read_text()
    assert json.loads(text, parse_constant=refuse) == {"a": None, "b": [None, 1.5, {"c": [None]}], "d": "NaN"}
    with pytest.raises(AssertionError):  # the check sees what json itself would have written
        json.loads(json.dumps(math.nan), parse_constant=refuse)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    write_text(path, "old\r\n")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*kept\.txt'"):
        fail()
    assert path.read_bytes() == b"old\r\n"
    assert list(tmp_path.iterdir()) == [path]


def test_nested_settings_become_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "d": [1]}


def test_the_lock_of_a_dead_machine_can_be_taken_away(tmp_path: Path) -> None:
    def hold() -> FolderLock:
        socket.gethostname = lambda: "node7"
        return FolderLock(tmp_path, "run.lock", "wait for it")

    with holding(hold, tmp_path / "held") as process:
        way_out = rf"process {process.pid} on node7\): wait for it. If node7 is down, delete {tmp_path / 'run.lock'}"
        with pytest.raises(ValueError, match=way_out):
            FolderLock(tmp_path, "run.lock", "wait for it")
        (tmp_path / "run.lock").unlink()
        FolderLock(tmp_path, "run.lock", "wait for it").release()
