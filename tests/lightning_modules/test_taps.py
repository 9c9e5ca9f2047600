"""Targets that are no layer's output: the input of the first layer, and outputs of feed-forward blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, Wav2Vec2ConformerConfig

from lightning_modules.objective import ObjectiveConfig
from lightning_modules.teacher import HuggingFaceTeacher
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import save_whisper
from tests.lightning_modules.teachers import FAMILIES, PADDED, TINY, far, padded_waveforms, save_model, waveforms
from tests.lightning_modules.test_teacher import ConvNetTeacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    families = {family: save_model(home / family, config()) for family, config in FAMILIES.items()}
    return families | {"whisper": save_whisper(home / "whisper")}


def make(folders: dict[str, Path], family: str, **settings: Any) -> Any:
    kind = WhisperTeacher if family == "whisper" else HuggingFaceTeacher
    return kind(str(folders[family]), **settings)


def inputs(padded: bool) -> tuple[Tensor, Tensor | None]:
    return (padded_waveforms(), PADDED) if padded else (waveforms(), None)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_0_is_the_input_of_the_first_layer(family: str, padded: bool, folders: dict[str, Path]) -> None:
    teacher, (waves_BT, lengths_B) = make(folders, family), inputs(padded)
    mask_BT = None if lengths_B is None else (torch.arange(8000) < lengths_B[:, None]).long()
    with torch.no_grad():
        whole = AutoModel.from_pretrained(folders[family]).eval()
        states = whole(waves_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    teacher.select_layers([0, 1, 2], None)
    targets = teacher(waves_BT, lengths_B)
    assert list(targets.hidden) == [0, 1, 2]
    for layer, hidden_BFD in targets.hidden.items():
        torch.testing.assert_close(hidden_BFD, states[layer])
    assert far(targets.hidden[0], targets.hidden[1])
    teacher.select_layers([0], 1)
    torch.testing.assert_close(teacher(waves_BT, lengths_B).hidden[0], states[0])


def test_layer_0_of_whisper(folders: dict[str, Path]) -> None:
    teacher = make(folders, "whisper")
    teacher.select_layers([0], 2)
    hidden_BFD = teacher(waveforms()).hidden[0]
    features_BCM = teacher.log_mel(waveforms(), 2 * hidden_BFD.shape[1], None)
    with torch.no_grad():
        encoder = teacher.model
        convolved_BDF = torch.nn.functional.gelu(encoder.conv1(features_BCM))
        expected_BFD = torch.nn.functional.gelu(encoder.conv2(convolved_BDF)).mT
        expected_BFD = expected_BFD + encoder.embed_positions.weight[: expected_BFD.shape[1]]
    torch.testing.assert_close(hidden_BFD, expected_BFD)


class BeforeTheSum(torch.nn.Module):
    """A feed-forward block that leaves its output in ``seen``, put in the place of one in a whole model."""

    def __init__(self, block: torch.nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, hidden_BFD: Tensor) -> Tensor:
        self.seen.append(self.block(hidden_BFD))
        return self.seen[-1]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "whisper"])
def test_outputs_of_feed_forward_blocks(family: str, padded: bool, folders: dict[str, Path]) -> None:
    teacher, hidden = make(folders, family), make(folders, family)
    teacher.use_feed_forward()
    waves_BT, lengths_B = inputs(padded)
    whole, seen = make(folders, family), []
    name = "fc2" if family == "whisper" else "feed_forward"
    for layer in whole.encoder.layers:
        setattr(layer, name, BeforeTheSum(getattr(layer, name), seen))
    whole(waves_BT, lengths_B)
    for each in (teacher, hidden):
        each.select_layers([1, 2], 3)
    targets, states = teacher(waves_BT, lengths_B), hidden(waves_BT, lengths_B)
    for layer, hidden_BFD in targets.hidden.items():
        torch.testing.assert_close(hidden_BFD, seen[layer - 1])
        assert far(hidden_BFD, states.hidden[layer])
    torch.testing.assert_close(targets.output_BFD, seen[2])  # no final norm
    assert teacher.settings == hidden.settings | {"teacher.targets": "feed_forward"}
    assert set(teacher.state_dict()) == set(hidden.state_dict())  # the taps are gone


@pytest.mark.ci
@pytest.mark.parametrize("family", ["hubert", "whisper"])
def test_a_compiled_teacher_gives_the_same_outputs(family: str, folders: dict[str, Path]) -> None:
    eager = make(folders, family)
    compiled = make(folders, family, compile=True, compile_backend="aot_eager")
    for teacher in (eager, compiled):
        teacher.use_feed_forward()
        teacher.select_layers([1], None)
    expected, found = eager(waveforms()).named(), compiled(waveforms()).named()
    for name, target_BFD in expected.items():
        torch.testing.assert_close(found[name], target_BFD, atol=1e-4, rtol=1e-4)
    attention = "self_attn" if family == "whisper" else "attention"
    assert all(getattr(layer, attention)._compiled_call_impl is not None for layer in compiled.encoder.layers)


def test_what_cannot_give_them_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = Wav2Vec2ConformerConfig(**TINY, num_conv_pos_embeddings=16)  # two feed-forward blocks in each layer
    for teacher in (HuggingFaceTeacher(str(save_model(tmp_path, config))), ConvNetTeacher()):
        with pytest.raises(ValueError, match=r"targets=feed_forward, but \w+ does not hand out the outputs of"):
            teacher.use_feed_forward()
        assert not teacher.feed_forward
    with pytest.raises(ValueError, match=r"layers=\[0, 1\] and model\.objective\.targets=feed_forward: layer 0"):
        ObjectiveConfig(targets="feed_forward", layers=[0, 1])
