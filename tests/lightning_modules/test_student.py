"""Student: sizes, hidden states, growth, loading at any depth."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import HubertConfig, HubertModel

from datamodules.errors import InputError
from lightning_modules.front_end import FrontEnd
from lightning_modules.growth.layers import state_dict_depth
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig

TINY = StudentConfig(hidden_size=32, intermediate_size=48, num_heads=2, num_layers=6, front_end_init="random")


@pytest.fixture(scope="module")
def front_end() -> FrontEnd:
    """A narrow front end with HuBERT Base's strides; 512 channels are slow on a CPU."""
    layout = {"conv_dim": [8] * 7, "feat_extract_norm": "group", "conv_bias": False}
    model = HubertModel(HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **layout))
    return FrontEnd(layout, model.feature_extractor.state_dict())


@pytest.fixture
def student(front_end: FrontEnd) -> Student:
    torch.manual_seed(0)
    config = copy.copy(TINY)
    config.front_end_init = "teacher"
    return Student(config, front_end)


def parameters(depth: int, **settings: Any) -> int:
    """Parameters of the paper's student at ``depth``, counted without allocating them."""
    with torch.device("meta"):
        student = Student(StudentConfig(num_layers=depth, front_end_init="random", **settings))
    return sum(parameter.numel() for parameter in student.hubert.parameters())


@pytest.mark.parametrize(("depth", "count"), [(3, 10_902_784), (6, 16_226_176), (9, 21_549_568), (12, 26_872_960)])
def test_parameter_counts_are_the_papers(depth: int, count: int) -> None:
    assert parameters(depth) == count
    assert parameters(depth, mask_time_prob=0.05) == count + 384  # the mask embedding


def test_a_drawn_front_end_has_the_channels_that_it_is_told() -> None:
    narrow = Student(dataclasses.replace(TINY, conv_channels=8))
    assert [tuple(layer.conv.weight.shape[:2]) for layer in narrow.hubert.feature_extractor.conv_layers] == [
        *((8, 1), (8, 8), (8, 8), (8, 8), (8, 8), (8, 8), (8, 8)),
    ]
    assert narrow.hubert.config.conv_stride == Student(TINY).hubert.config.conv_stride
    assert narrow(torch.randn(1, 4000))[-1].shape == (1, 12, 32)
    # Convolutions (kernels 10, 3, 3, 3, 3, 2, 2), the first one's norm, and the norm and matrix of the projection.
    removed = sum(k * (512 * (512 if i else 1) - 8 * (8 if i else 1)) for i, k in enumerate((10, 3, 3, 3, 3, 2, 2)))
    removed += (512 - 8) * (2 + 2 + 384)
    assert parameters(3) - parameters(3, conv_channels=8) == removed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"front_end_init": "teacher", "conv_channels": 8}, "conv_channels=8, but .*front_end_init=teacher copies"),
        ({"front_end_init": "random", "conv_channels": 0}, "conv_channels=0 must be at least 1"),
    ],
)
def test_channels_that_cannot_be_are_refused(settings: dict[str, Any], message: str, front_end: FrontEnd) -> None:
    with pytest.raises(ValueError, match=message):
        Student(dataclasses.replace(TINY, **settings), front_end)


@pytest.mark.parametrize(
    ("settings", "attention", "hidden", "activation"),
    [
        ({}, 0.2, 0.2, 0.2),
        ({"attention_dropout": 0.0}, 0.0, 0.2, 0.2),
        ({"hidden_dropout": 0.3, "activation_dropout": 0.4}, 0.2, 0.3, 0.4),
    ],
)
def test_each_place_has_its_rate_of_dropout(
    settings: dict[str, float], attention: float, hidden: float, activation: float
) -> None:
    student = Student(dataclasses.replace(TINY, dropout=0.2, **settings))
    layer = student.hubert.encoder.layers[-1]
    assert layer.attention.dropout == attention
    assert [student.hubert.encoder.dropout.p, layer.dropout.p, layer.feed_forward.output_dropout.p] == [hidden] * 3
    assert layer.feed_forward.intermediate_dropout.p == activation


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "hidden_dropout", "activation_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_of_dropout_that_cannot_be_is_refused(name: str, rate: float) -> None:
    with pytest.raises(InputError, match=f"model.student.{name}={rate} must be at least 0 and below 1"):
        Student(dataclasses.replace(TINY, **{name: rate}))


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_equal_hugging_face(student: Student, padded: bool) -> None:
    student.eval()
    waveforms = torch.randn(3, 4000)
    num_samples = torch.tensor([4000, 2500, 3999]) if padded else None
    mask = None
    if num_samples is not None:
        mask = (torch.arange(4000) < num_samples.unsqueeze(1)).long()
    with torch.no_grad():
        ours = student(waveforms, num_samples)
        theirs = student.hubert(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == student.depth + 1
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    if padded:  # control: the mask matters
        assert not torch.allclose(student(waveforms)[-1], ours[-1], atol=1e-3)


def test_front_end_is_copied_or_drawn(student: Student, front_end: FrontEnd) -> None:
    for name, value in student.hubert.feature_extractor.state_dict().items():
        assert torch.equal(value, front_end.state_dict[name])
    with pytest.raises(ValueError, match="front_end_init=random"):
        Student(StudentConfig(), None)


def test_frozen_front_end_has_no_backward_pass(front_end: FrontEnd) -> None:
    config = StudentConfig(32, 48, 2, 2, front_end="frozen")
    student = Student(config, front_end).train()
    features = student.hubert.feature_extractor(torch.randn(1, 4000))
    assert not features.requires_grad
    student(torch.randn(1, 4000))[-1].sum().backward()
    assert all(p.grad is None for p in student.hubert.feature_extractor.parameters())
    trained = Student(StudentConfig(32, 48, 2, 2), front_end).train()  # control
    assert trained.hubert.feature_extractor(torch.randn(1, 4000)).requires_grad


def test_grow_keeps_modules_and_copies_the_rest(student: Student) -> None:
    student.start_at(3)
    old = list(student.hubert.encoder.layers)
    sources = student.grow([0, 1, 1, 2, 2, 0])
    new = list(student.hubert.encoder.layers)
    assert [new[0], new[1], new[3]] == old
    assert student.depth == student.hubert.config.num_hidden_layers == 6
    for parameter, source in sources.items():
        assert source is not None
        assert torch.equal(parameter, source)
        assert parameter.data_ptr() != source.data_ptr()  # no shared storage
    assert all(layer.attention.config is student.hubert.config for layer in new)
    hidden_states = student(torch.randn(1, 4000))
    assert len(hidden_states) == 7
    hidden_states[-1].sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_lineage_through_two_growths(student: Student) -> None:
    student.start_at(2)
    student.grow([0, 0, 1, 1])
    student.grow([0, 1, 1, 2, 3, 3])
    assert student.ancestry == [0, 0, 0, 1, 1, 1]
    assert student.originals == [0, 3]


def test_zero_output_layers_pass_their_input_through_the_norms_only(student: Student) -> None:
    student.start_at(3)
    sources = student.grow([0, 0, 1, 1, 2, 2], "zero_output")
    clone = student.hubert.encoder.layers[1]
    assert not clone.attention.out_proj.weight.any()
    assert not clone.feed_forward.output_dense.weight.any()
    assert sources[clone.attention.out_proj.weight] is None  # no optimizer state to copy from
    assert sources[clone.attention.q_proj.weight] is not None
    assert student.hubert.encoder.layers[0].attention.out_proj.weight.any()  # the original is untouched


def test_fresh_layers_depend_on_seed_and_depth_only(student: Student) -> None:
    student.start_at(3)
    twin, other = copy.deepcopy(student), copy.deepcopy(student)
    torch.manual_seed(1)
    student.grow([0, 1, 2, None, None], "fresh", seed=7)
    torch.manual_seed(2)  # the global generator plays no part
    twin.grow([0, 1, 2, None, None], "fresh", seed=7)
    other.grow([0, 1, 2, None, None], "fresh", seed=8)

    def weight(model: Student, layer: int) -> torch.Tensor:
        return model.hubert.encoder.layers[layer].attention.q_proj.weight

    assert torch.equal(weight(student, 3), weight(twin, 3))
    assert not torch.equal(weight(student, 3), weight(other, 3))
    assert not torch.equal(weight(student, 3), weight(student, 4))
    assert student.ancestry == [0, 1, 2, None, None]


@pytest.mark.parametrize(("saved", "built"), [(2, 6), (6, 2), (3, 3)])
def test_loads_a_state_dict_of_any_depth(front_end: FrontEnd, saved: int, built: int) -> None:
    shallow = Student(StudentConfig(32, 48, 2, saved), front_end)
    deep = Student(StudentConfig(32, 48, 2, built), front_end)
    state = shallow.state_dict()
    assert state_dict_depth(state, "hubert.") == saved
    deep.load_state_dict(state)
    assert deep.depth == deep.hubert.config.num_hidden_layers == saved
    assert all(torch.equal(value, state[name]) for name, value in deep.hubert.state_dict(prefix="hubert.").items())


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=30 is not a multiple of model\.student\.num_heads=4"):
        Student(StudentConfig(hidden_size=30, num_heads=4, front_end_init="random"))


def test_a_batch_that_is_shorter_than_a_mask_has_none() -> None:
    config = dataclasses.replace(TINY, conv_channels=8, dropout=0.0, mask_time_prob=0.6, mask_time_length=10)
    student = Student(config)
    for samples, frames in ((1000, 2), (3600, 11)):
        waveforms_BT = torch.randn(2, samples)
        masked_BFD, whole_BFD = student.train()(waveforms_BT)[0], student.eval()(waveforms_BT)[0]
        assert masked_BFD.shape[1] == frames
        assert torch.equal(masked_BFD, whole_BFD) == (frames < 10)
        student.zero_grad()
        masked_BFD.sum().backward()
        assert student.hubert.masked_spec_embed.grad is not None  # for which DDP waits in every step
