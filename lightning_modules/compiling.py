"""Regional compilation: modules of one kind share a graph, compiled in place.

There are two reasons to compile in place. ``torch.compile(module)`` would put ``_orig_mod`` into the names of the state
dict, and a compiled ``forward`` stays bound to its module, so that a clone would run its source's weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 32
"""Largest number of graphs of one kind of module. Teacher and student share a kind, and have graphs for training and
evaluation, with and without a mask, for one and several utterances. Beyond torch's limit of 8 all would run eagerly."""


def compiled_parts(model: Any, whole_layers: bool = True) -> list[nn.Module]:
    """The modules of an encoder of the wav2vec 2.0 kind to compile: convolutions, feature projection and each layer.

    Without ``whole_layers`` the blocks of each layer are separate modules, so that a tap between them is in no graph.
    """
    encoder = model.encoder
    blocks = (block for layer in encoder.layers for block in (layer.attention, layer.feed_forward))
    layers = encoder.layers if whole_layers else blocks
    return [model.feature_extractor, model.feature_projection, encoder.pos_conv_embed, *layers]


def compile_in_place(modules: Iterable[nn.Module], backend: str) -> None:
    """Compile the modules that are not compiled yet. A deep copy is never compiled, so clones and fresh layers are not.

    One graph serves all lengths from the first step on. With a separate graph for the first length, a resumed run
    would have another graph than the uninterrupted run, with other rounding.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Under DDP dynamo would split a graph wherever a bucket of gradients is full. That overlaps communication if the
    # whole model is one graph; here graphs are parts of layers, and a split would give one and several processes other
    # graphs, with other rounding.
    torch._dynamo.config.optimize_ddp = False
    for module in modules:
        if module._compiled_call_impl is None:
            module.compile(backend=backend, dynamic=True)
