"""Another way to compute a convolutional front end: the same module and weights, but channels last.

Hugging Face's front end keeps channels before time. A GPU's fast convolutions need them last, so that every layer costs
transposes around it, and the norm over time and GELU round and move their values several times. Here time comes before
channels from the waveform on. The first layer is a matrix product on windows. A convolution of stride 2 is one matrix
product on pairs of frames, and with a kernel of 3 a second one on the third tap. Nothing is copied for these products.

Shapes: B batch, T frames or samples, N output frames, C input and O output channels.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import InputError

Kernels = Literal["auto", "plain", "channels_last"]


AUTO: Kernels = "plain"
"""The kernels that ``auto`` stands for on every device. The plain path is faster on a CPU; no GPU was measured."""


def install(extractor: nn.Module, kernels: Kernels) -> None:
    """Make a front end of Hugging Face compute with ``kernels``, in place.

    Only its class changes. Weights, state dict, copies and ``compile`` are not affected.

    Raises:
        InputError: ``channels_last`` does not support these convolutions.
    """
    if (AUTO if kernels == "auto" else kernels) == "plain" or isinstance(extractor, _ChannelsLast):
        return
    if problem := _problem(extractor):
        raise InputError(
            f"model.student.kernels=channels_last cannot compute this front end, which has {problem}: set "
            "model.student.kernels=plain"
        )
    base: Any = type(extractor)
    extractor.__class__ = _with_channels_last(base)


def _problem(extractor: nn.Module) -> str | None:
    """Describe the first unsupported property of the convolutions; ``None`` if all are supported."""
    for number, layer in enumerate(getattr(extractor, "conv_layers", [])):
        conv, norm = layer.conv, getattr(layer, "layer_norm", None)
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        if number and (stride != 2 or kernel not in (2, 3)):
            return f"a kernel of {kernel} and stride of {stride} in layer {number}"
        if isinstance(norm, nn.GroupNorm) and norm.num_groups != norm.num_channels:
            return f"a norm over groups of channels in layer {number}"
        if norm is not None and not isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            return f"a {type(norm).__name__} in layer {number}"
    return None if hasattr(extractor, "conv_layers") else "no conv_layers"


class _ChannelsLast(nn.Module):
    """The base class that :func:`install` adds to the class of a front end."""

    def forward(self, input_values: Tensor) -> Tensor:
        """Features (B, C, N) of waveforms (B, T), equal to those of the extended class within rounding."""
        dtype = compute_dtype(input_values)
        layers: Any = self.conv_layers
        first, *others = layers
        hidden_BNC = _first_convolution(input_values.to(dtype), first.conv)
        hidden_BNC = first.activation(_normalised(hidden_BNC, first))
        for layer in others:
            weight_OCK = layer.conv.weight.to(dtype)
            hidden_BNC = halving_convolution(hidden_BNC.to(dtype), weight_OCK)
            if layer.conv.bias is not None:
                hidden_BNC = hidden_BNC + layer.conv.bias.to(dtype)
            hidden_BNC = layer.activation(_normalised(hidden_BNC, layer))
        return hidden_BNC.transpose(1, 2)


@cache
def _with_channels_last(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"ChannelsLast{base.__name__}", (_ChannelsLast, base), {})


def compute_dtype(values: Tensor) -> torch.dtype:
    """Data type of matrix products of ``values``: autocast's where it is on, else their own."""
    device_type = values.device.type
    # Dynamo cannot trace a check whether a device supports autocast; `meta` does not.
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else values.dtype


def _first_convolution(waveforms_BT: Tensor, conv: Any) -> Tensor:
    """First convolution as a product (B, N, O): windows of the waveform times the kernels."""
    windows_BNK = waveforms_BT.unfold(1, conv.kernel_size[0], conv.stride[0])
    hidden_BNO = windows_BNK @ conv.weight[:, 0].to(waveforms_BT.dtype).t()
    return hidden_BNO if conv.bias is None else hidden_BNO + conv.bias.to(waveforms_BT.dtype)


def _normalised(hidden_BNC: Tensor, layer: Any) -> Tensor:
    """Apply the layer's norm, if it has one, over the channels of a frame or over the time of a channel.

    The norm over time is computed in float32 and, under autocast, rounded once.
    """
    norm = getattr(layer, "layer_norm", None)
    if norm is None:
        return hidden_BNC
    if isinstance(norm, nn.LayerNorm):
        return norm(hidden_BNC)
    exact_BNC = hidden_BNC if hidden_BNC.dtype == torch.float64 else hidden_BNC.float()
    variance_B1C, mean_B1C = torch.var_mean(exact_BNC, dim=1, correction=0, keepdim=True)
    scale_B1C = norm.weight * torch.rsqrt(variance_B1C + norm.eps)
    return torch.addcmul(norm.bias - mean_B1C * scale_B1C, exact_BNC, scale_B1C)


# Custom operators instead of an `autograd.Function`: dynamo (torch 2.11) traces into the latter and loses gradients.
@torch.library.custom_op("interstack::halving_convolution", mutates_args=())
def halving_convolution(hidden_BTC: Tensor, weight_OCK: Tensor) -> Tensor:
    """A convolution (B, N, O) of stride 2 and kernel 2 or 3 without bias, as matrix products on views of (B, T, C).

    The weight (O, C, K) is as a ``Conv1d`` holds it. The backward pass is written by hand, since automatic
    differentiation of the views would fill and add whole tensors of zeros.
    """
    hidden_BTC = hidden_BTC.contiguous()
    taps_KCO, frames = weight_OCK.permute(2, 1, 0), _output_frames(hidden_BTC, weight_OCK)
    output_BNO = torch.bmm(_pairs(hidden_BTC, frames), _per_item(taps_KCO[:2].flatten(0, 1), hidden_BTC))
    if len(taps_KCO) == 3:
        output_BNO.baddbmm_(_third_taps(hidden_BTC, frames), _per_item(taps_KCO[2], hidden_BTC))
    return output_BNO


@torch.library.custom_op("interstack::halving_convolution_backward", mutates_args=())
def halving_convolution_backward(
    gradient_BNO: Tensor, hidden_BTC: Tensor, weight_OCK: Tensor, to_hidden: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the two inputs of :func:`halving_convolution`; an empty tensor for one that is not needed."""
    hidden_BTC, gradient_BNO = hidden_BTC.contiguous(), gradient_BNO.contiguous()
    frames, taps_KOC = gradient_BNO.shape[1], weight_OCK.permute(2, 0, 1)
    to_hidden_BTC, to_weight_OCK = hidden_BTC.new_empty(0), weight_OCK.new_empty(0)
    if to_hidden:
        covered = hidden_BTC.shape[1] == 2 * frames
        to_hidden_BTC = torch.empty_like(hidden_BTC) if covered else torch.zeros_like(hidden_BTC)
        both_taps = torch.cat([taps_KOC[0], taps_KOC[1]], dim=1)
        _pairs(to_hidden_BTC, frames).copy_(torch.bmm(gradient_BNO, _per_item(both_taps, hidden_BTC)))
        if len(taps_KOC) == 3:
            _third_taps(to_hidden_BTC, frames).add_(torch.bmm(gradient_BNO, _per_item(taps_KOC[2], hidden_BTC)))
    if to_weight:
        gradient_BON = gradient_BNO.transpose(1, 2)
        taps = list(torch.bmm(gradient_BON, _pairs(hidden_BTC, frames)).sum(0).chunk(2, dim=1))
        if len(taps_KOC) == 3:
            taps.append(torch.bmm(gradient_BON, _third_taps(hidden_BTC, frames)).sum(0))
        to_weight_OCK = torch.stack(taps, dim=2)
    return to_hidden_BTC, to_weight_OCK


@halving_convolution.register_fake
def _shape(hidden_BTC: Tensor, weight_OCK: Tensor) -> Tensor:
    return hidden_BTC.new_empty(len(hidden_BTC), _output_frames(hidden_BTC, weight_OCK), len(weight_OCK))


@halving_convolution_backward.register_fake
def _shapes(
    gradient_BNO: Tensor, hidden_BTC: Tensor, weight_OCK: Tensor, to_hidden: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden_BTC.new_empty(hidden_BTC.shape if to_hidden else 0),
        weight_OCK.new_empty(weight_OCK.shape if to_weight else 0),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient_BNO: Tensor) -> tuple[Tensor | None, Tensor | None]:
    asked = ctx.needs_input_grad
    found = halving_convolution_backward(gradient_BNO, *ctx.saved_tensors, *asked)
    return found[0] if asked[0] else None, found[1] if asked[1] else None


halving_convolution.register_autograd(_gradients, setup_context=_keep_inputs)


def _output_frames(hidden_BTC: Tensor, weight_OCK: Tensor) -> int:
    return (hidden_BTC.shape[1] - weight_OCK.shape[2]) // 2 + 1


def _pairs(hidden_BTC: Tensor, frames: int) -> Tensor:
    """View (B, N, 2 C) of a contiguous tensor, with frames 0 and 1, 2 and 3, ... beside each other."""
    return hidden_BTC[:, : 2 * frames].unflatten(1, (frames, 2)).flatten(2)


def _third_taps(hidden_BTC: Tensor, frames: int) -> Tensor:
    """View (B, N, C) of frames 2, 4, ..."""
    return hidden_BTC[:, 2::2][:, :frames]


def _per_item(matrix: Tensor, hidden_BTC: Tensor) -> Tensor:
    """Expand a matrix to every item of the batch, without a copy."""
    return matrix.expand(len(hidden_BTC), -1, -1)
