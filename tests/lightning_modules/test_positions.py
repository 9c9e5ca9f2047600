"""The positional convolution by Fourier transforms is torch's convolution."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import HubertPositionalConvEmbedding

from lightning_modules import positions
from lightning_modules.positions import FourierPositions, correlated, grouped_correlation

SIZES = [(32, 128, 16), (48, 128, 16), (24, 16, 2), (16, 5, 4), (8, 3, 1)]


def embedding(width: int = 32, taps: int = 128, groups: int = 16) -> HubertPositionalConvEmbedding:
    config = HubertConfig(hidden_size=width, num_conv_pos_embeddings=taps, num_conv_pos_embedding_groups=groups)
    torch.manual_seed(0)
    return HubertPositionalConvEmbedding(config)


def with_transforms(module: HubertPositionalConvEmbedding) -> FourierPositions:
    own = copy.deepcopy(module)
    own.__class__ = FourierPositions
    return own


def results(module: HubertPositionalConvEmbedding, hidden_BFD: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    hidden_BFD = hidden_BFD.clone().requires_grad_()
    output_BFD = module(hidden_BFD)
    weights = torch.randn(output_BFD.shape, generator=torch.Generator().manual_seed(1))
    (output_BFD * weights).sum().backward()
    gradients = {name: weight.grad for name, weight in module.named_parameters()}
    return {"output": output_BFD.detach(), "input": hidden_BFD.grad, **gradients}


@pytest.mark.parametrize("frames", [1, 7, 64, 249])
@pytest.mark.parametrize(("width", "taps", "groups"), SIZES)
def test_output_and_gradients_are_those_of_the_convolution(frames: int, width: int, taps: int, groups: int) -> None:
    module = embedding(width, taps, groups)
    hidden_BFD = torch.randn(3, frames, width, generator=torch.Generator().manual_seed(2))
    expected, found = results(module, hidden_BFD), results(with_transforms(module), hidden_BFD)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    later = results(module, hidden_BFD.roll(1, dims=1)) if frames > 1 else results(module, 2 * hidden_BFD)
    assert not torch.allclose(later["output"], found["output"], rtol=1e-3, atol=1e-3)  # control


def test_gradients_are_exact_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_BFD = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    taps_OIK = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_correlation(x, w, 2)[0], (hidden_BFD, taps_OIK))


def test_zeros_after_an_items_end_change_nothing() -> None:
    module = with_transforms(embedding())
    hidden_BFD = torch.randn(2, 60, 32)
    hidden_BFD[1, 40:] = 0
    torch.testing.assert_close(module(hidden_BFD)[1, :40], module(hidden_BFD[1:, :40])[0], rtol=1e-5, atol=1e-5)


def test_weights_that_are_frozen_get_no_gradient() -> None:
    module = with_transforms(embedding()).requires_grad_(False)
    hidden_BFD = torch.randn(2, 20, 32, requires_grad=True)
    module(hidden_BFD).sum().backward()
    assert hidden_BFD.grad is not None
    assert all(weight.grad is None for weight in module.parameters())


def test_only_the_class_of_one_module_changes_and_a_copy_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HubertModel(HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    positions.install(model)
    assert isinstance(copy.deepcopy(model).encoder.pos_conv_embed, FourierPositions)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    calls: list[int] = []
    monkeypatch.setattr(positions, "correlated", lambda *words: calls.append(1) or correlated(*words))
    hidden_BFD = torch.randn(1, 20, 32)
    model.encoder.pos_conv_embed(hidden_BFD)
    assert calls == [1]
    with torch.autocast("cpu", torch.bfloat16):
        model.encoder.pos_conv_embed(hidden_BFD)
    assert calls == [1], "bf16 is left to torch"
