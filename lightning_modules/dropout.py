"""Dropout on a CPU with cheaper random numbers: 16 bits for each element, four elements from one 64-bit number.

torch draws a mask on a CPU with ``bernoulli_``: 11 to 13 ns for each element (one thread, AVX2), which makes dropout a
fifth to a third of a small student's step. The masks of this file take 2 to 3 ns. In attention, dropout also excludes
torch's fused kernel; the products here take 45 ms where its unfused ones take 63. Other devices are left to torch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_dropout"
"""Name of the attention below among those of Hugging Face."""
LEVELS = 2**16
"""Values of a random number; a rate is rounded to a multiple of 1 / 65,536."""


def install(model: PreTrainedModel) -> None:
    """Replace the dropout of ``model``, that of its attention weights included; weights and outputs do not change."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, Dropout(child.p))
    model.set_attn_implementation(ATTENTION)


def draws_here(hidden: Tensor, rate: float) -> bool:
    """Whether the masks of ``hidden`` are those of this file: there is something to drop, and on a CPU."""
    return rate > 0 and hidden.device.type == "cpu"


@torch.library.custom_op("interstack::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def keep_mask(like: Tensor, rate: float) -> Tensor:
    """Draw a mask of the shape and type of ``like``: 0 with probability ``rate``, else the factor that keeps the mean.

    The rate is rounded to a multiple of 1 / 65,536 (at most 65,535 of them), and the factor belongs to the rounded
    rate. In bf16 the factor has bf16's resolution, as torch's has. The numbers are those of torch's default generator,
    and depend on its seed alone.
    """
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: like.numel()].view(like.shape)
    # Comparing in float32 and in place is several times as fast as making booleans and multiplying by them.
    kept = numbers.to(torch.float32).ge_(dropped - LEVELS // 2)
    return kept.mul_(LEVELS / (LEVELS - dropped)).to(like.dtype)


@keep_mask.register_fake
def _shape(like: Tensor, rate: float) -> Tensor:
    return like.new_empty(like.shape)


class Dropout(nn.Dropout):
    """``nn.Dropout`` with the masks of :func:`keep_mask` on a CPU, and torch's elsewhere."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and draws_here(hidden, self.p):
            return hidden * keep_mask(hidden.detach(), self.p)
        return super().forward(hidden)


def attention(
    module: nn.Module,
    query_BHFD: Tensor,
    key_BHFD: Tensor,
    value_BHFD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as Hugging Face's ``sdpa`` does, with the masks of :func:`keep_mask` where weights are dropped on a CPU.

    ``attention_mask`` (B, 1, F, F) is true where a query may see a key. Returns (B, F, H, D) and no weights.
    """
    inputs = query_BHFD, key_BHFD, value_BHFD
    if not draws_here(query_BHFD, dropout):
        return sdpa_attention_forward(module, *inputs, attention_mask, dropout, scaling, **kwargs)
    scores_BHFF = (query_BHFD * scaling) @ key_BHFD.transpose(-1, -2)
    if attention_mask is not None:
        scores_BHFF = scores_BHFF.masked_fill(~attention_mask, torch.finfo(scores_BHFF.dtype).min)
    weights_BHFF = scores_BHFF.softmax(-1)
    return (weights_BHFF * keep_mask(weights_BHFF.detach(), dropout) @ value_BHFD).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
