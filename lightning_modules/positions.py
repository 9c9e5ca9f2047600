"""The positional convolution of a HuBERT encoder on a CPU, computed from Fourier transforms.

It has 128 taps in 16 groups of channels. torch's grouped convolution is slow there, above all backwards: a third of
the step of a student of three layers that trains from cached features. By transforms over time it takes a half to a
ninth of the time (benchmarks/README.md) and gives the same numbers within 1e-6. Other devices, and bf16, are left to
torch.

Shapes: B batch, F frames, D width, G groups, O output and I input channels of a group, K taps, N length of the
transforms, M = N // 2 + 1 frequencies.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import HubertModel
from transformers.models.hubert.modeling_hubert import HubertPositionalConvEmbedding

from lightning_modules.kernels import compute_dtype

GRID = 64
"""Samples; the length of a transform is a multiple of it."""


def install(model: HubertModel) -> None:
    """Make ``model`` compute its positional convolution in this way; weights and state dict do not change."""
    model.encoder.pos_conv_embed.__class__ = FourierPositions


class FourierPositions(HubertPositionalConvEmbedding):
    """Hugging Face's module with the convolution of :func:`correlated` on a CPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Embeddings (B, F, D) of the positions, from hidden states (B, F, D)."""
        exact = compute_dtype(hidden_states) in (torch.float32, torch.float64)
        if hidden_states.device.type != "cpu" or not exact or self.batch_norm is not None:
            return super().forward(hidden_states)
        return self.activation(correlated(cast(nn.Conv1d, self.conv), hidden_states))


def correlated(conv: nn.Conv1d, hidden_BFD: Tensor) -> Tensor:
    """Apply a grouped convolution of ``padding=K // 2`` by transforms, without its additional last frame."""
    positions_BFD, _, _ = grouped_correlation(hidden_BFD, conv.weight, conv.groups)
    return positions_BFD + conv.bias


# Custom operators, for the reason given in `kernels.py`. Complex numbers are pairs of real ones outside of them, since
# inductor cannot handle complex tensors.
@torch.library.custom_op("interstack::grouped_correlation", mutates_args=())
def grouped_correlation(hidden_BFD: Tensor, taps_OIK: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlate hidden states (B, F, G I) with taps (G O, I, K) in groups; the output (B, F, G O) has as many frames.

    Output frame f sees the inputs f - K // 2 to f - K // 2 + K - 1, zeros outside, as a convolution of torch with
    ``padding=K // 2`` does whose additional last frame is removed. The other two outputs are the spectra of hidden
    states (M, G, B, I, 2) and taps (M, G, O, I, 2), for the backward pass.
    """
    frames, taps = hidden_BFD.shape[1], taps_OIK.shape[2]
    size = _size(frames, taps)
    padded_BND = functional.pad(hidden_BFD, (0, 0, taps // 2, size - frames - taps // 2))
    hidden_MGBI = _spectrum(padded_BND, size, groups)
    taps_MGOI = torch.fft.rfft(taps_OIK, n=size).unflatten(0, (groups, -1)).permute(3, 0, 1, 2).contiguous()
    output_BFD = _signal(hidden_MGBI @ taps_MGOI.mH, size)[:, :frames].contiguous()
    return output_BFD, torch.view_as_real(hidden_MGBI), torch.view_as_real(taps_MGOI)


@torch.library.custom_op("interstack::grouped_correlation_backward", mutates_args=())
def grouped_correlation_backward(
    gradient_BFD: Tensor, hidden_MGBI2: Tensor, taps_MGOI2: Tensor, taps: int
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states (B, F, G I) and taps (G O, I, K) of :func:`grouped_correlation`."""
    frames, first = gradient_BFD.shape[1], taps // 2
    size, groups = _size(frames, taps), hidden_MGBI2.shape[1]
    gradient_MGBO = _spectrum(gradient_BFD, size, groups)
    to_hidden_BND = _signal(gradient_MGBO @ torch.view_as_complex(taps_MGOI2), size)
    to_taps_GOIM = (gradient_MGBO.mH @ torch.view_as_complex(hidden_MGBI2)).permute(1, 2, 3, 0)
    to_taps_OIN = torch.fft.irfft(to_taps_GOIM.flatten(0, 1), n=size)
    return to_hidden_BND[:, first : first + frames].contiguous(), to_taps_OIN[..., :taps].contiguous()


@grouped_correlation.register_fake
def _outputs(hidden_BFD: Tensor, taps_OIK: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, width = hidden_BFD.shape
    outputs, inputs, taps = taps_OIK.shape
    frequencies = _size(frames, taps) // 2 + 1
    return (
        hidden_BFD.new_empty(batch, frames, outputs),
        hidden_BFD.new_empty(frequencies, groups, batch, width // groups, 2),
        hidden_BFD.new_empty(frequencies, groups, outputs // groups, inputs, 2),
    )


@grouped_correlation_backward.register_fake
def _gradients(gradient_BFD: Tensor, hidden_MGBI2: Tensor, taps_MGOI2: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    batch, frames, _ = gradient_BFD.shape
    _, groups, outputs, inputs, _ = taps_MGOI2.shape
    return (
        gradient_BFD.new_empty(batch, frames, groups * inputs),
        gradient_BFD.new_empty(groups * outputs, inputs, taps),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.taps = inputs[1].shape[2]


def _backward(ctx: Any, gradient_BFD: Tensor | None, *others: None) -> tuple[Tensor | None, Tensor | None, None]:
    if gradient_BFD is None:  # the output was not used
        return None, None, None
    return *grouped_correlation_backward(gradient_BFD.contiguous(), *ctx.saved_tensors, ctx.taps), None


grouped_correlation.register_autograd(_backward, setup_context=_keep)


def _size(frames: int, taps: int) -> int:
    """Length of the transforms: no input wraps around into an output that is kept, and the prime factors are small."""
    return -(-(frames + taps) // GRID) * GRID


def _spectrum(values_BND: Tensor, size: int, groups: int) -> Tensor:
    """Transform over time (M, G, B, D / G), zeros after the values' end."""
    spectrum_BMD = torch.fft.rfft(values_BND, n=size, dim=1)
    return spectrum_BMD.unflatten(2, (groups, -1)).permute(1, 2, 0, 3).contiguous()


def _signal(spectrum_MGBD: Tensor, size: int) -> Tensor:
    """Transform back to time (B, N, G D)."""
    return torch.fft.irfft(spectrum_MGBD.permute(2, 0, 1, 3).flatten(2), n=size, dim=1)
