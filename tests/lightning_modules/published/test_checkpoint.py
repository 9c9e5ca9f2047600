"""Files of other projects: what they hold besides weights is not executed, and what is damaged is named."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.errors import InputError
from lightning_modules.published.checkpoint import Unread, read_contents
from tests.published_files import TINY, save_published

layouts = pytest.mark.parametrize("layout", TINY)


class Executed:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return make_folder, (self.path,)


def make_folder(path: str) -> None:
    Path(path).mkdir()


class Kept(dict[str, Any]):
    """A dictionary of a class of its own."""


@layouts
def test_reads_the_weights_and_drops_objects(layout: str, tmp_path: Path) -> None:
    _, weights = save_published(layout, tmp_path / "file.ckpt")
    contents = read_contents(tmp_path / "file.ckpt")
    found = contents.get("Distiller") or contents["state_dict"]
    prefix = "" if layout in ("DistilHuBERT", "DPHuBERT") else "student_model."
    assert all(torch.equal(found[f"{prefix}{name}"], value) for name, value in weights.items())
    if layout == "DistilHuBERT":
        assert type(contents["Args"]) is type(contents["Optimizer"]["param_groups"][0]["schedule"]) is Unread
        assert vars(contents["Args"]) == {}


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": Executed(tmp_path / "made")}, tmp_path / "file.ckpt")
    assert type(read_contents(tmp_path / "file.ckpt")["hook"]) is Unread
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "file.ckpt", weights_only=False)
    assert (tmp_path / "made").exists(), "control: another reader executes it"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (
            {"Config": {"distiller": [Unread()]}},
            ", in its entry 'Config': it names lightning_modules.published.checkpoint",
        ),
        ({"state_dict": Unread()}, ", in its entry 'state_dict': it names lightning_modules"),
        ({"hyper_parameters": Kept(a=1)}, ": it names tests.lightning_modules.published.test_checkpoint.Kept."),
        ({"state_dict": {}, "loop": [os.system]}, ": it names posix.system."),
    ],
)
def test_refuses_what_needs_code_and_says_how_to_make_a_clean_file(
    entries: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.ckpt"
    torch.save(entries, path)
    with pytest.raises(InputError) as refused:
        read_contents(path)
    message = str(refused.value)
    assert message.startswith(f"{path} holds more than tensors and plain values{reason}")
    assert "\n" not in message


def test_the_lines_for_a_clean_file_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2)}, "loop": Kept(a=1)}, "file.ckpt")
    with pytest.raises(InputError, match="make a clean file") as refused:
        read_contents(Path("file.ckpt"))
    lines = str(refused.value).split("`")[1::2]
    exec("; ".join(lines), {"torch": torch, "FILE": "file.ckpt"})
    assert read_contents(Path("clean.pt")).keys() == {"state_dict"}


def test_names_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file '.*nothing\.ckpt': give a checkpoint file"):
        read_contents(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda content: content[: len(content) // 2], r"is damaged \(its \d+ bytes are cut off.*\): copy it again$"),
        (lambda _: b"", r"is damaged \(it is empty\): copy it again$"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid", r"it is a pointer of git-lfs"),
    ],
)
def test_names_a_damaged_file(harm: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    save_published("MaskHuBERT", path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_contents(path)


def test_refuses_a_file_without_entries(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "file.ckpt")
    with pytest.raises(InputError, match=r"holds a list, not the entries of a checkpoint"):
        read_contents(tmp_path / "file.ckpt")
