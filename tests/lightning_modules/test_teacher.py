"""Teachers against the untruncated Hugging Face models that they are loaded from."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    HubertConfig,
    HubertForCTC,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
)

from lightning_modules.teacher import (
    HuggingFaceTeacher,
    Teacher,
    TeacherTargets,
    normalize_waveforms,
)
from lightning_modules.teacher_building import build_teacher
from tests.lightning_modules.teachers import (
    FAMILIES,
    LAYERS,
    PADDED,
    STABLE_FAMILIES,
    TINY,
    WIDTH,
    far,
    padded_waveforms,
    save_model,
    waveforms,
)


def reference(folder: Path, waveforms_BT: Tensor, num_samples_B: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Hidden states and last hidden state of the whole model, as Hugging Face gives them."""
    model: PreTrainedModel = AutoModel.from_pretrained(folder).eval()
    mask_BT = None
    if num_samples_B is not None:
        mask_BT = (torch.arange(waveforms_BT.shape[1]) < num_samples_B[:, None]).long()
    with torch.no_grad():
        outputs = model(waveforms_BT, attention_mask=mask_BT, output_hidden_states=True)
    assert len(outputs.hidden_states) == LAYERS + 1
    return list(outputs.hidden_states), outputs.last_hidden_state


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("lengths", [None, PADDED], ids=["no_mask", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
class TestTargetsOfFamilies:
    def test_whole_model(self, family: str, lengths: Tensor | None, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders[family]))
        inputs_BT = waveforms() if lengths is None else padded_waveforms()
        hidden_states, last_BFD = reference(folders[family], inputs_BT, lengths)
        teacher.select_layers([4, 2], None)
        targets = teacher(inputs_BT, lengths)
        torch.testing.assert_close(targets.output_BFD, last_BFD)
        assert list(targets.hidden) == [2, 4]
        for layer, hidden_BFD in targets.hidden.items():
            torch.testing.assert_close(hidden_BFD, hidden_states[layer])
            assert far(hidden_BFD, hidden_states[layer - 1]), "another layer must not pass for this one"
            assert far(hidden_BFD, hidden_states[layer + 1])

    def test_truncated(self, family: str, lengths: Tensor | None, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders[family]))
        inputs_BT = waveforms() if lengths is None else padded_waveforms()
        hidden_states, _ = reference(folders[family], inputs_BT, lengths)
        teacher.select_layers([1, 3], 3)
        assert len(teacher.model.encoder.layers) == 3
        assert teacher.num_layers == LAYERS
        targets = teacher(inputs_BT, lengths)
        for layer in (1, 3):
            torch.testing.assert_close(targets.hidden[layer], hidden_states[layer])
        expected_BFD = hidden_states[3]
        if family in STABLE_FAMILIES:
            norm = AutoModel.from_pretrained(folders[family]).encoder.layer_norm
            expected_BFD = norm(expected_BFD).detach()
            assert far(expected_BFD, hidden_states[3]), "raw and normed output must differ for this to show anything"
        torch.testing.assert_close(targets.output_BFD, expected_BFD)

    def test_last_layer_is_also_a_hidden_target(
        self, family: str, lengths: Tensor | None, folders: dict[str, Path]
    ) -> None:
        teacher = HuggingFaceTeacher(str(folders[family]))
        teacher.select_layers([LAYERS], LAYERS)
        inputs_BT = waveforms() if lengths is None else padded_waveforms()
        targets = teacher(inputs_BT, lengths)
        _, last_BFD = reference(folders[family], inputs_BT, lengths)
        torch.testing.assert_close(targets.output_BFD, last_BFD)
        assert far(targets.hidden[LAYERS], targets.output_BFD) == (family in STABLE_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_num_frames(family: str, folders: dict[str, Path]) -> None:
    teacher = HuggingFaceTeacher(str(folders[family]))
    lengths = torch.tensor([100, 399, 400, 719, 720, 8000, 250_000])
    assert teacher.num_frames(lengths).tolist() == [0, 0, 1, 1, 2, 24, 781]
    assert teacher.num_frames(lengths).dtype == torch.int64
    assert teacher(waveforms()).output_BFD.shape == (2, 24, WIDTH)


def test_no_mask_is_made_where_nothing_is_padded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = HuggingFaceTeacher(str(folders["hubert"]))
    masks: list[Tensor | None] = []
    forward = teacher.model.forward

    def spy(inputs: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return forward(inputs, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(teacher.model, "forward", spy)
    full = teacher(waveforms(), torch.tensor([8000, 8000]))
    unmasked = teacher(waveforms())
    teacher(padded_waveforms(), PADDED)
    assert masks[:2] == [None, None]
    assert masks[2] is not None
    assert masks[2].sum(1).tolist() == PADDED.tolist()
    assert torch.equal(full.output_BFD, unmasked.output_BFD)


def test_head_checkpoint_loads_as_its_encoder(tmp_path: Path) -> None:
    config = FAMILIES["hubert"]()
    save_model(tmp_path, config, HubertForCTC)
    encoder = HubertForCTC.from_pretrained(tmp_path).hubert.eval()
    teacher = HuggingFaceTeacher(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(teacher(waveforms()).output_BFD, encoder(waveforms()).last_hidden_state)


def test_convolutional_adapter_does_not_shorten_the_frames(tmp_path: Path) -> None:
    save_model(tmp_path, Wav2Vec2Config(**TINY, num_conv_pos_embeddings=16, add_adapter=True))
    targets = HuggingFaceTeacher(str(tmp_path))(waveforms())
    hidden_states, last_BFD = reference(tmp_path, waveforms(), None)
    torch.testing.assert_close(targets.output_BFD, hidden_states[LAYERS])
    assert last_BFD.shape[1] < targets.output_BFD.shape[1]


def test_attention_implementation_is_passed_on(folders: dict[str, Path]) -> None:
    eager = HuggingFaceTeacher(str(folders["hubert"]), attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    default = HuggingFaceTeacher(str(folders["hubert"]))
    torch.testing.assert_close(eager(waveforms()).output_BFD, default(waveforms()).output_BFD)


class TestFrozen:
    def test_loss_has_gradients_and_the_teacher_none(self, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders["wavlm_large"]))
        teacher.select_layers([2], None)
        targets = teacher(waveforms())
        prediction_BFD = torch.zeros_like(targets.output_BFD, requires_grad=True)
        loss = sum(
            nn.functional.mse_loss(prediction_BFD, target_BFD) for target_BFD in (targets.output_BFD, targets.hidden[2])
        )
        loss.backward()
        assert prediction_BFD.grad is not None
        assert prediction_BFD.grad.abs().sum() > 0
        for target_BFD in (targets.output_BFD, targets.hidden[2]):
            assert not target_BFD.requires_grad
            assert not target_BFD.is_inference()
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_train_changes_nothing(self, tmp_path: Path) -> None:
        config = HubertConfig(**TINY, num_conv_pos_embeddings=16, layerdrop=0.9, hidden_dropout=0.5, mask_time_prob=0.5)
        teacher = HuggingFaceTeacher(str(save_model(tmp_path, config)))
        first = teacher(waveforms()).output_BFD
        assert teacher.train() is teacher
        nn.ModuleList([teacher]).train()
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(waveforms()).output_BFD, first)
        teacher.model.train()  # past the guard: this is what it guards against
        with torch.no_grad():
            assert far(teacher.model(waveforms()).last_hidden_state, first)

    def test_no_hooks_stay_behind_and_copies_work(self, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders["hubert"]))
        expected = teacher(waveforms()).output_BFD
        assert not any(module._forward_hooks for module in teacher.modules())
        assert torch.equal(copy.deepcopy(teacher)(waveforms()).output_BFD, expected)

    def test_loading_leaves_the_random_numbers_alone(self, folders: dict[str, Path]) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        HuggingFaceTeacher(str(folders["hubert"]))
        assert torch.equal(torch.rand(4), expected)


class TestWaveforms:
    def test_waveforms_equal_the_feature_extractors(self) -> None:
        waves_BT = 0.02 * padded_waveforms() + 0.3
        waves_BT[1, 5000:] = 0.0
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        items = [waves_BT[0].numpy(), waves_BT[1, :5000].numpy()]
        expected = extractor(items, sampling_rate=16000, padding=True, return_tensors="pt").input_values
        result_BT = normalize_waveforms(waves_BT, PADDED)
        torch.testing.assert_close(result_BT, expected, atol=2e-5, rtol=1e-4)
        assert torch.count_nonzero(result_BT[1, 5000:]) == 0
        whole_BT = normalize_waveforms(waves_BT)
        torch.testing.assert_close(whole_BT[0], result_BT[0])
        assert far(whole_BT[1, :5000], result_BT[1, :5000]), "padding must not count"

    def test_silence_stays_finite(self) -> None:
        assert torch.count_nonzero(normalize_waveforms(torch.zeros(2, 400), torch.tensor([400, 0]))) == 0


class TestLayers:
    @pytest.mark.parametrize(("hidden", "output"), [([6], None), ([1], 6), ([1], 0), ([-1], 3)])
    def test_layer_out_of_range(self, hidden: list[int], output: int | None, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders["hubert"]))
        with pytest.raises(ValueError, match="out of range: choose layers from 1 to 5"):
            teacher.select_layers(hidden, output)

    def test_dropped_layer(self, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders["hubert"]))
        teacher.select_layers([1], 3)
        with pytest.raises(ValueError, match="layer 4 was dropped when layer 3 became the highest"):
            teacher.select_layers([4], 3)
        assert teacher(waveforms()).hidden.keys() == {1}, "a refused choice changes nothing"
        teacher.select_layers([2], 2)
        assert teacher(waveforms()).hidden.keys() == {2}


def test_norm_after_the_last_layer_is_found_where_no_config_field_tells(tmp_path: Path) -> None:
    """wav2vec 2.0 Conformer ends in a layer norm and has no ``do_stable_layer_norm``."""
    save_model(tmp_path, Wav2Vec2ConformerConfig(**TINY, num_conv_pos_embeddings=16))
    teacher = HuggingFaceTeacher(str(tmp_path))
    teacher.select_layers([LAYERS], None)
    targets = teacher(waveforms())
    _, last_BFD = reference(tmp_path, waveforms(), None)
    torch.testing.assert_close(targets.output_BFD, last_BFD)
    assert far(targets.hidden[LAYERS], last_BFD)


class ConvNetTeacher(Teacher):
    """Not from Hugging Face: three convolutions as layers, one frame per 320 samples."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size = 16000, 3, width
        self.init_args = {"width": width}
        self.stem = nn.Conv1d(1, width, 400, 320)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(3))

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return (torch.div(num_samples_B - 400, 320, rounding_mode="floor") + 1).clamp(min=0)

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        hidden_BDF = self.stem(waveforms_BT.unsqueeze(1))
        outputs = {}
        for number, layer in enumerate(self.layers, start=1):
            hidden_BDF = layer(hidden_BDF).relu()
            outputs[number] = hidden_BDF.transpose(1, 2)
        return TeacherTargets(outputs[self.output_layer], {k: outputs[k] for k in self.hidden_layers})


class NamelessTeacher(ConvNetTeacher):
    """Leaves out an attribute that its users need."""

    def __init__(self) -> None:
        super().__init__()
        del self.sample_rate


class TestBuildTeacher:
    def test_any_encoder_by_class_path(self) -> None:
        teacher = build_teacher({"class_path": f"{__name__}.ConvNetTeacher", "init_args": {"width": 6}})
        assert isinstance(teacher, ConvNetTeacher)
        assert teacher.spec() == {"class_path": f"{__name__}.ConvNetTeacher", "init_args": {"width": 6}}
        assert (teacher.normalize, teacher.front_end) == (False, None)
        teacher.select_layers([1], 2)
        targets = teacher.train()(waveforms())
        assert targets.output_BFD.shape == (2, int(teacher.num_frames(torch.tensor(8000))), 6)
        assert not targets.output_BFD.requires_grad
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert ConvNetTeacher().stem.weight.requires_grad, "it is build_teacher that freezes"
        with pytest.raises(ValueError, match="from 1 to 3"):
            teacher.select_layers([4])
        with pytest.raises(ValueError, match=r"ConvNetTeacher does not give layer 0.*objective\.layers from 1 to 3"):
            teacher.select_layers([0, 1])

    def test_spec_round_trip(self, folders: dict[str, Path]) -> None:
        first = HuggingFaceTeacher(str(folders["wavlm"]), normalize=True)
        spec = json.loads(json.dumps(first.spec()))
        second = build_teacher(spec)
        assert second.spec() == first.spec()
        assert second.normalize
        assert torch.equal(first(waveforms()).output_BFD, second(waveforms()).output_BFD)

    def test_an_instance_is_handed_back(self, folders: dict[str, Path]) -> None:
        teacher = HuggingFaceTeacher(str(folders["hubert"]))
        assert build_teacher(teacher) is teacher

    @pytest.mark.parametrize(
        ("class_path", "message"),
        [
            ("torch.nn.Linear", "'torch.nn.Linear' is not a subclass"),
            ("torch.nn.relu6_", "cannot be imported"),
            ("no_such_package.Teacher", "cannot be imported"),
            ("Teacher", "give package.module.ClassName"),
            (None, "give package.module.ClassName"),
        ],
    )
    def test_what_is_no_teacher(self, class_path: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_teacher({"class_path": class_path})

    def test_missing_attribute(self) -> None:
        with pytest.raises(ValueError, match=r"NamelessTeacher must set self.sample_rate"):
            build_teacher({"class_path": f"{__name__}.NamelessTeacher"})
