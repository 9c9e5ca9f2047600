"""Contribution of each layer of a student: its output loss without the layer, and with two layers swapped.

Nothing is trained. If the loss stays the same without a layer, the layer is not used. If it stays the same with two
neighbours swapped, their order does not matter, as may happen with copies of one layer. Veit et al. 2016 did both
with residual networks.

Tensor names carry shape suffixes: F frames, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import HubertModel


@dataclass(frozen=True)
class DepthUse:
    """Output losses of the whole student, without each layer, and with each layer and the next one swapped."""

    loss: float
    skipped: list[float]
    swapped: list[float]


@contextmanager
def layers_in_order(model: HubertModel, order: Sequence[int]) -> Iterator[None]:
    """Give ``model`` its layers in another order or without some of them, and restore them at the end."""
    layers = model.encoder.layers
    model.encoder.layers = nn.ModuleList(layers[index] for index in order)
    try:
        yield
    finally:
        model.encoder.layers = layers


@torch.no_grad()
def depth_use(model: HubertModel, waveforms: Sequence[Tensor], loss: Callable[[Tensor, int], Tensor]) -> DepthUse:
    """Measure `DepthUse`; each loss is the mean over all frames.

    Args:
        model: the student in eval mode.
        waveforms: utterances (T,), normalised as the student needs them; each is run alone.
        loss: function of an output (F, D) and the index of its utterance, summed over frames.
    """
    depth = len(model.encoder.layers)
    whole = list(range(depth))
    return DepthUse(
        loss=_mean_loss(model, waveforms, loss, whole),
        skipped=[_mean_loss(model, waveforms, loss, whole[:at] + whole[at + 1 :]) for at in range(depth)],
        swapped=[
            _mean_loss(model, waveforms, loss, [*whole[:at], at + 1, at, *whole[at + 2 :]]) for at in range(depth - 1)
        ],
    )


def _mean_loss(
    model: HubertModel, waveforms: Sequence[Tensor], loss: Callable[[Tensor, int], Tensor], order: Sequence[int]
) -> float:
    total, frames = 0.0, 0
    with layers_in_order(model, order):
        for number, waveform_T in enumerate(waveforms):
            output_FD = model(waveform_T[None]).last_hidden_state[0]
            total += float(loss(output_FD, number))
            frames += len(output_FD)
    return total / frames
