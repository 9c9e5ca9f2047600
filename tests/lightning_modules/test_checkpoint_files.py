"""Damage is found before anything is loaded, and the newest whole checkpoint is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint_files import damage, global_step, newest_sound, require_sound


def save(path: Path, step: int, numbers: int = 5000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"weight": torch.arange(float(numbers))}}, path)
    return path


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "are cut off"),
    "without its last bytes": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "are cut off"),
    "one bit changed": (change_a_byte, "bytes have changed in .*data/0"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "or are not a checkpoint"),
    "text": (lambda path: path.write_text("not a checkpoint"), "or are not a checkpoint"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 3)
    assert damage(path) is None
    require_sound(path)
    spoil, message = DAMAGES[kind]
    spoil(path)
    with pytest.raises(ValueError, match=rf"last.ckpt is damaged \(.*{message}.*\): use another"):
        require_sound(path, "use another")


@pytest.mark.ci
def test_wherever_a_byte_has_changed_the_file_is_damaged_or_loads_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 3, numbers=20)
    whole, content = torch.load(path, weights_only=True), path.read_bytes()
    found = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if damage(path):
            found += 1
            continue
        loaded = torch.load(path, weights_only=True)
        assert loaded["global_step"] == whole["global_step"], place
        assert torch.equal(loaded["state_dict"]["weight"], whole["state_dict"]["weight"]), place
    assert found > len(content) / 3  # the rest pads the records to whole blocks


def test_a_whole_file_of_other_objects_is_not_damaged(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "path": tmp_path}, tmp_path / "other.ckpt")
    assert damage(tmp_path / "other.ckpt") is None


def test_control_torch_loads_changed_bytes_without_a_word(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 3)
    change_a_byte(path)
    loaded = torch.load(path, weights_only=True)["state_dict"]["weight"]
    assert not torch.equal(loaded, torch.arange(5000.0))


def test_the_newest_whole_one_has_the_most_steps(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, step) for name, step in (("step=9.ckpt", 9), ("stage_3.ckpt", 12), ("a.ckpt", 3))]
    assert newest_sound(paths) == tmp_path / "stage_3.ckpt"
    assert global_step(tmp_path / "stage_3.ckpt") == 12
    change_a_byte(tmp_path / "stage_3.ckpt")
    assert newest_sound(paths) == tmp_path / "step=9.ckpt"
    assert newest_sound([tmp_path / "stage_3.ckpt"]) is None
