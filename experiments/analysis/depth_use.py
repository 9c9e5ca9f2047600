"""Contribution of each layer of a student: its output loss without it, with two swapped, and after the first N layers.

Nothing is trained. If the loss stays the same without a layer, the layer is not used. If it stays the same with two
neighbours swapped, their order does not matter, as may happen with copies of one layer. Veit et al. 2016 did both
with residual networks. If the first N layers alone give the same loss, the student can be cut there.

Tensor names carry shape suffixes: F frames, D features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import HubertModel

TOLERANCE = 0.01
"""Relative change of the output loss that does not matter."""


@dataclass(frozen=True)
class DepthUse:
    """Output losses of the whole student, without each layer, with each layer and the next swapped, and at each exit.

    ``exits[N - 1]`` is the loss after the first N layers, through the projection that was trained on the last one's
    output; that of all layers is ``loss``.
    """

    loss: float
    skipped: list[float]
    swapped: list[float]
    exits: list[float]


def idle_layers(use: Mapping[str, Any], tolerance: float = TOLERANCE) -> list[int]:
    """Layers, counted from 1, without any one of which the output loss rises by no more than ``tolerance``.

    Each is left out alone. Several of them together may still matter.

    Args:
        use: fields of :class:`DepthUse`.
        tolerance: share of the output loss.
    """
    return [number for number, loss in enumerate(use["skipped"], start=1) if loss <= _about(use, tolerance)]


def layers_needed(use: Mapping[str, Any], tolerance: float = TOLERANCE) -> int | None:
    """Smallest number of first layers whose output loss is within ``tolerance`` of the whole student's.

    It is ``None`` for a result of an earlier version, which has no exits. Arguments as for :func:`idle_layers`.
    """
    return next((number for number, loss in enumerate(use.get("exits", []), 1) if loss <= _about(use, tolerance)), None)


def _about(use: Mapping[str, Any], tolerance: float) -> float:
    loss: float = use["loss"]
    return loss + tolerance * abs(loss)  # an L1 distance less a cosine may be below 0


def change(losses: Sequence[float], use: Mapping[str, Any]) -> np.ndarray:
    """Change of losses against the whole student's, in per cent of its size; negative where they are lower."""
    return 100 * (np.array(losses, dtype=float) - use["loss"]) / abs(use["loss"])


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
        exits=[_mean_loss(model, waveforms, loss, whole[:layers]) for layers in range(1, depth + 1)],
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
