"""The front end with channels last is the front end: values, gradients, names; and refuses what it does not know."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from lightning_modules.kernels import halving_convolution, install
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_teacher
from tests.lightning_modules.graphs import TORCH_WARNINGS, Graphs

LAYOUTS: dict[str, dict[str, Any]] = {
    "group norm": {"feat_extract_norm": "group", "conv_bias": False},
    "layer norm and bias": {"feat_extract_norm": "layer", "conv_bias": True},
}
# Largest relative L2 error of features and of any weight's gradient against the plain path in float32. bf16 rounds at
# other places than the plain path: the bound is what the plain path in bf16 errs by, and a half more.
FLOAT32 = 1e-5


def front_ends(layout: dict[str, Any], trained: bool = True) -> tuple[nn.Module, nn.Module]:
    """The same random front end, plain and with channels last."""
    torch.manual_seed(0)
    plain = HubertFeatureEncoder(HubertConfig(conv_dim=[16] * 7, **layout)).train(trained)
    plain._requires_grad = False
    for parameter in plain.parameters():
        if parameter.ndim == 1:  # norms and biases that do something
            nn.init.normal_(parameter, 1.0, 0.3)
    fast = copy.deepcopy(plain)
    install(fast, "channels_last")
    return plain, fast


def step(front_end: nn.Module, waveforms_BT: Tensor, bf16: bool = False) -> list[Tensor]:
    """Features, then the gradients of all weights."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features_BCF = front_end(waveforms_BT)
    torch.manual_seed(1)
    features_BCF.float().mul(torch.randn(features_BCF.shape)).sum().backward()
    gradients = [parameter.grad for parameter in front_end.parameters()]
    front_end.zero_grad()
    return [features_BCF.detach().float(), *gradients]


def error(values: list[Tensor], references: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(values, references, strict=True))


@pytest.mark.parametrize("samples", [400, 1040, 8000, 8001, 8159, 8160, 9999])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_the_plain_path(layout: str, samples: int) -> None:
    plain, fast = front_ends(LAYOUTS[layout])
    waveforms_BT = torch.randn(3, samples)
    exact = step(plain, waveforms_BT)
    assert error(step(fast, waveforms_BT), exact) < FLOAT32
    assert error(step(fast, waveforms_BT, bf16=True), exact) < 1.5 * error(step(plain, waveforms_BT, bf16=True), exact)
    with torch.no_grad():  # control: one tap of one kernel
        fast.conv_layers[3].conv.weight[:, :, -1] *= 1.01
    assert error(step(fast, waveforms_BT), exact) > 10 * FLOAT32


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("samples", [3, 8, 9, 11])
def test_the_backward_that_was_written_by_hand(kernel: int, samples: int) -> None:
    hidden_BTC = torch.randn(2, samples, 3, dtype=torch.float64, requires_grad=True)
    weight_OCK = torch.randn(4, 3, kernel, dtype=torch.float64, requires_grad=True)
    expected_BON = nn.functional.conv1d(hidden_BTC.transpose(1, 2), weight_OCK, stride=2)
    output_BNO = halving_convolution(hidden_BTC, weight_OCK)
    assert torch.allclose(output_BNO.transpose(1, 2), expected_BON)
    assert torch.autograd.gradcheck(halving_convolution, (hidden_BTC, weight_OCK))
    frozen = halving_convolution(hidden_BTC, weight_OCK.detach())
    frozen.sum().backward()
    assert weight_OCK.grad is None
    assert hidden_BTC.grad is not None


def test_nothing_of_a_model_changes_but_how_it_computes() -> None:
    plain, fast = (
        Student(StudentConfig(16, 24, 2, 2, front_end_init="random", kernels=k)) for k in ("plain", "channels_last")
    )
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert isinstance(fast.hubert.feature_extractor, HubertFeatureEncoder)
    twin = copy.deepcopy(fast)
    twin.load_state_dict(plain.state_dict())
    waveforms_BT = torch.randn(1, 8000)
    assert torch.allclose(twin.eval()(waveforms_BT)[-1], plain.eval()(waveforms_BT)[-1], atol=1e-5)


def test_a_frozen_front_end_computes_no_gradient() -> None:
    student = Student(
        StudentConfig(16, 24, 2, 1, front_end="frozen", front_end_init="random", kernels="channels_last")
    ).train()
    assert not student.hubert.feature_extractor(torch.randn(1, 8000)).requires_grad


@pytest.mark.parametrize("samples", [8000, 8123])
def test_teachers_say_the_same(samples: int, tmp_path: Any) -> None:
    plain, fast = (HuggingFaceTeacher(str(save_teacher(tmp_path)), kernels=k) for k in ("plain", "channels_last"))
    waveforms_BT, num_samples_B = torch.randn(2, samples), torch.tensor([samples, 6000])
    for lengths_B in (None, num_samples_B):
        expected, found = plain(waveforms_BT, lengths_B).output_BFD, fast(waveforms_BT, lengths_B).output_BFD
        assert error([found], [expected]) < FLOAT32
    assert error([fast(waveforms_BT.flip(0)).output_BFD], [plain(waveforms_BT).output_BFD]) > 100 * FLOAT32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_stride": [5, 2, 2, 3, 2, 2, 2]}, "a kernel of 3 and stride of 3 in layer 3"),
        ({"conv_kernel": [10, 3, 3, 3, 3, 5, 2]}, "a kernel of 5 and stride of 2 in layer 5"),
    ],
)
def test_other_convolutions_are_refused_or_left_alone(change: dict[str, Any], said: str) -> None:
    extractor = HubertFeatureEncoder(HubertConfig(conv_dim=[8] * 7, **change))
    with pytest.raises(ValueError, match=f"{said}: set model.student.kernels=plain"):
        install(extractor, "channels_last")
    for kernels in ("auto", "plain"):
        install(extractor, kernels)
        assert type(extractor) is HubertFeatureEncoder
    with pytest.raises(ValueError, match="no conv_layers"):
        install(nn.Linear(2, 2), "channels_last")


@pytest.mark.ci
@pytest.mark.filterwarnings(*[mark.args[0] for mark in TORCH_WARNINGS])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_compiles_into_one_graph(bf16: bool, graphs: Graphs) -> None:
    _, fast = front_ends(LAYOUTS["group norm"])
    waveforms_BT = torch.randn(2, 8000)
    eager = step(fast, waveforms_BT, bf16)
    fast.compile(backend="counting", dynamic=True)
    assert error(step(fast, waveforms_BT, bf16), eager) < (0.02 if bf16 else FLOAT32)
    step(fast, torch.randn(2, 9001), bf16)
    assert graphs.count == 1
    assert not counters["graph_break"]


def test_auto_is_plain_where_nothing_else_was_measured_to_be_faster() -> None:
    extractor = HubertFeatureEncoder(HubertConfig(conv_dim=[8] * 7))
    install(extractor, "auto")
    assert type(extractor) is HubertFeatureEncoder
    install(extractor, "channels_last")
    assert type(extractor) is not HubertFeatureEncoder
