import copy
import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import HubertModel

from datamodules.phones import ProbeCorpus
from lightning_modules.pretraining import PretrainingConfig, initial_model
from lightning_modules.probe import (
    Example,
    PhoneProbe,
    RandomOrder,
    blank_logit,
    compute_examples,
    greedy_decode,
    hidden_states,
    phone_error_rate,
    phone_probe,
    stack_examples,
    standardise,
    statistics,
)
from tests.aligned_corpus import RATE, TONES, save_aligned_corpus

TINY = PretrainingConfig(hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64, conv_channels=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ProbeCorpus:
    root = save_aligned_corpus(tmp_path_factory.mktemp("tones"), {"train": 16, "test": 4})
    return ProbeCorpus.read(root, ["train"], ["test"])


@pytest.fixture(scope="module")
def model() -> HubertModel:
    return initial_model(TINY, 0)


@pytest.mark.parametrize(
    ("classes", "phones"),
    [
        ([], []),
        ([0, 0, 0], []),
        ([1, 1, 2, 2, 2, 3], [1, 2, 3]),
        ([0, 1, 1, 0, 1, 0, 2], [1, 1, 2]),  # a blank in between: the phone was said twice
        ([1, 1, 1], [1]),  # no blank: once
        ([2, 0, 0, 2, 2, 0, 1, 2], [2, 2, 1, 2]),
    ],
)
def test_greedy_decoding(classes: list[int], phones: list[int]) -> None:
    assert greedy_decode(classes) == phones


def test_phone_error_rate_is_a_micro_average() -> None:
    assert phone_error_rate([[1, 2, 3]], [[1, 2, 3]]) == 0
    # 1 substitution of 1, no error in 9: 10 %, where a mean over utterances would be 50 %.
    assert phone_error_rate([[2], [1] * 9], [[1], [1] * 9]) == pytest.approx(10)
    # 1 insertion, 1 deletion, 1 substitution over 6; symbols of two digits are one symbol.
    assert phone_error_rate([[1, 2, 3, 4], [5], [10]], [[1, 2, 3], [5, 6], [11]]) == pytest.approx(50)
    assert phone_error_rate([[]], [[1, 1, 2]]) == 100


def test_hidden_states_are_those_of_hugging_face(model: HubertModel) -> None:
    waveform_T = torch.randn(4000)
    frozen = copy.deepcopy(model).eval()
    expected = frozen(waveform_T[None], output_hidden_states=True).hidden_states
    states_LFD = hidden_states(frozen, waveform_T, normalize=False)
    assert states_LFD.shape == (4, 12, 32)
    assert all(torch.equal(state_FD, state_1FD[0]) for state_FD, state_1FD in zip(states_LFD, expected, strict=True))
    quiet = [hidden_states(frozen, 0.01 * waveform_T, normalize) for normalize in (True, False)]
    torch.testing.assert_close(quiet[0], hidden_states(frozen, waveform_T, normalize=True), atol=5e-3, rtol=0)
    assert not torch.allclose(quiet[1], states_LFD, atol=2e-2, rtol=0)


def test_missing_hidden_states_are_refused(model: HubertModel) -> None:
    """A layer appended after the first forward pass has no capture hook."""
    grown = copy.deepcopy(model).eval()
    hidden_states(grown, torch.randn(4000), normalize=False)
    grown.encoder.layers.append(torch.nn.Identity())
    grown.forward = lambda *args, **kwargs: SimpleNamespace(hidden_states=[torch.zeros(1, 2, 32)] * 4)
    with pytest.raises(ValueError, match="has 4 layers but returned 4 hidden states"):
        hidden_states(grown, torch.randn(4000), normalize=False)


def test_examples_leave_the_model_as_it_was(model: HubertModel, corpus: ProbeCorpus) -> None:
    trained = copy.deepcopy(model).train()
    examples = compute_examples(trained, corpus.train[:2], corpus.phones, normalize=False)
    assert trained.training
    assert all(parameter.grad is None for parameter in trained.parameters())
    again = compute_examples(trained, corpus.train[:2], corpus.phones, normalize=False)
    assert torch.equal(examples[0].hidden_LFD, again[0].hidden_LFD)  # no dropout
    assert examples[0].targets.tolist() == ["abcd".index(phone) + 1 for phone in corpus.train[0].phones]


def test_batches_are_padded() -> None:
    examples = [Example(torch.randn(3, frames, 4).half(), torch.tensor(t)) for frames, t in ((5, [1]), (2, [2, 1]))]
    batch = stack_examples(examples)
    assert batch.hidden_LBFD.shape == (3, 2, 5, 4)
    assert torch.equal(batch.hidden_LBFD[:, 1, :2], examples[1].hidden_LFD.float())
    assert not batch.hidden_LBFD[:, 1, 2:].any()
    assert (batch.num_frames.tolist(), batch.targets.tolist(), batch.num_targets.tolist()) == (
        [5, 2],
        [1, 2, 1],
        [1, 2],
    )


def test_head_is_a_linear_map_of_the_weighted_sum() -> None:
    probe, hidden_LBFD = PhoneProbe(3, 4, 6, blank=math.log(5), lr=0.1, steps=1), torch.randn(3, 2, 5, 4)
    # The start: half of the probability is the blank's, whatever is heard.
    torch.testing.assert_close(probe(hidden_LBFD).exp(), torch.tensor([0.5] + [0.1] * 5).expand(2, 5, 6))
    nn.init.normal_(probe.head.weight)
    uniform_BFC = probe.head(hidden_LBFD.mean(0)).log_softmax(-1)
    torch.testing.assert_close(probe(hidden_LBFD), uniform_BFC)
    probe.layer_logits.data = torch.tensor([-100.0, 100.0, -100.0])
    torch.testing.assert_close(probe(hidden_LBFD), probe.head(hidden_LBFD[1]).log_softmax(-1))
    assert not torch.allclose(probe(hidden_LBFD), uniform_BFC)


def test_statistics_are_over_frames_not_utterances() -> None:
    states = [torch.randn(3, frames, 4) * 5 + 2 for frames in (2, 30)]
    states[0][1, :, 2] = states[1][1, :, 2] = 7.0  # a constant dimension is left as it is
    examples = [Example(state_LFD.half(), torch.tensor([1])) for state_LFD in states]
    mean_LD, std_LD = statistics(examples)
    together_LFD = torch.cat(states, 1)
    torch.testing.assert_close(mean_LD, together_LFD.mean(1), atol=5e-3, rtol=0)
    expected_LD = together_LFD.std(1, correction=0)
    expected_LD[1, 2] = 1.0
    torch.testing.assert_close(std_LD, expected_LD, atol=5e-3, rtol=0)
    standard_LFD = torch.cat([example.hidden_LFD.float() for example in standardise(examples, mean_LD, std_LD)], 1)
    torch.testing.assert_close(standard_LFD.mean(1), torch.zeros(3, 4), atol=5e-3, rtol=0)
    expected_LD[1, 2] = 0.0
    torch.testing.assert_close(standard_LFD.std(1, correction=0), expected_LD.sign() / 2, atol=5e-3, rtol=0)


def test_the_start_is_the_best_constant_classifier() -> None:
    frames, phones, classes = 40, 8, 5
    targets = torch.arange(phones) % (classes - 1) + 1

    def loss(blank: float) -> float:
        logits = torch.zeros(frames, 1, classes)
        logits[..., 0] = blank
        lengths = torch.tensor([frames]), torch.tensor([phones])
        return float(nn.functional.ctc_loss(logits.log_softmax(-1), targets[None], *lengths))

    start = blank_logit([Example(torch.zeros(3, frames, 4).half(), targets)], classes)
    assert loss(start) < min(loss(start - 0.7), loss(start + 0.7))
    assert loss(start) < 0.7 * loss(0.0)


def test_order_is_a_function_of_the_seed() -> None:
    order = list(RandomOrder(5, 12, seed=1))
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert len(order) == 12
    assert list(RandomOrder(5, 12, seed=1)) == order
    assert list(RandomOrder(5, 12, seed=2)) != order


class Spectrum(nn.Module):
    """Three hidden states; only the middle one hears anything: the energy at each tone, and its rise."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, waveform_1T: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        windows_1FT = waveform_1T.unfold(1, 400, 320) * torch.hann_window(400)
        bins = [round(frequency * 400 / RATE) for frequency in TONES.values()]
        energy_1FD = torch.fft.rfft(windows_1FT).abs()[..., bins].log1p()
        # Its rise too: over frames that are all the same, a linear head can only repeat itself, and CTC settles on
        # naming each with a small probability.
        tones_1FD = torch.cat([energy_1FD, energy_1FD.diff(dim=1, prepend=energy_1FD[:, :1]).relu()], -1)
        deaf_1FD = torch.zeros_like(tones_1FD)
        return SimpleNamespace(hidden_states=(deaf_1FD, tones_1FD, deaf_1FD))


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_probe_finds_the_layer_that_hears(corpus: ProbeCorpus, lr: float) -> None:
    model = cast(HubertModel, Spectrum())
    result = phone_probe(model, corpus, lr=lr)
    assert result.per < 5
    assert result.layer_weights[1] == max(result.layer_weights) > 0.4
    assert sum(result.layer_weights) == pytest.approx(1, abs=1e-5)


def test_probe_with_the_phones_of_other_utterances_fails(corpus: ProbeCorpus) -> None:
    swapped = [
        spoken._replace(phones=other.phones) for spoken, other in zip(corpus.test, corpus.test[1:], strict=False)
    ]
    assert phone_probe(cast(HubertModel, Spectrum()), corpus._replace(test=swapped), lr=0.1).per > 40


def test_probe_depends_on_its_seed(model: HubertModel, corpus: ProbeCorpus) -> None:
    before = copy.deepcopy(model.state_dict())
    losses = [phone_probe(model, corpus, steps=3, batch_size=4, seed=seed).train_loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
