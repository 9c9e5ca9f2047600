"""By what checkpoints and caches know a teacher: in a cache all below a target counts, and nothing above it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.teacher import HuggingFaceTeacher, Teacher
from lightning_modules.teacher_identity import teacher_digest, teacher_settings, weight_digests
from tests.helpers import save_teacher


def chosen(folder: Path, layers: tuple[int, ...] = (2, 3), output: int | None = None, **settings: Any) -> Teacher:
    teacher = HuggingFaceTeacher(str(folder), **settings)
    teacher.select_layers(layers, output)
    return teacher


def test_the_same_weights_elsewhere_are_the_same_teacher(tmp_path: Path) -> None:
    one, other = (chosen(save_teacher(tmp_path / name)) for name in ("one", "other"))
    settings = teacher_settings(one)
    assert settings == teacher_settings(other)
    assert settings["teacher.output_layer"] == 4
    names = ("teacher.layer_2_weights", "teacher.layer_3_weights", "teacher.output_weights")
    assert len({settings[name] for name in names}) == 3
    assert teacher_settings(chosen(tmp_path / "one", normalize=True)) != settings


@pytest.mark.parametrize(
    ("weight", "changed"),
    [
        ("model.feature_extractor.conv_layers.0.conv.weight", {2, 3, 4}),
        ("model.encoder.layers.1.attention.k_proj.weight", {2, 3, 4}),
        ("model.encoder.layers.2.final_layer_norm.bias", {3, 4}),
        ("model.encoder.layers.3.feed_forward.output_dense.weight", {4}),
        ("model.masked_spec_embed", set()),
    ],
)
def test_a_changed_weight_changes_the_targets_above_it(tmp_path: Path, weight: str, changed: set[int]) -> None:
    teacher = chosen(save_teacher(tmp_path / "teacher"))
    before = weight_digests(teacher)
    value = teacher.state_dict()[weight].view(-1)
    with torch.no_grad():
        value[-1] += 1e-6 * value[-1].abs() + 1e-6
    after = weight_digests(teacher)
    assert {layer for layer in (2, 3, 4) if before[layer] != after[layer]} == changed


def test_layers_above_the_highest_target_do_not_count(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    settings = teacher_settings(chosen(tmp_path / "teacher", (2,), output=3))
    whole = teacher_settings(chosen(tmp_path / "teacher", (2, 3)))
    assert settings["teacher.layer_2_weights"] == whole["teacher.layer_2_weights"]
    assert settings["teacher.output_weights"] == whole["teacher.layer_3_weights"]
    assert settings["teacher.output_layer"] == 3


def test_of_an_unknown_teacher_all_weights_count(tmp_path: Path) -> None:
    class Wrapped(Teacher):
        sample_rate, num_layers, hidden_size = 16_000, 4, 16

        def __init__(self) -> None:
            super().__init__()
            self.model = HuggingFaceTeacher(str(tmp_path / "teacher")).model

        def num_frames(self, num_samples_B: torch.Tensor) -> torch.Tensor:
            return num_samples_B // 320

        def forward(self, *_: Any) -> Any:
            raise NotImplementedError

    save_teacher(tmp_path / "teacher")
    teacher = Wrapped()
    teacher.select_layers([2])
    before = weight_digests(teacher)
    with torch.no_grad():
        teacher.model.encoder.layers[3].final_layer_norm.bias += 1
    after = weight_digests(teacher)
    assert before[2] == before[4]
    assert before[2] != after[2]


def test_a_checkpoint_knows_a_teacher_by_its_weights(tmp_path: Path) -> None:
    for name, width in (("one", 16), ("same", 16), ("wider", 32)):
        save_teacher(tmp_path / name, width=width)
    one, same, wider = (HuggingFaceTeacher(str(tmp_path / name)) for name in ("one", "same", "wider"))
    assert teacher_digest(one) == teacher_digest(same) != teacher_digest(wider)
    with torch.no_grad():
        same.model.encoder.layers[0].attention.q_proj.weight.mul_(1.5)
    assert teacher_digest(one) != teacher_digest(same)
