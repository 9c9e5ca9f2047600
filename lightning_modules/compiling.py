"""Regional compilation: modules of one kind share a graph, compiled in place.

In place, for two reasons: ``torch.compile(module)`` would put ``_orig_mod`` into the names of the state dict, and a
compiled ``forward`` stays bound to its module, so that a clone would run its source's weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

RECOMPILE_LIMIT = 32
"""Graphs of one kind of module. Teacher and student share a kind, and have graphs for training and evaluation, with a
mask and without, of one utterance and of several; beyond torch's limit of 8 all of them would run eagerly."""


def compiled_parts(model: Any) -> list[nn.Module]:
    """What is compiled of an encoder of the wav2vec 2.0 kind: convolutions, feature projection, and each layer."""
    encoder = model.encoder
    return [model.feature_extractor, model.feature_projection, encoder.pos_conv_embed, *encoder.layers]


def compile_in_place(modules: Iterable[nn.Module], backend: str) -> None:
    """Compile the modules that are not: a deep copy drops it, so clones, fresh and loaded ones come without.

    One graph serves all lengths from the first step on: with a graph of its own for the first length, a resumed run
    would have another one than the uninterrupted run, with other rounding.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in modules:
        if module._compiled_call_impl is None:
            on_cpu = next(module.parameters()).device.type == "cpu"
            # Inductor's own random numbers cost a CPU more than all else gains (1.4x the time of a forward pass).
            options = {"fallback_random": True} if backend == "inductor" and on_cpu else None
            module.compile(backend=backend, options=options, dynamic=True)


class Tap(nn.Module):
    """Calls ``module`` and keeps the tensor that it returns; around it, as a hook would enter its compiled graph."""

    output: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        # WavLM's layers also return their position bias.
        self.output = result[0] if isinstance(result, tuple) else result
        return result
