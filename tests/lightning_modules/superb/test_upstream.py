"""Every way to name an upstream gives the encoder's own hidden states."""

import json
from pathlib import Path

import pytest
import torch
from transformers import HubertConfig, HubertModel, WhisperModel

from lightning_modules.export import export_student
from lightning_modules.superb.feature_cache import FeatureCache
from lightning_modules.superb.upstream import EncoderUpstream, load_upstream
from lightning_modules.teacher import normalize_waveforms
from lightning_modules.whisper import WhisperTeacher
from tests.helpers import save_teacher, save_whisper
from tests.lightning_modules.test_checkpoint_files import DAMAGES
from tests.lightning_modules.test_export import checkpoint_of, save, tiny_hubert


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
        expected = encoder(features_BCM, output_hidden_states=True).hidden_states
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
        cache = FeatureCache(EncoderUpstream(model, False, "tiny"), tmp_path, precision)
        cache.states(wave_T)
        folders.append(cache.folder)
        assert cache.misses == 1
    assert len({*folders}) == len(list(tmp_path.iterdir())) == 3
    again = FeatureCache(EncoderUpstream(hubert, False, "again"), tmp_path, "bf16-mixed")
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
