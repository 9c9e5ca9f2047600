from pathlib import Path

import pytest

from datamodules.folders import is_finished, making, write_marker


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


def test_interruption_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    make(folder, "one", a=1)
    with pytest.raises(FileNotFoundError), making(folder) as new:
        (new / "missing" / "data").write_text("half")
    assert (folder / "data").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
