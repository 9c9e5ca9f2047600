"""The graph that exporters follow returns the states of the encoder that it was made of."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.deployment.encoder import States, cut, deployed
from lightning_modules.superb.upstream import LoadedEncoder
from lightning_modules.teacher import HuggingFaceTeacher, Teacher, TeacherTargets, normalize_waveforms
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import save_whisper
from tests.lightning_modules.teachers import FAMILIES, LAYERS, PADDED, waveforms
from tests.lightning_modules.test_export import tiny_hubert

WHOLE = torch.tensor([8000, 8000])


def states_of(teacher: Teacher, waveforms_BT: Tensor, num_samples_B: Tensor) -> list[Tensor]:
    """The states that heads are trained on, of a batch whose padding is silent."""
    past_BT = torch.arange(waveforms_BT.shape[1]) >= num_samples_B[:, None]
    waveforms_BT = waveforms_BT.masked_fill(past_BT, 0.0)
    if teacher.normalize:
        waveforms_BT = normalize_waveforms(waveforms_BT, num_samples_B)
    with torch.no_grad():
        return teacher.all_states(waveforms_BT, num_samples_B)


def assert_equal_states(teacher: Teacher, num_samples_B: Tensor) -> None:
    wanted = torch.stack(states_of(teacher, waveforms(), num_samples_B))
    everything, num_frames = deployed(teacher, "all")(waveforms(), num_samples_B)
    last, _ = deployed(teacher, "last")(waveforms(), num_samples_B)
    assert num_frames.tolist() == teacher.num_frames(num_samples_B).tolist()
    assert everything.shape == wanted.shape
    tolerance = 1e-5 * float(wanted.abs().max())
    for item, frames in enumerate(num_frames.tolist()):
        torch.testing.assert_close(everything[:, item, :frames], wanted[:, item, :frames], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(last, everything[-1], atol=tolerance, rtol=1e-5)
    # The check can fail: each state differs from the next one by far more.
    assert all((one - other).abs().max() > 100 * tolerance for one, other in pairwise(wanted))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("num_samples_B", [WHOLE, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, normalize: bool, num_samples_B: Tensor, folders: dict[str, Path]) -> None:
    assert_equal_states(HuggingFaceTeacher(str(folders[family]), normalize), num_samples_B)


@pytest.mark.parametrize("num_samples_B", [WHOLE, PADDED], ids=["whole", "padded"])
def test_whisper(num_samples_B: Tensor, tmp_path: Path) -> None:
    assert_equal_states(WhisperTeacher(str(save_whisper(tmp_path))), num_samples_B)


def test_samples_after_the_end_are_not_used(tmp_path: Path) -> None:
    for teacher in (LoadedEncoder(tiny_hubert(2), normalize=True), WhisperTeacher(str(save_whisper(tmp_path)))):
        graph, loud = deployed(teacher), waveforms()
        loud[1, PADDED[1] :] = 100.0
        assert torch.equal(graph(waveforms(), PADDED)[0], graph(loud, PADDED)[0])
        assert not torch.equal(graph(waveforms(), WHOLE)[0], graph(loud, WHOLE)[0])


@pytest.mark.parametrize("states", ["last", "all"])
def test_the_encoder_itself_does_not_change(states: States) -> None:
    teacher = LoadedEncoder(tiny_hubert(3), normalize=False)
    before, names = states_of(teacher, waveforms(), PADDED), list(teacher.state_dict())
    graph = deployed(teacher, states)
    assert graph.num_layers == 3
    cut(graph.teacher, 2)
    assert teacher.num_layers == len(teacher.model.encoder.layers) == 3
    assert list(teacher.state_dict()) == names
    after = states_of(teacher, waveforms(), PADDED)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_cut_to_its_first_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    """A state of the cut encoder is that of the whole one; encoders with a final norm apply it to the last."""
    for teacher in (
        HuggingFaceTeacher(str(folders["hubert"])),
        WhisperTeacher(str(save_whisper(tmp_path, layers=LAYERS))),
    ):
        whole, _ = deployed(teacher, "all")(waveforms(), PADDED)
        cut(teacher, 2)
        short, _ = deployed(teacher, "all")(waveforms(), PADDED)
        assert len(short) == 3
        assert torch.equal(short[:2], whole[:2])
        assert torch.allclose(short[2], whole[2], atol=1e-5) == isinstance(teacher, HuggingFaceTeacher)


def test_refusals(tmp_path: Path) -> None:
    teacher = LoadedEncoder(tiny_hubert(2), normalize=False)
    for layers in (0, -1, 3):
        with pytest.raises(ValueError, match=f"layers={layers}, but the encoder has 2: choose from 1 to 2"):
            cut(teacher, layers)
    with pytest.raises(ValueError, match="Own cannot be cut: leave out --layers"):
        cut(Own(), 1)
    with pytest.raises(ValueError, match="Own has no graph for ONNX: give a student"):
        deployed(Own())
    padding = WhisperTeacher(str(save_whisper(tmp_path)), pad_to_30_seconds=True)
    with pytest.raises(ValueError, match="pad_to_30_seconds=true has no graph"):
        deployed(padding)


class Own(Teacher):
    """A user's own encoder."""

    sample_rate, num_layers, hidden_size = 16_000, 1, 4
    init_args: dict[str, Any] = {}

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return num_samples_B // 320

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        raise NotImplementedError
