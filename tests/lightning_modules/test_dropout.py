"""Dropout on a CPU: rate, mean and independence of the masks, and attention that equals torch's."""

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_modules import dropout
from lightning_modules.dropout import Dropout, attention, draws_here, keep_mask

ELEMENTS = 4_000_003  # a rate of 0.1 has a standard error of 0.00015


def mask(rate: float, seed: int = 0, elements: int = ELEMENTS) -> Tensor:
    torch.manual_seed(seed)
    return keep_mask(torch.empty(elements), rate)


def is_rate(dropped: Tensor, rate: float) -> bool:
    """Whether the share of true values is ``rate`` within five standard errors."""
    return abs(float(dropped.double().mean()) - rate) < 5 * (rate * (1 - rate) / len(dropped)) ** 0.5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_what_it_should_be_and_the_mean_stays(rate: float) -> None:
    kept = mask(rate)
    dropped = kept == 0
    assert is_rate(dropped, rate)
    assert all(is_rate(dropped[place::4], rate) for place in range(4))  # the parts of a 64-bit number
    # Neighbours, which share a number or do not, are independent.
    assert all(is_rate(dropped[step:] & dropped[:-step], rate**2) for step in (1, 2, 3, 4))
    (factor,) = kept[~dropped].unique().tolist()
    assert factor == pytest.approx(1 / (1 - rate), rel=1e-3)
    assert float(kept.double().mean()) == pytest.approx(1, abs=5 * (rate / (1 - rate) / ELEMENTS) ** 0.5)
    assert round(rate * dropout.LEVELS) == pytest.approx(dropout.LEVELS * (1 - 1 / factor), abs=0.01)


def test_control_a_rate_of_eight_bits_would_be_seen() -> None:
    assert not is_rate(mask(26 / 256) == 0, 0.1)
    assert not is_rate((dropped := mask(0.1) == 0)[1:] & dropped[1:], 0.1**2)


def test_rates_near_the_ends_keep_the_mean_finite() -> None:
    assert torch.equal(mask(1e-7, elements=9), torch.ones(9))
    kept = mask(1 - 1e-7)
    assert set(kept.unique().tolist()) == {0.0, dropout.LEVELS}


def test_masks_are_a_function_of_the_seed() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        on_two = mask(0.1)
        torch.set_num_threads(1)
        assert torch.equal(mask(0.1), on_two)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(mask(0.1, seed=1), on_two)
    assert not torch.equal(keep_mask(torch.empty(ELEMENTS), 0.1), mask(0.1, seed=1))  # the generator has moved on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_one_mask(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
    layer = Dropout(0.5)
    torch.manual_seed(0)
    output = layer(hidden)
    output.backward(torch.ones_like(output))
    assert hidden.grad is not None
    torch.manual_seed(0)
    expected = keep_mask(hidden.detach(), 0.5)
    assert torch.equal(hidden.grad, expected)
    assert torch.equal(output, hidden * expected)
    assert output.dtype == dtype
    assert torch.equal(layer.eval()(hidden), hidden)


def test_other_devices_have_torchs_masks() -> None:
    assert draws_here(torch.empty(1), 0.1)
    assert not draws_here(torch.empty(1, device="meta"), 0.1)
    assert not draws_here(torch.empty(1), 0.0)


def attend(function: object, masked: bool, rate: float) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    valid = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    valid[1, ..., 4:] = False
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    output, _ = function(layer, *inputs, valid if masked else None, dropout=rate, scaling=0.3)  # type: ignore[operator]
    output.square().sum().backward()
    return [output, *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs_where_all_weights_are_kept(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = attend(sdpa_attention_forward, masked, 0.0)
    assert all(map(torch.equal, attend(attention, masked, 0.0), expected))
    dropping = attend(attention, masked, 0.5)
    monkeypatch.setattr(dropout, "keep_mask", lambda like, rate: torch.ones_like(like))
    keeping = attend(attention, masked, 0.5)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(keeping, expected, strict=True))
    # Controls: dropped weights, and the other mask of padding.
    assert (dropping[0] - expected[0]).abs().max() > 0.1
    assert (attend(attention, not masked, 0.5)[0] - expected[0]).abs().max() > 0.1
