import pytest
import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank
from torchaudio.functional import compute_deltas

from lightning_modules.pretraining import PretrainingConfig, initial_model
from lightning_modules.superb.featurizer import Featurizer, frame_counts
from lightning_modules.superb.upstream import FbankUpstream, LoadedEncoder, TeacherUpstream

TINY = PretrainingConfig(hidden_size=16, num_layers=3, num_heads=2, intermediate_size=16, conv_channels=8)


def tiny(seed: int, name: str = "tiny") -> TeacherUpstream:
    return TeacherUpstream(LoadedEncoder(initial_model(TINY, seed), False), name)


@pytest.mark.parametrize(
    ("samples", "convolutions", "rule"),
    [(16_000, 49, 50), (16_080, 50, 50), (16_400, 51, 51), (32_000, 99, 100), (33_000, 102, 103)],
)
def test_lengths_of_the_benchmark(samples: int, convolutions: int, rule: int) -> None:
    upstream = tiny(0)
    assert upstream.num_frames(samples) == convolutions
    states = upstream([torch.randn(samples)])
    assert states[0].shape == (1, convolutions, 16)
    assert frame_counts([samples], upstream.rate, available=1000) == [rule]
    assert frame_counts([samples], upstream.rate, convolutions) == [convolutions]


def test_a_wrong_rate_is_noticed() -> None:
    assert frame_counts([480, 800], 320, 10) == [2, 2]  # 1.5 and 2.5: half to even
    with pytest.raises(ValueError, match="should have 100 frames at 160 samples a frame, but the upstream gave 49"):
        frame_counts([16_000], 160, 49)


def test_the_sum_is_weighted_by_a_softmax() -> None:
    states = [torch.randn(2, 5, 4) for _ in range(3)]
    featurizer = Featurizer(3, 4)
    torch.testing.assert_close(featurizer(states), torch.stack(states).mean(0))
    assert featurizer.weights_L is not None
    featurizer.weights_L.data = torch.tensor([0.0, 1.0, -1.0])
    expected = torch.einsum("l,lbfd->bfd", torch.tensor([0.0, 1.0, -1.0]).softmax(0), torch.stack(states))
    torch.testing.assert_close(featurizer(states), expected)
    assert Featurizer(1, 4)(states[:1]) is states[0]
    assert not list(Featurizer(1, 4).parameters())


def test_standardised_states_have_no_mean_and_frames_of_norm_one() -> None:
    utterances = [[5 * torch.randn(frames, 4) + 2 for _ in range(3)] for frames in (2, 300)]
    utterances[0][1][:, 2] = utterances[1][1][:, 2] = 7.0  # a constant dimension is only centred
    featurizer = Featurizer(3, 4, standardise=True)
    featurizer.set_statistics(utterances)
    together = [torch.cat(layer) for layer in zip(*utterances, strict=True)]
    for layer, weights in enumerate(([50.0, 0, 0], [0, 50.0, 0], [0, 0, 50.0])):
        assert featurizer.weights_L is not None
        featurizer.weights_L.data = torch.tensor(weights)
        standard_FD = featurizer([state_FD[None] for state_FD in together])[0]
        torch.testing.assert_close(standard_FD.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        expected_D = torch.tensor([0.5, 0.5, 0.0 if layer == 1 else 0.5, 0.5])
        torch.testing.assert_close(standard_FD.std(0, correction=0), expected_D, atol=1e-3, rtol=0)


@pytest.mark.parametrize("standardise", [False, True])
def test_a_chosen_state_is_all_that_is_used(standardise: bool) -> None:
    states = [5 * torch.randn(1, 300, 4) + 2 for _ in range(3)]
    featurizer, alone = Featurizer(3, 4, standardise, chosen=1), Featurizer(1, 4, standardise)
    if standardise:
        featurizer.set_statistics([[state_BFD[0] for state_BFD in states]])
        alone.set_statistics([[states[1][0]]])
    assert torch.equal(featurizer(states), alone(states[1:2]))
    assert not torch.equal(featurizer(states), alone(states[2:]))
    assert featurizer.layer_weights == [0.0, 1.0, 0.0]
    assert not list(featurizer.parameters())


def test_fbank_has_no_mean_over_time() -> None:
    upstream = FbankUpstream()
    waves = [torch.randn(16_000), 0.1 * torch.randn(8_000)]
    (features_BFD,) = upstream(waves, longest=20_000)
    assert features_BFD.shape == (2, upstream.num_frames(20_000), 240)
    frames = [upstream.num_frames(len(wave)) for wave in waves]
    for item_FD, count in zip(features_BFD, frames, strict=True):
        torch.testing.assert_close(item_FD[:count].mean(0), torch.zeros(240), atol=1e-5, rtol=0)
        # The unbiased deviation, as in s3prl.
        torch.testing.assert_close(item_FD[:count].std(0), torch.ones(240), atol=1e-5, rtol=0)
        assert not item_FD[count:].any()
    assert not upstream([torch.randn(400)])[0].any()  # one frame has no deviation


def test_bands_without_sound_are_zero_in_fbank() -> None:
    """Below the logarithm's floor a band is constant; what is left of it must not tell utterances apart."""
    waves = [low_passed(seconds, seed) for seed, seconds in enumerate((0.7, 1.1, 2.3))]
    for wave_T in waves:
        (features_BFD,) = FbankUpstream()([wave_T])
        assert float(features_BFD.mean(1).abs().max()) < 1e-4
        silent = ~features_BFD[0].any(0)
        assert silent[65:80].all()
        assert not silent[:40].any()
    # The control: s3prl's formula as it stands.
    pooled = torch.stack([plain_fbank(wave_T).mean(0) for wave_T in waves])
    assert float((pooled[0] - pooled[1]).abs().max()) > 1


def low_passed(seconds: float, seed: int, hertz: float = 3000) -> Tensor:
    """Noise below ``hertz`` and nothing above."""
    noise_T = torch.randn(int(seconds * 16_000), generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.rfft(noise_T.double())
    spectrum[int(hertz * seconds) :] = 0
    return (0.1 * torch.fft.irfft(spectrum, len(noise_T))).float()


def plain_fbank(wave_T: Tensor) -> Tensor:
    """(F, D)"""
    energies_CF = fbank(wave_T[None], num_mel_bins=80).T
    deltas_CF = compute_deltas(energies_CF)
    features_FD = torch.cat([energies_CF, deltas_CF, compute_deltas(deltas_CF)]).T
    return (features_FD - features_FD.mean(0)) / (features_FD.std(0) + 1e-10)


def test_an_upstream_stays_in_eval_mode_without_gradients() -> None:
    upstream = tiny(0)
    upstream.train()
    assert not any(module.training for module in upstream.modules())
    wave_T = torch.randn(4000)
    one, two = upstream([wave_T]), upstream([wave_T])
    assert not one[0].requires_grad
    assert torch.equal(one[3], two[3])
    other = tiny(1)
    assert upstream.digest() == tiny(0, "x").digest() != other.digest()
