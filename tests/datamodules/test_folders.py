import os
import signal
import socket
from pathlib import Path

import pytest

from datamodules.folders import is_finished, making, write_marker
from tests.processes import ended, fork


def make(folder: Path, content: str, **settings: int) -> None:
    with making(folder) as new:
        (new / "data").write_text(content)
        write_marker(new, "made.json", settings, note="x")


def test_finished_folder_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "result"
    assert not is_finished(folder, "made.json", {"a": 1}, overwrite=False)
    make(folder, "one", a=1)
    assert is_finished(folder, "made.json", {"a": 1}, overwrite=False)
    assert [path.name for path in folder.parent.iterdir()] == ["result"]


def test_other_settings_are_refused_unless_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    make(folder, "one", a=1, b=2)
    with pytest.raises(ValueError, match="was made with a 1 instead of 3: set overwrite"):
        is_finished(folder, "made.json", {"a": 3, "b": 2}, overwrite=False)
    assert not is_finished(folder, "made.json", {"a": 3, "b": 2}, overwrite=True)
    make(folder, "two", a=3, b=2)
    assert (folder / "data").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_something_else_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(ValueError, match="was not made by this command"):
        is_finished(tmp_path / "result", "made.json", {}, overwrite)


def make_and_die(folder: Path, moment: str) -> None:
    replace = os.replace

    def until(*names: Path) -> None:
        replace(*names)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = until  # type: ignore[assignment]
    with making(folder) as new:
        (new / "data").write_text("two")
        if moment == "writing":
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["writing", "between the renames"])
def test_a_kill_loses_nothing_and_the_next_call_clears_it_up(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "result"
    make(folder, "one", a=1)
    assert ended(fork(make_and_die, folder, moment)) == -signal.SIGKILL
    assert folder.exists() == (moment == "writing")
    (kept,) = tmp_path.glob("result" if moment == "writing" else ".unfinished-result-*/old")
    assert (kept / "data").read_text() == "one"
    with pytest.raises(FileNotFoundError), making(folder) as new:
        (new / "missing" / "data").write_text("half")
    assert (folder / "data").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_killed_process_that_had_this_ones_number_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".unfinished-result-{socket.gethostname()}-{os.getpid()}" / "new").mkdir(parents=True)
    make(tmp_path / "result", "one", a=1)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_what_another_process_is_making_stays(tmp_path: Path) -> None:
    mine = tmp_path / f".unfinished-result-{socket.gethostname()}-{os.getppid()}"
    mine.mkdir()
    make(tmp_path / "result", "one", a=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "result"]


def test_interruption_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    make(folder, "one", a=1)
    with pytest.raises(FileNotFoundError), making(folder) as new:
        (new / "missing" / "data").write_text("half")
    assert (folder / "data").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
