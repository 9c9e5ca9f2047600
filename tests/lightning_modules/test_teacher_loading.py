"""What a Hugging Face folder must hold to be a teacher, and what is read from it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, HubertModel, SEWConfig, Wav2Vec2FeatureExtractor

from lightning_modules.teacher import HuggingFaceTeacher
from lightning_modules.teacher_loading import load_extractor
from tests.lightning_modules.teachers import FAMILIES, LAYERS, TINY, save_model


def test_half_precision_weights_load_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    HubertModel(FAMILIES["hubert"]()).half().save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher(str(tmp_path))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


class TestNormalize:
    @pytest.mark.parametrize(
        ("family", "stored", "setting", "expected"),
        [
            ("hubert", True, None, True),
            ("hubert", False, None, False),
            ("hubert_large", False, None, False),
            ("hubert", True, False, False),
            ("hubert", False, True, True),
            ("hubert", None, None, False),
            ("hubert_large", None, None, True),
            ("data2vec_audio", None, None, True),
        ],
    )
    def test_resolution(
        self, family: str, stored: bool | None, setting: bool | None, expected: bool, tmp_path: Path
    ) -> None:
        save_model(tmp_path, FAMILIES[family]())
        if stored is not None:
            Wav2Vec2FeatureExtractor(do_normalize=stored, sampling_rate=8000).save_pretrained(tmp_path)
        teacher = HuggingFaceTeacher(str(tmp_path), normalize=setting)
        assert teacher.normalize is expected
        assert teacher.sample_rate == (16000 if stored is None else 8000)

    def test_guess_is_logged(self, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="lightning_modules.teacher_loading"):
            HuggingFaceTeacher(str(folders["hubert"]))
        assert "normalize=False (guessed from feat_extract_norm='group'" in caplog.text

    def test_hubert_base_was_trained_on_raw_audio(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub's extractor file says otherwise; a folder of that name stands in for it."""
        folder = tmp_path / "facebook" / "hubert-base-ls960"
        save_model(folder, FAMILIES["hubert"]())
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
        monkeypatch.chdir(tmp_path)
        assert HuggingFaceTeacher("facebook/hubert-base-ls960").normalize is False
        assert HuggingFaceTeacher("facebook/hubert-base-ls960", normalize=True).normalize is True
        assert HuggingFaceTeacher(str(folder)).normalize is True  # under another name the file is believed


class TestErrors:
    def test_unreachable_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="'nobody/nothing' is neither a local folder nor downloadable") as error:
            HuggingFaceTeacher("nobody/nothing")
        assert "config.json" in str(error.value)
        assert "\n" not in str(error.value)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="neither a local folder nor downloadable"):
            HuggingFaceTeacher(str(tmp_path / "absent"))

    def test_empty_folder_and_folder_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no Hugging Face model"):
            HuggingFaceTeacher(str(tmp_path))
        FAMILIES["hubert"]().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds no Hugging Face model"):
            HuggingFaceTeacher(str(tmp_path))

    def test_no_speech_encoder(self, tmp_path: Path) -> None:
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        BertModel(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"\(bert\) has no convolutions over waveforms: choose a speech"):
            HuggingFaceTeacher(str(tmp_path))

    def test_encoder_that_squeezes_its_frames(self, tmp_path: Path) -> None:
        save_model(tmp_path, SEWConfig(**(TINY | {"conv_dim": (8,) * 13}), num_conv_pos_embeddings=16))
        with pytest.raises(ValueError, match="SEWModel"):
            HuggingFaceTeacher(str(tmp_path))

    def test_config_that_does_not_fit_the_weights(self, tmp_path: Path) -> None:
        save_model(tmp_path, FAMILIES["hubert"]())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))
        with pytest.raises(ValueError, match=r"lacks 16 weights of HubertModel.*encoder.layers.5"):
            HuggingFaceTeacher(str(tmp_path))

    def test_an_extractor_that_cannot_be_read_is_not_guessed(self, tmp_path: Path) -> None:
        save_model(tmp_path, FAMILIES["hubert"]())
        HuggingFaceTeacher(str(tmp_path))  # control: without the file it is a guess
        for name in ("preprocessor_config.json", "processor_config.json"):
            (tmp_path / name).write_text('{"do_normalize": tr')
            with pytest.raises(ValueError, match=r"feature extractor of teacher .* cannot be read.*set `normalize`"):
                HuggingFaceTeacher(str(tmp_path))
            assert HuggingFaceTeacher(str(tmp_path), normalize=True).normalize  # nothing to guess
            (tmp_path / name).unlink()

    def test_an_extractor_of_the_hub_is_absent_only_when_the_hub_said_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        cache, commit = tmp_path / "models--some--model", "0" * 40
        for folder in ("refs", f"snapshots/{commit}", f".no_exist/{commit}"):
            (cache / folder).mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        with pytest.raises(ValueError, match="feature extractor of teacher 'some/model' cannot be read"):
            load_extractor("some/model", None)
        said_so = [
            cache / ".no_exist" / commit / name for name in ("preprocessor_config.json", "processor_config.json")
        ]
        for file in said_so:
            file.touch()
        assert load_extractor("some/model", None) is None
        for file in said_so:
            file.unlink()
        Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(cache / "snapshots" / commit)
        assert load_extractor("some/model", None).sampling_rate == 8000
