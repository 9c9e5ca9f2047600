"""Scaling of gradients on their way back, without a change of values."""

from typing import Any

import torch
from torch import Tensor


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """Return ``values``, whose gradient will be multiplied by ``factor``."""
    return values if factor == 1.0 else _Scale.apply(values, factor)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
