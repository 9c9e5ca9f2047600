"""One forward pass of a Hugging Face encoder that keeps the states of some layers; ``output_hidden_states`` keeps all.

Shapes: B batch, T samples, F frames, C channels, D width. Layers count from 1; 0 is the input of the first one.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tap(nn.Module):
    """Calls ``module`` and keeps the tensor that it returns, and with ``keeps_input`` its first argument.

    A hook would become part of the compiled graph.
    """

    input: Tensor
    output: Tensor

    def __init__(self, module: nn.Module, keeps_input: bool = False) -> None:
        super().__init__()
        self.module, self.keeps_input = module, keeps_input

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.keeps_input:
            self.input = args[0]
        result = self.module(*args, **kwargs)
        # WavLM's layers also return their position bias.
        self.output = result[0] if isinstance(result, tuple) else result
        return result


class Tapped(NamedTuple):
    """What one forward pass gave: outputs (B, F, D) of layers, features, and the model's ``last_hidden_state``."""

    outputs: dict[int, Tensor]
    features_BCF: Tensor
    last_BFD: Tensor


def run_tapped(model: Any, waveforms_BT: Tensor, mask_BT: Tensor | None, wanted: Collection[int]) -> Tapped:
    """Run the model with taps, which are installed for the time of this call.

    Args:
        model: encoder with a ``feature_extractor`` and ``encoder.layers``.
        waveforms_BT: waveforms.
        mask_BT: attention mask of the samples; ``None`` if no item is padded.
        wanted: layers whose outputs are kept.
    """
    encoder, layers, extractor = model.encoder, model.encoder.layers, model.feature_extractor
    features = Tap(extractor)
    tapped = {number or 1 for number in wanted}  # layer 1 gives layer 0, its input
    taps = {number: Tap(layers[number - 1], keeps_input=number == 1 and 0 in wanted) for number in tapped}
    encoder.layers = nn.ModuleList(taps.get(number, layer) for number, layer in enumerate(layers, start=1))
    model.feature_extractor = features
    try:
        # Encoders of transformers 5.17 draw a number for LayerDrop at every layer, in eval mode too. A student's
        # random numbers must not depend on whether targets are computed, cached, or shared by several students.
        with torch.random.fork_rng(devices=[]):
            result = model(waveforms_BT, attention_mask=mask_BT, return_dict=True)
    finally:
        encoder.layers, model.feature_extractor = layers, extractor
    outputs = {number: taps[number].output if number else taps[1].input for number in wanted}
    return Tapped(outputs, features.output, result.last_hidden_state)
