import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoFeatureExtractor, HubertModel

from experiments.cli import run
from experiments.corpora.pretrain_teacher import pretrain_teacher
from lightning_modules.pretraining import PretrainingConfig, initial_model
from lightning_modules.teacher import HuggingFaceTeacher
from tests.aligned_corpus import TONES, save_aligned_corpus

RECIPE = PretrainingConfig(
    hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64, conv_channels=16, batch_size=4,
    crop_seconds=0.8,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aligned_corpus(tmp_path_factory.mktemp("tones"), {"train": 12, "dev": 4})


def pretrain(root: Path, output: Path, steps: int = 3, seed: int = 0, **more: Any) -> dict[str, torch.Tensor]:
    pretrain_teacher(
        str(root),
        str(output),
        ["train"],
        ["dev"],
        steps,
        seed,
        RECIPE,
        accelerator="cpu",
        progress_bar=False,
        **more,
    )
    return HubertModel.from_pretrained(output).state_dict()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.ci
def test_training_learns_the_tones(root: Path, tmp_path: Path) -> None:
    pretrain(root, tmp_path / "teacher", steps=120)
    record = json.loads((tmp_path / "teacher" / "training.json").read_text())
    assert record["metrics"]["val/frame_accuracy"] > 0.8
    assert json.loads((tmp_path / "teacher" / "phones.json").read_text()) == ["SIL", *TONES]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_folder_is_a_teacher(root: Path, tmp_path: Path) -> None:
    pretrain(root, tmp_path / "teacher")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "teacher")
    assert (extractor.do_normalize, extractor.return_attention_mask, extractor.sampling_rate) == (
        False,
        True,
        16_000,
    )
    teacher = HuggingFaceTeacher(str(tmp_path / "teacher"))
    assert (teacher.num_layers, teacher.hidden_size, teacher.normalize) == (3, 32, False)
    assert teacher(torch.randn(1, 8000)).output_BFD.shape == (1, 24, 32)


def test_result_is_a_function_of_the_settings(root: Path, tmp_path: Path) -> None:
    one = pretrain(root, tmp_path / "one")
    assert same(one, pretrain(root, tmp_path / "two"))
    assert not same(one, pretrain(root, tmp_path / "other", seed=1))


def test_workers_change_nothing_and_precision_is_recorded(root: Path, tmp_path: Path) -> None:
    one = pretrain(root, tmp_path / "one")
    assert same(one, pretrain(root, tmp_path / "workers", num_workers=2))
    assert not same(one, pretrain(root, tmp_path / "half", precision="bf16-mixed"))
    with pytest.raises(ValueError, match="precision bf16-mixed"):
        pretrain(root, tmp_path / "half")


def test_no_steps_write_the_untrained_twin(root: Path, tmp_path: Path) -> None:
    untrained = pretrain(root, tmp_path / "untrained", steps=0)
    assert same(untrained, initial_model(RECIPE, 0).state_dict())
    assert not same(untrained, pretrain(root, tmp_path / "trained"))
    for splits in (([], ["dev"]), (["train"], [])):
        with pytest.raises(ValueError, match="must each name a folder with alignments"):
            pretrain_teacher(str(root), str(tmp_path / "none"), *splits)
    with pytest.raises(ValueError, match="steps=-1"):
        pretrain(root, tmp_path / "negative", steps=-1)


def test_finished_teacher_is_kept_and_others_are_refused(root: Path, tmp_path: Path) -> None:
    pretrain(root, tmp_path / "teacher")
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    pretrain(root, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="made with steps 3 instead of 2"):
        pretrain(root, tmp_path / "teacher", steps=2)
    pretrain(root, tmp_path / "teacher", steps=2, overwrite=True)
    assert json.loads((tmp_path / "teacher" / "training.json").read_text())["settings"]["steps"] == 2
    changed = save_aligned_corpus(tmp_path / "changed", {"train": 3, "dev": 2}, seed=9)
    with pytest.raises(ValueError, match="made with alignments"):
        pretrain(changed, tmp_path / "teacher", steps=2)


def test_command_line(root: Path, tmp_path: Path) -> None:
    sizes = [
        "--recipe.hidden_size=16",
        "--recipe.num_layers=3",
        "--recipe.num_heads=2",
        "--recipe.batch_size=2",
    ]
    splits = ["--train_splits=[train]", "--val_splits=[dev]", "--steps=1", "--accelerator=cpu"]
    run(
        [
            "pretrain-teacher",
            f"--root={root}",
            f"--output={tmp_path / 'x'}",
            *splits,
            *sizes,
            "--progress_bar=false",
        ]
    )
    assert HubertModel.from_pretrained(tmp_path / "x").config.hidden_size == 16


def test_corpus_without_alignments_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder 'alignments' beside its splits"):
        pretrain(tmp_path, tmp_path / "teacher")
