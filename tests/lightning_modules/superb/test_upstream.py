"""Every way to name an upstream gives the encoder's own hidden states."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2ConformerConfig, WhisperModel

from lightning_modules.export import export_student
from lightning_modules.superb.feature_cache import FeatureCache
from lightning_modules.superb.upstream import PROVENANCE, LoadedEncoder, TeacherUpstream, load_upstream
from lightning_modules.teacher import HuggingFaceTeacher, Teacher, TeacherTargets, normalize_waveforms
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import save_teacher, save_whisper
from tests.lightning_modules.teachers import FAMILIES, STABLE_FAMILIES, TINY, save_model
from tests.lightning_modules.test_checkpoint_files import DAMAGES
from tests.lightning_modules.test_export import checkpoint_of, save, tiny_hubert

MORE: dict[str, Any] = {
    "conformer": lambda: Wav2Vec2ConformerConfig(**TINY, num_conv_pos_embeddings=16),
    "adapter": lambda: Wav2Vec2Config(**TINY, num_conv_pos_embeddings=16, add_adapter=True),
}


@pytest.mark.parametrize("normalize", [False, True])
def test_checkpoint_and_exported_folder_are_one_upstream(normalize: bool, tmp_path: Path) -> None:
    hubert = tiny_hubert(3).eval()
    checkpoint = save(tmp_path, checkpoint_of(hubert, normalize=normalize))
    export_student(checkpoint, tmp_path / "student")
    waves = [torch.randn(4000), torch.randn(4000)]
    inputs_BT = normalize_waveforms(torch.stack(waves)) if normalize else torch.stack(waves)
    expected = hubert(inputs_BT, output_hidden_states=True).hidden_states
    upstreams = [load_upstream(str(checkpoint)), load_upstream(str(tmp_path / "student"))]
    for upstream in upstreams:
        assert upstream.num_states == len(expected) == 4
        for state_BFD, wanted_BFD in zip(upstream(waves), expected, strict=True):
            torch.testing.assert_close(state_BFD, wanted_BFD)
    assert upstreams[0].digest() == upstreams[1].digest()
    assert load_upstream(str(checkpoint), normalize=not normalize).digest() != upstreams[0].digest()


def test_padding_is_masked_and_reaches_the_length_of_the_whole_batch(tmp_path: Path) -> None:
    upstream = load_upstream(str(save_teacher(tmp_path / "teacher")))
    waves = [torch.randn(4000), torch.randn(6000)]
    padded_BT = torch.zeros(2, 8000)
    for row, wave_T in enumerate(waves):
        padded_BT[row, : len(wave_T)] = wave_T
    mask_BT = torch.arange(8000) < torch.tensor([[4000], [6000]])
    model = HubertModel.from_pretrained(tmp_path / "teacher").eval()
    expected = model(padded_BT, attention_mask=mask_BT.long(), output_hidden_states=True).hidden_states
    for state_BFD, wanted_BFD in zip(upstream(waves, longest=8000), expected, strict=True):
        torch.testing.assert_close(state_BFD, wanted_BFD)
    assert upstream(waves)[0].shape[1] == upstream.num_frames(6000)


class TestWhisper:
    def test_states_are_hugging_faces(self, tmp_path: Path) -> None:
        folder, wave_T = save_whisper(tmp_path, positions=50), torch.randn(16_079)
        upstream = load_upstream(str(folder))
        encoder = WhisperModel.from_pretrained(folder).encoder.eval()
        # Its positions end where the audio does, at 50 frames, so that nothing is padded.
        features_BCM = WhisperTeacher(str(folder)).log_mel(wave_T[None], 100, None)[..., : 2 * 49]
        encoder.config.max_source_positions = 49
        encoder.embed_positions.weight = torch.nn.Parameter(encoder.embed_positions.weight[:49])
        encoder.embed_positions.num_embeddings = 49
        outputs = encoder(features_BCM, output_hidden_states=True)
        expected = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        assert (upstream.num_states, upstream.width, upstream.rate) == (len(expected), 16, 320) == (5, 16, 320)
        assert upstream.num_frames(16_079) == 49
        for state_BFD, wanted_BFD in zip(upstream([wave_T]), expected, strict=True):
            torch.testing.assert_close(state_BFD, wanted_BFD, atol=1e-4, rtol=1e-4)

    def test_padding_changes_nothing_and_long_utterances_are_heard_in_parts(self, tmp_path: Path) -> None:
        upstream = load_upstream(str(save_whisper(tmp_path, positions=50)))
        waves = [torch.randn(5000), torch.randn(40_000), torch.randn(300)]
        together = upstream(waves, longest=41_000)
        assert {state_BFD.shape[1] for state_BFD in together} == {upstream.num_frames(41_000)} == {127}
        assert all(state_BFD.isfinite().all() for state_BFD in together)
        for row, wave_T in enumerate(waves[:2]):
            alone, frames = upstream([wave_T]), upstream.num_frames(len(wave_T))
            for state_BFD, wanted_BFD in zip(together, alone, strict=True):
                assert wanted_BFD.shape[1] == frames
                torch.testing.assert_close(state_BFD[row, :frames], wanted_BFD[0], atol=1e-4, rtol=1e-4)
        part = upstream([waves[1][16_000 : 2 * 16_000 + 80]])
        torch.testing.assert_close(upstream([waves[1]])[2][:, 50:100], part[2], atol=1e-4, rtol=1e-4)

    def test_its_digest_is_of_weights_and_architecture(self, tmp_path: Path) -> None:
        folder = save_whisper(tmp_path / "one")
        assert load_upstream(str(folder)).digest() == load_upstream(str(folder), normalize=False).digest()
        config = json.loads((folder / "config.json").read_text())
        digests = {load_upstream(str(folder)).digest()}
        for change in ({"encoder_attention_heads": 1}, {"activation_function": "relu"}):
            (folder / "config.json").write_text(json.dumps(config | change))
            digests.add(load_upstream(str(folder)).digest())
        digests.add(load_upstream(str(save_whisper(tmp_path / "two", positions=101))).digest())
        assert len(digests) == 4

    def test_it_hears_waveforms_as_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"upstream '.*': Whisper's input .*: leave out --normalize true"):
            load_upstream(str(save_whisper(tmp_path)), normalize=True)


def digest_of(head: str, model: Any, prefix: str) -> str:
    """The form by which finished runs and feature caches are found."""
    values = model.config.to_diff_dict()
    config = json.dumps({key: values[key] for key in sorted(values) if key not in PROVENANCE}, default=str)
    digest = hashlib.sha256(f"{head} {config}".encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{prefix}{key}".encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("normalize", [False, True])
def test_digests_have_kept_their_form(normalize: bool, tmp_path: Path) -> None:
    folder, whisper = save_teacher(tmp_path / "teacher"), save_whisper(tmp_path / "whisper")
    student = tiny_hubert(3)
    checkpoint = save(tmp_path, checkpoint_of(student, normalize=normalize))
    head = f"EncoderUpstream normalize={normalize}"
    hubert = HubertModel.from_pretrained(folder)
    found = load_upstream(str(folder), normalize).digest()
    assert found == digest_of(head, hubert, "model.")
    assert load_upstream(str(checkpoint)).digest() == digest_of(head, student, "model.")
    teacher: Any = load_upstream(str(whisper))
    assert teacher.digest() == digest_of("WhisperUpstream ", teacher.teacher.model, "teacher.model.")
    assert teacher.digest() != TeacherUpstream(WhisperTeacher(str(whisper), pad_to_30_seconds=True), "padded").digest()
    # Control: a weight and the normalisation count.
    assert found != load_upstream(str(folder), not normalize).digest()
    next(hubert.parameters()).data[0] += 1
    assert found != digest_of(head, hubert, "model.")


@pytest.mark.parametrize("family", FAMILIES)
def test_digests_of_encoders_with_a_final_norm_changed_when_their_last_state_did(family: str, tmp_path: Path) -> None:
    teacher = HuggingFaceTeacher(str(save_model(tmp_path, FAMILIES[family]())), normalize=True)
    before = digest_of("EncoderUpstream normalize=True", teacher.model, "model.")
    assert (TeacherUpstream(teacher, family).digest() == before) == (family not in STABLE_FAMILIES)


class OwnLarge(HuggingFaceTeacher):
    """A class of one's own, whose digest has the general form."""


def test_digests_of_own_classes_change_with_the_last_state_too(tmp_path: Path) -> None:
    for family, changed in (("hubert", False), ("hubert_large", True)):
        own = OwnLarge(str(save_model(tmp_path / family, FAMILIES[family]())), normalize=True)
        digest = hashlib.sha256(json.dumps([own.spec(), own.settings], sort_keys=True, default=str).encode())
        for key, value in sorted(own.state_dict().items()):
            digest.update(key.encode() + value.numpy().tobytes())
        assert (TeacherUpstream(own, family).digest() != digest.hexdigest()[:16]) == changed


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # inside WavLM's attention
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "conformer", "adapter"])
def test_states_are_the_model_s_own_to_the_last_bit(family: str, padded: bool, tmp_path: Path) -> None:
    config = (FAMILIES | MORE)[family]()
    teacher = HuggingFaceTeacher(str(save_model(tmp_path, config)), normalize=True)
    lengths = torch.tensor([5000 if padded else 8000, 8000])
    upstream, waves = TeacherUpstream(teacher, family), [torch.randn(length) for length in lengths]
    inputs_BT = normalize_waveforms(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths)
    mask_BT = (torch.arange(8000) < lengths[:, None]).long() if padded else None
    with torch.no_grad():
        whole = teacher.model(inputs_BT, attention_mask=mask_BT, output_hidden_states=True)
        unmasked = teacher.model(inputs_BT).last_hidden_state  # the control
    found = upstream(waves)
    expected = [*whole.hidden_states[:-1], whole.last_hidden_state]
    assert all(torch.equal(state_BFD, wanted_BFD) for state_BFD, wanted_BFD in zip(found, expected, strict=True))
    assert torch.equal(found[-1], unmasked) == (not padded)
    # Control: Hugging Face's own last entry is before the final norm.
    assert torch.equal(found[-1], whole.hidden_states[-1]) == (not teacher.final_norm)
    assert teacher.final_norm == (family in (*STABLE_FAMILIES, "conformer"))


@pytest.mark.parametrize("family", ["hubert", "hubert_large"])
def test_targets_of_the_last_layer_are_its_own_output_and_what_heads_see(family: str, tmp_path: Path) -> None:
    teacher = HuggingFaceTeacher(str(save_model(tmp_path, FAMILIES[family]())), normalize=False)
    wave_T = torch.randn(8000)
    last_BFD = TeacherUpstream(teacher, family)([wave_T])[-1]
    teacher.select_layers([teacher.num_layers])
    targets = teacher(wave_T[None])
    assert torch.equal(targets.output_BFD, last_BFD)
    assert torch.equal(targets.hidden[teacher.num_layers], last_BFD) == (not teacher.final_norm)


class Sums(Teacher):
    """Layer k is k times the sum over each frame, and the output one more."""

    def __init__(self, width: int = 2, rate: int = 16_000, hop: int = 160) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.hop = rate, 3, width, hop
        self.init_args = {"width": width, "rate": rate, "hop": hop}

    def num_frames(self, num_samples_B: Tensor) -> Tensor:
        return num_samples_B // self.hop

    def forward(self, waveforms_BT: Tensor, num_samples_B: Tensor | None = None) -> TeacherTargets:
        sums_BFD = waveforms_BT.unfold(1, self.hop, self.hop).sum(-1, keepdim=True).expand(-1, -1, 2)
        return TeacherTargets(sums_BFD + 1, {layer: layer * sums_BFD for layer in self.hidden_layers})


class NeedsWidth(Sums):
    def __init__(self, width: int) -> None:
        super().__init__(width)


class Wide(Sums):
    def __init__(self) -> None:
        super().__init__(width=3)


class Telephone(Sums):
    def __init__(self) -> None:
        super().__init__(rate=8000)


class Slow(Sums):
    def __init__(self) -> None:
        super().__init__(hop=320)


class TestOwnTeacher:
    def test_its_layers_are_the_hidden_states(self) -> None:
        upstream, waves = load_upstream(f"{__name__}.Sums"), [torch.randn(1600), torch.randn(3200)]
        assert (upstream.num_states, upstream.width, upstream.rate, upstream.num_frames(1700)) == (3, 2, 160, 10)
        one, two, last = upstream(waves, longest=4000)
        sums_F = waves[1].view(20, 160).sum(-1)
        torch.testing.assert_close(one[1, :20, 0], sums_F)
        assert torch.equal(two, 2 * one)
        assert torch.equal(last, one + 1)
        assert one.shape == (2, 25, 2)

    def test_its_digest_is_of_class_arguments_and_settings(self) -> None:
        names = ("Sums", "Slow")
        digests = [load_upstream(f"{__name__}.{name}").digest() for name in names]
        digests += [load_upstream(f"{__name__}.Sums", normalize=True).digest()]
        digests += [TeacherUpstream(Sums(hop=320), "sums").digest()]
        assert len({*digests}) == 4
        assert load_upstream(f"{__name__}.Sums").digest() == digests[0]

    def test_waveforms_are_normalised_on_request(self) -> None:
        wave_T = 5 * torch.randn(1600) + 3
        plain, normalised = (load_upstream(f"{__name__}.Sums", normalize)([wave_T])[0] for normalize in (None, True))
        torch.testing.assert_close(normalised.sum() / 2, torch.tensor(0.0), atol=1e-2, rtol=0)
        assert abs(float(plain.sum()) / 2) > 100

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("NeedsWidth", "needs the arguments width: give a subclass whose __init__ takes none and sets them"),
            ("HubertModel", "is not a subclass of lightning_modules.teacher.Teacher"),
            ("Absent", "cannot be imported"),
            (
                "Wide",
                r"a state of shape \(1, 100, 2\), but .* announce \(1, 100, 3\)",
            ),
            ("Telephone", "takes audio of 8000 Hz; SUPERB's is 16000 Hz"),
        ],
    )
    def test_what_is_refused(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^upstream '{__name__}\.{name}'.*{message}"):
            load_upstream(f"{__name__}.{name}")


def test_what_is_no_upstream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint .*none.ckpt"):
        load_upstream(str(tmp_path / "none.ckpt"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"upstream '.*folder'"):
        load_upstream(str(tmp_path / "folder"))


def test_a_cache_belongs_to_precision_and_architecture(tmp_path: Path) -> None:
    """The same weights with other heads give other states."""
    hubert = tiny_hubert(3)
    other = HubertModel(HubertConfig.from_dict(hubert.config.to_dict() | {"num_attention_heads": 1}))
    other.load_state_dict(hubert.state_dict())
    wave_T, folders = torch.randn(4000), []
    for model, precision in ((hubert, "32-true"), (hubert, "bf16-mixed"), (other, "32-true")):
        cache = FeatureCache(TeacherUpstream(LoadedEncoder(model, False), "tiny"), tmp_path, precision)
        cache.states(wave_T)
        folders.append(cache.folder)
        assert cache.misses == 1
    assert len({*folders}) == len(list(tmp_path.iterdir())) == 3
    again = FeatureCache(TeacherUpstream(LoadedEncoder(hubert, False), "again"), tmp_path, "bf16-mixed")
    again.states(wave_T)
    assert (again.hits, again.misses) == (1, 0)


def test_a_cache_belongs_to_the_weights(tmp_path: Path) -> None:
    upstream, other = (
        load_upstream(str(save(tmp_path, checkpoint_of(tiny_hubert(3, seed=seed)), f"{seed}.ckpt"))) for seed in (0, 1)
    )
    wave_T = torch.randn(4000)
    first = FeatureCache(upstream, tmp_path / "cache")
    states = first.states(wave_T)
    again = FeatureCache(upstream, tmp_path / "cache")
    assert all(torch.equal(one, two) for one, two in zip(states, again.states(wave_T), strict=True))
    assert (first.hits, first.misses, again.hits, again.misses) == (0, 1, 1, 0)
    foreign = FeatureCache(other, tmp_path / "cache")
    assert not torch.equal(foreign.states(wave_T)[-1], states[-1])
    assert foreign.misses == 1
    for kind, (spoil, _) in DAMAGES.items():
        (entry,) = (first.folder or tmp_path).glob("*/*.pt")
        spoil(entry)
        fresh = FeatureCache(upstream, tmp_path / "cache")
        assert all(torch.equal(one, two) for one, two in zip(states, fresh.states(wave_T), strict=True)), kind
        assert (fresh.hits, fresh.misses) == (0, 1)
    again.states(0.5 * wave_T)  # another gain is another waveform
    again.states(torch.randn(4000), keep=False)
    assert again.misses == 2
    assert len(list((tmp_path / "cache" / f"{upstream.digest()}_32-true").rglob("*.pt"))) == 2
    torch.testing.assert_close(torch.stack(states), torch.cat(upstream([wave_T])), atol=5e-3, rtol=5e-3)


def test_a_cache_that_the_disk_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = load_upstream(str(save(tmp_path, checkpoint_of(tiny_hubert(3)), "tiny.ckpt")))
    cache, wave_T = FeatureCache(upstream, tmp_path / "cache"), torch.randn(16_000)
    num_bytes = sum(state_FD.half().nbytes for state_FD in cache.states(wave_T))

    def with_free(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    with_free(10 * num_bytes)
    cache.require_room([len(wave_T)] * 11)  # the folder has one
    FeatureCache(upstream).require_room([10**12])  # in memory
    with pytest.raises(ValueError, match=r"has room for 0\.0 GB, the hidden states .* need \d\.\d GB: choose another"):
        cache.require_room([len(wave_T)] * 12)
    with_free(0)
    cache.require_room([len(wave_T)])
