"""Front ends: what a student can copy of a teacher's, and what its backward pass computes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from lightning_modules.front_end import FrontEnd, copyable_front_end
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.lightning_modules.teachers import FAMILIES, TINY, waveforms


@pytest.mark.parametrize("family", FAMILIES)
def test_front_end_loads_into_a_hubert(family: str, folders: dict[str, Path]) -> None:
    teacher = HuggingFaceTeacher(str(folders[family]))
    assert teacher.front_end is not None
    config = HubertConfig(**(TINY | teacher.front_end.config))
    assert json.loads(json.dumps(teacher.front_end.config)) == teacher.front_end.config, "plain values only"
    hubert = HubertModel(config).eval()
    fresh_BCF = hubert.feature_extractor(waveforms())
    hubert.feature_extractor.load_state_dict(teacher.front_end.state_dict, strict=True)
    features_BCF = hubert.feature_extractor(waveforms())
    expected_BCF = teacher.model.feature_extractor(waveforms())
    assert torch.equal(features_BCF, expected_BCF)
    assert not torch.allclose(fresh_BCF, expected_BCF, atol=1e-2)


def test_front_end_with_other_outputs_is_not_copied(folders: dict[str, Path]) -> None:
    teacher = HuggingFaceTeacher(str(folders["hubert"]))
    extractor = copy.deepcopy(teacher.model.feature_extractor)
    assert copyable_front_end(extractor, teacher.model.config) is not None
    extractor.conv_layers[1].activation = nn.Identity()  # same weights, other computation
    assert copyable_front_end(extractor, teacher.model.config) is None
    extractor.conv_layers[1].conv = nn.Conv1d(8, 8, 3, 2, bias=True)  # other weights
    assert copyable_front_end(extractor, teacher.model.config) is None


class InputGradients(TorchDispatchMode):
    """For each backward of a convolution whether it makes the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            self.made.append(args[-1][0])
        return function(*args, **(kwargs or {}))


def backward(student: Student, waveform_gradient: bool) -> tuple[Tensor, list[Tensor], list[bool]]:
    """Output, gradients of all parameters, and which input gradients were made (last convolution first)."""
    student.zero_grad()
    student.hubert.feature_extractor._requires_grad = waveform_gradient
    with InputGradients() as made:
        output_BFD = student(waveforms())[-1]
        output_BFD.square().mean().backward()
    return output_BFD, [parameter.grad.clone() for parameter in student.parameters()], made.made


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_no_gradient_to_the_waveform_and_all_others_bit_for_bit(norm: str) -> None:
    layout = {"conv_dim": [8] * 7, "feat_extract_norm": norm, "conv_bias": False}
    weights = HubertFeatureEncoder(HubertConfig(**layout)).state_dict()
    student = Student(StudentConfig(32, 48, 2, 1, dropout=0.0), FrontEnd(layout, weights)).train()
    assert student.hubert.feature_extractor._requires_grad is False
    output, gradients, made = backward(student, waveform_gradient=False)
    theirs, their_gradients, all_made = backward(student, waveform_gradient=True)
    assert torch.equal(output, theirs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, their_gradients, strict=True))
    assert made == [True] * 6 + [False]  # on a CPU the positional convolution is none of torch's
    assert all_made == [True] * 7  # control: what Hugging Face would have it
