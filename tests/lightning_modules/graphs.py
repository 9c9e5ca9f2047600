"""Counts what ``torch.compile`` compiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

# torch's own: its tracer looks at `.grad` of every tensor that it meets, and inductor imports deprecated code.
TORCH_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


class Graphs:
    """A backend that counts the graphs that it makes; it runs them as ``aot_eager`` does.

    It may be asked twice for one: with ``dynamic=True`` dynamo first takes a number of a module for an input, and
    starts again where the graph does not need it as one.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: Any, **options: Any) -> Callable[..., Any]:
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, examples, **options)
        self.count += 1
        return compiled


GRAPHS = Graphs()
