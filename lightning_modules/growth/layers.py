"""Growing the layers of an encoder by a plan, and matching their number to that of a state dict.

Layers can come in groups that stay together, such as two layers that share an attention map. Then the n-th layer of
every group has the same kind, and a layer is only ever cloned into the same place of another group.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import HubertModel

from lightning_modules.growth.policies import Initialise

Sources = dict[nn.Parameter, nn.Parameter | None]


def state_dict_depth(state_dict: dict[str, Any], prefix: str = "") -> int:
    """Number of Transformer layers in a state dict of a ``HubertModel`` under ``prefix``; 0 if there are none."""
    pattern = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    return max((int(match[1]) + 1 for key in state_dict if (match := pattern.match(key))), default=0)


def layer_group(hubert: HubertModel) -> int:
    """Number of layers that must stay together, in a row, when the model grows."""
    return int(getattr(hubert, "layer_group", 1))


def set_layers(hubert: HubertModel, layers: Sequence[nn.Module]) -> None:
    """Replace the layers and their number in the configuration, without which a reload would build another depth."""
    hubert.encoder.layers = nn.ModuleList(layers)
    hubert.config.num_hidden_layers = len(layers)


def match_depth(hubert: HubertModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rebuild the stack to the depth of the state dict that is about to be loaded, deeper or shallower.

    A pre-hook on the ``HubertModel`` also works for plain ``load_state_dict``, averaged copies and evaluation code.
    The hooks of callbacks run too late, after the weights are loaded.
    """
    depth, layers = state_dict_depth(state_dict, prefix), list(hubert.encoder.layers)
    if depth and depth != len(layers):
        layers += [_clone(hubert, _last_like(hubert, layers, place)) for place in range(len(layers), depth)]
        set_layers(hubert, layers[:depth])


def grow_layers(hubert: HubertModel, plan: Sequence[int | None], initialise: Initialise, seed: int) -> Sources:
    """Rebuild the stack by ``plan``; arguments and result as for :meth:`lightning_modules.student.Student.grow`."""
    old = list(hubert.encoder.layers)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + len(old))
    sources: Sources = {}
    layers: list[nn.Module] = []
    for place, source in enumerate(plan):
        template = _last_like(hubert, old, place) if source is None else old[source]
        if source is not None and template not in layers:
            layers.append(template)
            continue
        layer = _clone(hubert, template)
        sources |= dict(zip(layer.parameters(), template.parameters(), strict=True))
        if source is None:
            _reinitialise(layer, hubert.config.initializer_range, generator)
            sources |= dict.fromkeys(layer.parameters())
        elif initialise == "zero_output":
            sources |= dict.fromkeys(_zero_outputs(layer))
        layers.append(layer)
    set_layers(hubert, layers)
    return sources


def _last_like(hubert: HubertModel, layers: Sequence[nn.Module], place: int) -> nn.Module:
    """The last layer of the kind that belongs at ``place``."""
    group = layer_group(hubert)
    return layers[len(layers) - group + place % group]


def _clone(hubert: HubertModel, layer: nn.Module) -> nn.Module:
    # The memo keeps one shared config object, since a copy would miss later edits such as the attention kernel.
    return copy.deepcopy(layer, {id(hubert.config): hubert.config})


def _zero_outputs(layer: Any) -> list[nn.Parameter]:
    """Zero the attention and feed-forward output projections; returns the parameters that were zeroed."""
    zeroed = [*layer.attention.out_proj.parameters(), *layer.feed_forward.output_dense.parameters()]
    for parameter in zeroed:
        nn.init.zeros_(parameter)
    return zeroed


def _reinitialise(layer: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw HuBERT's initialisation on the CPU, so that every rank and every device gets the same numbers."""
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose1d):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
