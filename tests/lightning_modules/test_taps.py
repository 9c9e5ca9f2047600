"""Targets that are no layer's output: the input of the first layer, and outputs of feed-forward blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from lightning_modules.teacher import HuggingFaceTeacher
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import save_whisper
from tests.lightning_modules.teachers import FAMILIES, PADDED, far, padded_waveforms, save_model, waveforms


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
