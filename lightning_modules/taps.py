"""A forward pass of a Hugging Face encoder that keeps some of its tensors; ``output_hidden_states`` keeps every layer.

Shapes: B batch, T samples, F frames, C channels, D width. Layers count from 1; 0 is the input of the first one.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.front_end import conv_frames, noise
from lightning_modules.teacher_loading import ADVICE


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
    modules = {key: getattr(parent, name) for key, (parent, name) in places.items()}
    taps = {key: Tap(module) for key, module in modules.items()}
    try:
        for key, (parent, name) in places.items():
            setattr(parent, name, taps[key])
        yield taps
    finally:
        for key, (parent, name) in places.items():
            setattr(parent, name, modules[key])


class Tapped(NamedTuple):
    """What one forward pass gave: a tensor (B, F, D) of each layer, features, and the model's ``last_hidden_state``."""

    outputs: dict[int, Tensor]
    features_BCF: Tensor
    last_BFD: Tensor


class Known(nn.Module):
    """Returns a tensor that is known already, whatever its input."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Any) -> Tensor:
        return self.output


def run_tapped(
    model: Any,
    waveforms_BT: Tensor,
    mask_BT: Tensor | None,
    wanted: Collection[int],
    inside: str | None = None,
    masked_BF: Tensor | None = None,
    features_BCF: Tensor | None = None,
) -> Tapped:
    """Run the model with taps.

    Args:
        model: encoder with a ``feature_extractor`` and ``encoder.layers``.
        waveforms_BT: waveforms.
        mask_BT: attention mask of the samples; ``None`` if no item is padded.
        wanted: layers whose outputs are kept, 0 for the input of the first.
        inside: name in a layer of a module whose output is kept instead of the layer's.
        masked_BF: true for the frames at which the mask embedding replaces the input of the Transformer.
        features_BCF: features of these waveforms, if they are known.
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
        if features_BCF is not None:
            taps["features"].module = Known(features_BCF)
        result = model(waveforms_BT, attention_mask=mask_BT, mask_time_indices=masked_BF, return_dict=True)
    outputs = {number: taps[number].output if number else taps[1].input for number in wanted}
    return Tapped(outputs, taps["features"].output, result.last_hidden_state)


@torch.no_grad()
def ends_in_layer_norm(model: Any) -> bool:
    """Whether the encoder applies a norm to its last layer's output, tested on a second of noise.

    The encoders that do so differ in class names and config fields, and a wrong guess would raise no error.

    Raises:
        InputError: the encoder does something else between or after its layers.
    """
    probe_BT, depth = noise(), len(model.encoder.layers)
    found = run_tapped(model, probe_BT, None, {depth})
    output_BFD, last_BFD = found.outputs[depth], found.last_BFD
    frames = int(conv_frames(model.config, torch.tensor([probe_BT.shape[1]]))[-1])
    if output_BFD.shape == last_BFD.shape == (1, frames, model.config.hidden_size):
        if torch.equal(output_BFD, last_BFD):
            return False
        if torch.allclose(model.encoder.layer_norm(output_BFD), last_BFD, atol=1e-5):
            return True
    raise InputError(
        f"{type(model).__name__} changes its frames between or after the layers in an unknown way: "
        f"{ADVICE}, or write a Teacher for it"
    )
