"""A forward pass of a Hugging Face encoder that keeps some of its tensors; ``output_hidden_states`` keeps every layer.

Shapes: B batch, T samples, F frames, C channels, D width. Layers count from 1; 0 is the input of the first one.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tap(nn.Module):
    """Calls ``module`` and keeps the tensor that it returns, and if ``keeps_input`` is set its first argument.

    A hook would become part of the compiled graph.
    """

    input: Tensor
    output: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.keeps_input = module, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.keeps_input:
            self.input = args[0]
        result = self.module(*args, **kwargs)
        # WavLM's layers also return their position bias.
        self.output = result[0] if isinstance(result, tuple) else result
        return result


@contextmanager
def tapping(places: Mapping[Any, tuple[nn.Module, str]]) -> Iterator[dict[Any, Tap]]:
    """Replace submodules by taps, for the time of the context.

    Args:
        places: parent and name of the submodule, by any key.
    """
    taps = {key: Tap(getattr(parent, name)) for key, (parent, name) in places.items()}
    try:
        for key, (parent, name) in places.items():
            setattr(parent, name, taps[key])
        yield taps
    finally:
        for key, (parent, name) in places.items():
            setattr(parent, name, taps[key].module)


class Tapped(NamedTuple):
    """What one forward pass gave: a tensor (B, F, D) of each layer, features, and the model's ``last_hidden_state``."""

    outputs: dict[int, Tensor]
    features_BCF: Tensor
    last_BFD: Tensor


def run_tapped(
    model: Any, waveforms_BT: Tensor, mask_BT: Tensor | None, wanted: Collection[int], inside: str | None = None
) -> Tapped:
    """Run the model with taps.

    Args:
        model: encoder with a ``feature_extractor`` and ``encoder.layers``.
        waveforms_BT: waveforms.
        mask_BT: attention mask of the samples; ``None`` if no item is padded.
        wanted: layers whose outputs are kept, 0 for the input of the first.
        inside: name in a layer of a module whose output is kept instead of the layer's.
    """
    layers = model.encoder.layers
    places: dict[Any, tuple[nn.Module, str]] = {"features": (model, "feature_extractor")}
    for number in {number or 1 for number in wanted}:  # layer 1 gives layer 0, its input
        places[number] = (layers, str(number - 1)) if inside is None else (layers[number - 1], inside)
    # Encoders of transformers 5.17 draw a number for LayerDrop at every layer, in eval mode too. A student's random
    # numbers must not depend on whether targets are computed, cached, or shared by several students.
    with tapping(places) as taps, torch.random.fork_rng(devices=[]):
        if 0 in wanted:
            taps[1].keeps_input = True
        result = model(waveforms_BT, attention_mask=mask_BT, return_dict=True)
    outputs = {number: taps[number].output if number else taps[1].input for number in wanted}
    return Tapped(outputs, taps["features"].output, result.last_hidden_state)
