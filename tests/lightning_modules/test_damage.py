"""A model's folder with one file that did not arrive whole: the error names it and says how to get it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel

from lightning_modules.damage import damage_of
from lightning_modules.export import load_student
from lightning_modules.superb.upstream import load_upstream
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_teacher

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 94371840\n"
SHARD = "model-00002-of-00002.safetensors"
HARM: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, "is a pointer of git-lfs, not the file itself: run `git lfs pull` in "),
    "cut": (lambda content: content[: len(content) * 2 // 3], r"is damaged or cut off \(.*\): copy it again"),
    "empty": (lambda _: b"", r"is damaged or cut off \(0 bytes\): copy it again"),
}
harms = pytest.mark.parametrize(("harm", "message"), HARM.values(), ids=HARM)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file, in shards, and in files of torch, new and old."""
    root = tmp_path_factory.mktemp("models")
    model = HubertModel.from_pretrained(save_teacher(root / "whole"))
    model.save_pretrained(root / "shards", max_shard_size="40KB")
    for name, new in (("torch", True), ("old_torch", False)):
        model.config.save_pretrained(root / name)
        torch.save(model.state_dict(), root / name / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    return root


@harms
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("whole", "model.safetensors"),
        ("whole", "config.json"),
        ("shards", SHARD),
        ("shards", "model.safetensors.index.json"),
        ("torch", "pytorch_model.bin"),
        ("old_torch", "pytorch_model.bin"),
    ],
)
def test_a_teacher(
    kind: str, file: str, harm: Callable[[bytes], bytes], message: str, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(models / kind, folder)
    HuggingFaceTeacher(str(folder), normalize=False)  # sound before
    (folder / file).write_bytes(harm((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=rf"^{folder / file} {message}"):
        HuggingFaceTeacher(str(folder), normalize=False)


@harms
def test_an_upstream(harm: Callable[[bytes], bytes], message: str, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "upstream"
    shutil.copytree(models / "whole", folder)
    load_upstream(str(folder))  # sound before
    (folder / "model.safetensors").write_bytes(harm((folder / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=rf"^upstream '{folder}': {folder / 'model.safetensors'} {message}"):
        load_upstream(str(folder))


@harms
@pytest.mark.parametrize("file", ["interstack.json", "model.safetensors", "config.json"])
def test_an_exported_student(
    file: str, harm: Callable[[bytes], bytes], message: str, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(models / "whole", folder)
    meta = '{"format": 1, "student_config": {}, "normalize": false, "sample_rate": 16000, "teacher": {}}'
    (folder / "interstack.json").write_text(meta)
    load_student(folder)  # sound before
    (folder / file).write_bytes(harm((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=rf"^{folder / file} {message}"):
        load_student(folder)


def test_a_checkpoint_that_is_a_pointer(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a pointer of git-lfs, not the file itself: run `git lfs pull`"):
        load_student(path)


def test_a_pointer_that_is_not_read_does_no_harm(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(models / "whole", folder)
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    HuggingFaceTeacher(str(folder), normalize=False)
    HubertConfig(num_hidden_layers=99, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as error:  # another fault, told as before
        HuggingFaceTeacher(str(folder), normalize=False)
    assert "git-lfs" not in str(error.value)


@pytest.mark.parametrize("new", [True, False])
def test_a_cut_may_fall_anywhere(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(1000)}, path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    assert damage_of(path) is None
    for length in range(1, len(content), len(content) // 17):
        path.write_bytes(content[:length])
        assert "copy it again" in (damage_of(path) or ""), length


def test_a_file_of_other_objects_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(Path("a"), path)
    assert damage_of(path) is None
