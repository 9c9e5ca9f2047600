"""Which student layer learns which teacher layer. Layers count from 1; 0 is the input of the first layer."""

import math
from collections.abc import Sequence
from typing import Literal

from datamodules.errors import InputError

Attach = Literal["block_end", "original"]
Unmatched = Literal["refuse", "skip"]


def l2l_positions(
    layers: Sequence[int],
    output_layer: int,
    depth: int,
    originals: Sequence[int],
    attach: Attach,
    unmatched: Unmatched = "refuse",
) -> dict[int, int]:
    """Student hidden state that learns each teacher layer, at equal relative depth.

    With ``block_end`` student layer t x depth / T, the last of its block, learns teacher layer t of T. Student layers
    1, 2, 3 learn teacher layers 4, 8, 12, then 2, 4, 6, then 3, 6, 9, then 4, 8, 12. With ``original`` the module that
    learned a target in the first stage keeps it, at whatever position that module is now. Hidden state 0 learns teacher
    layer 0 at every depth.

    Args:
        layers: teacher layers.
        output_layer: teacher layer T that the last student layer learns.
        depth: student layers.
        originals: for each first-stage layer (0-based), the present position of that module (0-based).
        attach: ``block_end`` or ``original``.
        unmatched: ``skip`` leaves out teacher layers between two student layers.

    Raises:
        InputError: a teacher layer falls between two student layers; the message names depths and layers that fit.
    """
    reference = depth if attach == "block_end" else len(originals)
    positions: dict[int, int] = {}
    for layer in layers:
        if (layer * reference) % output_layer:
            if unmatched == "skip":
                continue
            raise InputError(_between(layers, layer, output_layer, reference))
        position = layer * reference // output_layer
        positions[layer] = position if attach == "block_end" or not position else originals[position - 1] + 1
    return positions


def _between(layers: Sequence[int], layer: int, output_layer: int, depth: int) -> str:
    """Message about a teacher layer between two layers of a student of this depth."""
    fitting = math.lcm(*(output_layer // math.gcd(layer, output_layer) for layer in layers))
    stages = list(range(fitting, max(fitting, 12) + 1, fitting))
    spacing = output_layer // math.gcd(output_layer, depth)
    own = list(range(spacing, output_layer, spacing))
    return (
        f"teacher layer {layer} of {output_layer} falls between the layers of a student of depth {depth}: "
        f"model.objective.layers={list(layers)} fit depths that are multiples of {fitting}, such as "
        f"growth.stages={stages}; this depth fits "
        + (f"model.objective.layers={own} or some of them" if own else "no layer but the output's")
    )
