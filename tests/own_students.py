"""A student's model of one's own, as docs/extending.md has it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HubertModel
from transformers.models.hubert.modeling_hubert import HubertEncoderLayer


class ScaledLayer(HubertEncoderLayer):
    """Adds a learned share of what a layer changes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.share = nn.Parameter(torch.full((config.hidden_size,), config.first_share))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        changed = super().forward(hidden_states, attention_mask, **kwargs)
        return hidden_states + self.share * (changed - hidden_states)


class ScaledHubert(HubertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder.layers = nn.ModuleList(ScaledLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()
