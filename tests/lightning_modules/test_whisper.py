"""Whisper as a teacher, against the encoder and the feature extractor of Hugging Face."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModel, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lightning_modules import precision
from lightning_modules.precision import relative_error
from lightning_modules.teacher import HuggingFaceTeacher, TeacherTargets
from lightning_modules.teacher_building import build_teacher
from lightning_modules.teacher_identity import teacher_settings, weight_digests
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import (
    make_data,
    make_module,
    make_stacking,
    make_trainer,
    save_corpus,
    save_whisper,
    some_policies,
    whisper_config,
)
from tests.lightning_modules.graphs import TORCH_WARNINGS, Graphs
from tests.lightning_modules.teachers import far, waveforms

LAYERS = 4
LENGTHS = torch.tensor([16_000, 9_000, 12_345])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


def make(folder: Path, layers: tuple[int, ...] = (1, 2, 3, 4), output: int | None = None, **more: Any) -> Any:
    teacher = WhisperTeacher(str(folder), **more)
    teacher.select_layers(layers, output)
    return teacher


def sound(num_items: int = 1, num_samples: int = 16_000) -> Tensor:
    """Louder and softer noise: one whose log-mel has a floor to reach."""
    envelope_T = torch.linspace(0, 12, num_samples).sin().clamp(min=1e-6)
    return 0.1 * envelope_T * waveforms(num_items, num_samples)


def padded() -> Tensor:
    """Items of ``LENGTHS``, with garbage past their ends."""
    waves_BT = sound(3)
    past_BT = torch.arange(16_000) >= LENGTHS[:, None]
    return waves_BT.where(~past_BT, 5 * waveforms(3, 16_000).flip(0))


@torch.no_grad()
def reference(encoder: Any, features_BCM: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states and last hidden state of Hugging Face's encoder, whose positions end where the features do."""
    encoder, frames = copy.deepcopy(encoder).eval(), features_BCM.shape[-1] // 2
    encoder.config.max_source_positions = frames
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:frames])
    outputs = encoder(features_BCM, output_hidden_states=True)
    return list(outputs.hidden_states), outputs.last_hidden_state


def compare(targets: TeacherTargets, states: list[Tensor], last_BFD: Tensor, tolerance: float = 1e-4) -> None:
    """Every target is that of the reference, and none is another layer's."""
    frames = targets.output_BFD.shape[1]
    assert relative_error(targets.output_BFD, last_BFD[:, :frames]) < tolerance
    for layer, hidden_BFD in targets.hidden.items():
        if layer + 1 < len(states):  # Hugging Face norms its last state
            assert relative_error(hidden_BFD, states[layer][:, :frames]) < tolerance
            assert relative_error(hidden_BFD, states[layer - 1][:, :frames]) > 100 * tolerance
        else:
            assert relative_error(hidden_BFD, last_BFD[:, :frames]) > 100 * tolerance


class TestTargets:
    def test_without_padding_they_are_those_of_the_encoder_with_fewer_positions(self, folder: Path) -> None:
        teacher = make(folder)
        features_BCM = teacher.log_mel(sound(), 98, None)
        compare(teacher(sound()), *reference(AutoModel.from_pretrained(folder).encoder, features_BCM))

    def test_with_padding_they_are_those_of_the_encoder_on_the_extractors_features(self, tmp_path: Path) -> None:
        folder = save_whisper(tmp_path, positions=1500)
        wave_T = torch.cat([torch.zeros(600), sound()[0]])  # nothing where the extractor reflects the audio's start
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        features_BCM = extractor(wave_T[200:].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        encoder = WhisperModel.from_pretrained(folder).encoder.eval()
        with torch.no_grad():
            whole = encoder(features_BCM, output_hidden_states=True)
        targets = make(folder, pad_to_30_seconds=True)(wave_T[None])
        assert targets.output_BFD.shape[1] == (16_600 - 400) // 320 + 1
        compare(targets, list(whole.hidden_states), whole.last_hidden_state)
        unpadded = make(folder)(wave_T[None])  # control
        assert relative_error(unpadded.output_BFD, targets.output_BFD) > 0.01

    def test_frames_are_hubert_s(self, folder: Path) -> None:
        teacher = make(folder)
        lengths_B = torch.tensor([100, 399, 400, 719, 720, 8000, 250_000])
        assert teacher.num_frames(lengths_B).tolist() == [0, 0, 1, 1, 2, 24, 781]
        assert teacher.num_frames(lengths_B).dtype == torch.int64
        assert teacher(sound()).output_BFD.shape == (1, 49, 16)
        assert teacher(sound(num_samples=400)).output_BFD.shape == (1, 1, 16)
        assert (teacher.sample_rate, teacher.normalize, teacher.front_end) == (16_000, False, None)

    @pytest.mark.parametrize("pads", [False, True])
    def test_a_padded_batch_equals_its_items_alone(self, pads: bool, folder: Path) -> None:
        teacher = make(folder, pad_to_30_seconds=pads)
        together, deaf = teacher(padded(), LENGTHS), teacher(padded())
        for row, length in enumerate(LENGTHS.tolist()):
            alone, frames = teacher(padded()[row : row + 1, :length]), int(teacher.num_frames(torch.tensor(length)))
            for name, target_BFD in alone.named().items():
                assert target_BFD.shape[1] == frames
                torch.testing.assert_close(together.named()[name][row, :frames], target_BFD[0], atol=1e-4, rtol=1e-4)
            # Control: lengths are what keeps the garbage out.
            assert far(deaf.output_BFD[row, :frames], alone.output_BFD[0]) == (length < 16_000)

    def test_an_item_without_a_frame_makes_nothing_infinite(self, folder: Path) -> None:
        targets = make(folder)(sound(2), torch.tensor([16_000, 100]))
        assert all(target_BFD.isfinite().all() for target_BFD in targets.named().values())

    def test_eager_attention_equals_sdpa(self, folder: Path) -> None:
        eager = make(folder, attn_implementation="eager")
        assert eager.model.config._attn_implementation == "eager"
        for lengths in (None, LENGTHS):
            output_BFD = make(folder)(padded(), lengths).output_BFD
            torch.testing.assert_close(eager(padded(), lengths).output_BFD, output_BFD, atol=1e-4, rtol=1e-4)

    def test_longer_than_the_positions_is_refused(self, folder: Path) -> None:
        make(folder)(sound(num_samples=32_399))
        too_long = r"32400 samples, .* end at 100 frames: set data.max_samples to 32000 or less"
        with pytest.raises(ValueError, match=too_long):
            make(folder)(sound(num_samples=32_400))


class TestLogMel:
    @pytest.mark.parametrize("bins", [80, 128])
    def test_it_is_the_extractors_200_samples_later(self, bins: int, tmp_path: Path) -> None:
        teacher = WhisperTeacher(str(save_whisper(tmp_path, bins=bins)))
        extractor = WhisperFeatureExtractor.from_pretrained(tmp_path)
        wave_T = sound()[0]

        def extracted(start: int) -> Tensor:
            return extractor(wave_T[start:].numpy(), sampling_rate=16_000, return_tensors="pt").input_features

        features_BCM = teacher.log_mel(wave_T[None], 98, None)
        assert features_BCM.shape == (1, bins, 98)
        inner = slice(2, 96)  # the extractor reflects the start of the audio, and hears on past the last frame
        torch.testing.assert_close(features_BCM[..., inner], extracted(200)[..., inner], atol=1e-4, rtol=0)
        assert far(features_BCM[..., inner], extracted(0)[..., inner])  # control
        assert float(features_BCM.min()) == pytest.approx(float(features_BCM.max()) - 2.0)  # the floor is reached

    def test_autocast_does_not_reach_it(self, folder: Path) -> None:
        log_mel = WhisperTeacher(str(folder)).log_mel
        expected = log_mel(sound(), 98, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(log_mel(sound(), 98, None), expected)


class TestLoading:
    def test_a_whole_model_and_an_encoder_alone_are_one_teacher(self, folder: Path, tmp_path: Path) -> None:
        expected = make(folder)(sound()).output_BFD
        whole = WhisperModel.from_pretrained(folder)
        speaking = WhisperForConditionalGeneration(whisper_config())
        speaking.model = whole
        for name, model in (("alone", whole.encoder), ("speaking", speaking)):
            model.save_pretrained(tmp_path / name)
            assert torch.equal(make(tmp_path / name)(sound()).output_BFD, expected)
        assert not any("decoder" in name for name in make(folder).state_dict())

    def test_half_precision_weights_load_in_float32(self, folder: Path, tmp_path: Path) -> None:
        WhisperModel.from_pretrained(folder).encoder.half().save_pretrained(tmp_path)
        assert {parameter.dtype for parameter in make(tmp_path).parameters()} == {torch.float32}

    def test_a_hub_name(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=r"'openai/whisper-base' is neither a local folder .*\(.*\)$") as error:
            WhisperTeacher()
        assert "\n" not in str(error.value)
        cache, commit = tmp_path / "models--openai--whisper-base", "0" * 40
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        (cache / "snapshots").mkdir()
        (cache / "snapshots" / commit).symlink_to(folder)
        assert torch.equal(WhisperTeacher()(sound()).output_BFD, make(folder)(sound()).output_BFD)

    def test_spec_round_trip(self, folder: Path) -> None:
        first = WhisperTeacher(str(folder), pad_to_30_seconds=True)
        second = build_teacher(json.loads(json.dumps(first.spec())))
        assert second.spec() == first.spec()
        assert torch.equal(second(sound()).output_BFD, first(sound()).output_BFD)

    def test_loading_and_hearing_leave_the_random_numbers_alone(self, folder: Path) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        make(folder).train()(sound())
        assert torch.equal(torch.rand(4), expected)

    def test_without_an_extractor_whispers_own_is_meant(self, folder: Path, tmp_path: Path) -> None:
        WhisperModel.from_pretrained(folder).save_pretrained(tmp_path)
        assert torch.equal(make(tmp_path)(sound()).output_BFD, make(folder)(sound()).output_BFD)

    @pytest.mark.parametrize("change", [{"feature_size": 128}, {"n_fft": 512}, {"hop_length": 80}])
    def test_another_log_mel_is_refused(self, change: dict[str, int], folder: Path, tmp_path: Path) -> None:
        WhisperModel.from_pretrained(folder).save_pretrained(tmp_path)
        WhisperFeatureExtractor(**change).save_pretrained(tmp_path)
        ((name, value),) = change.items()
        needed = f"'{name}': {value}.* but this Whisper needs .*: correct its preprocessor_config.json"
        with pytest.raises(ValueError, match=needed):
            WhisperTeacher(str(tmp_path))

    def test_an_extractor_that_cannot_be_read_is_not_guessed(self, folder: Path, tmp_path: Path) -> None:
        WhisperModel.from_pretrained(folder).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"n_fft": 4')
        with pytest.raises(ValueError, match=r"feature extractor of teacher .* cannot be read.*: set `model` to a fol"):
            WhisperTeacher(str(tmp_path))

    def test_weights_that_are_missing_or_damaged(self, tmp_path: Path) -> None:
        save_whisper(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_layers": 5}))
        with pytest.raises(ValueError, match=r"lacks 15 weights of .*layers.4.*its config.json does not fit"):
            WhisperTeacher(str(tmp_path))
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut off"):
            WhisperTeacher(str(tmp_path))
        weights.unlink()
        with pytest.raises(ValueError, match=r"holds no Hugging Face model with config.json and weights"):
            WhisperTeacher(str(tmp_path))

    def test_each_class_names_the_other(self, folder: Path, folders: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match=r"set model.teacher=lightning_modules.whisper.WhisperTeacher"):
            HuggingFaceTeacher(str(folder))
        with pytest.raises(ValueError, match=r"of type hubert.* model.teacher=lightning_modules.teacher.HuggingFaceTe"):
            WhisperTeacher(str(folders["hubert"]))


class TestLayers:
    def test_those_above_the_highest_target_are_dropped(self, folder: Path) -> None:
        whole, cut = make(folder), make(folder, (1,), 2)
        assert (len(cut.model.layers), cut.num_layers) == (2, LAYERS)
        targets = cut(sound())
        assert torch.equal(targets.hidden[1], whole(sound()).hidden[1])
        with torch.no_grad():
            assert torch.equal(targets.output_BFD, whole.model.layer_norm(whole(sound()).hidden[2]))
        with pytest.raises(ValueError, match="layer 4 was dropped when layer 2 became the highest"):
            cut.select_layers([4], 2)
        with pytest.raises(ValueError, match="out of range: choose layers from 1 to 4"):
            cut.select_layers([5])

    @pytest.mark.parametrize(
        ("weight", "changed"),
        [
            ("model.conv1.weight", {2, 3, 4}),
            ("model.layers.1.self_attn.k_proj.weight", {2, 3, 4}),
            ("model.layers.2.fc1.weight", {3, 4}),
            ("model.layers.3.fc2.bias", {4}),
        ],
    )
    def test_a_changed_weight_changes_what_is_above_it(self, weight: str, changed: set[int], folder: Path) -> None:
        teacher = make(folder, (2, 3))
        before = weight_digests(teacher)
        with torch.no_grad():
            teacher.state_dict()[weight].view(-1)[-1] += 1e-3
        after = weight_digests(teacher)
        assert {layer for layer in (2, 3, 4) if before[layer] != after[layer]} == changed

    def test_what_a_cache_keeps_tells_padding(self, folder: Path) -> None:
        one, two = (teacher_settings(make(folder, pad_to_30_seconds=pads)) for pads in (False, True))
        assert {name for name in one if one[name] != two[name]} == {"teacher.pad_to_30_seconds"}


class TestPrecision:
    def test_bf16_is_near_float32_or_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        WhisperModel(whisper_config()).save_pretrained(tmp_path)
        exact, half, refused = (make(tmp_path, precision=asked) for asked in ("32", "bf16", "bf16"))
        for teacher in (exact, half):
            teacher.prepare(torch.device("cpu"))
        monkeypatch.setattr(precision, "BF16_TOLERANCE", 1e-5)
        refused.prepare(torch.device("cpu"))
        assert (exact.precision_used, half.precision_used, refused.precision_used) == ("32", "bf16", "32")
        assert "computes in float32 on cpu: bf16 has relative errors of" in caplog.text
        reference = exact(padded(), LENGTHS).named()
        for name, target_BFD in half(padded(), LENGTHS).named().items():
            assert target_BFD.dtype == torch.float32
            assert 1e-5 < relative_error(target_BFD, reference[name]) < 0.02
        assert torch.equal(refused(sound()).output_BFD, exact(sound()).output_BFD)

    def test_an_unknown_one_is_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"init_args\.precision='16': choose auto, 32 or bf16"):
            WhisperTeacher(str(folder), precision="16")  # type: ignore[arg-type]


class TestCompile:
    pytestmark = TORCH_WARNINGS

    @pytest.mark.ci
    def test_targets_equal_the_eager_ones_and_one_graph_serves_all_layers(self, folder: Path, graphs: Graphs) -> None:
        eager, compiled = make(folder), make(folder, compile=True, compile_backend="counting")
        for num_samples in (16_000, 12_000, 20_000):
            given = sound(2, num_samples)
            torch.testing.assert_close(compiled(given).output_BFD, eager(given).output_BFD, atol=1e-4, rtol=1e-4)
        assert graphs.count == counters["stats"]["unique_graphs"] == 1
        torch.testing.assert_close(
            compiled(padded(), LENGTHS).output_BFD, eager(padded(), LENGTHS).output_BFD, atol=1e-4, rtol=1e-4
        )
        assert graphs.count == 2  # a mask is another kind of input
        assert not counters["graph_break"]
        assert list(compiled.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize("policy", some_policies())
def test_a_student_grows_under_it(policy: str, folder: Path, tmp_path: Path) -> None:
    corpus = save_corpus(tmp_path / "corpus", {"train": 8, "dev": 2})
    module = make_module(folder, objective={"normalize_targets": "layer"})
    trainer = make_trainer(tmp_path, make_stacking(policy))
    trainer.fit(module, datamodule=make_data(corpus, tmp_path / "cache"))
    assert module.student.depth == 4
    assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("name", ["whisper_base_encoder", "whisper_tiny_en_encoder"])
def test_targets_of_a_released_encoder_are_hugging_faces(name: str, real_data: Path, real_teachers: Path) -> None:
    folder, path = real_teachers / name, sorted((real_data / "LibriSpeech").rglob("*.flac"))[0]
    samples = soundfile.read(path, stop=48_000, dtype="float32")[0]
    wave_T = torch.from_numpy(np.concatenate([np.zeros(600, dtype=np.float32), samples]))  # as in the test above
    encoder = WhisperEncoder.from_pretrained(folder, dtype=torch.float32).eval()
    layers = tuple(range(1, encoder.config.encoder_layers + 1))
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    given = extractor(wave_T[200:].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        whole = encoder(given, output_hidden_states=True)
    heard = make(folder, layers, pad_to_30_seconds=True)(wave_T[None])
    compare(heard, list(whole.hidden_states), whole.last_hidden_state, tolerance=1e-3)
    alone = make(folder, layers)
    features_BCM = alone.log_mel(wave_T[None], 2 * heard.output_BFD.shape[1], None)
    compare(alone(wave_T[None]), *reference(encoder, features_BCM), tolerance=1e-3)
