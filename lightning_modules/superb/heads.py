"""Heads of the SUPERB tasks, from features (B, F, D) with ``num_frames`` valid frames per item to logits.

Shapes: B batch, F frames, D width, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PROJECTION = 256
LSTM_WIDTH = 1024


class FrameLinear(nn.Module):
    """Two linear layers without a nonlinearity between them (PR); outputs (B, F, C)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, PROJECTION)
        self.linear = nn.Linear(PROJECTION, num_classes)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        return self.linear(self.projector(features_BFD))


class BiLSTM(nn.Module):
    """Projection, two bidirectional LSTM layers over valid frames, dropout after each (ASR, SF); outputs (B, F, C)."""

    def __init__(self, width: int, num_classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.projector = nn.Linear(width, LSTM_WIDTH)
        self.layers = nn.ModuleList(
            nn.LSTM(size, LSTM_WIDTH, batch_first=True, bidirectional=True) for size in (LSTM_WIDTH, 2 * LSTM_WIDTH)
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * LSTM_WIDTH, num_classes)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        hidden_BFD, total = self.projector(features_BFD), features_BFD.shape[1]
        for lstm in self.layers:
            packed = pack_padded_sequence(hidden_BFD, torch.tensor(num_frames), batch_first=True, enforce_sorted=False)
            output_BFD, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=total)
            hidden_BFD = self.dropout(output_BFD)
        return self.linear(hidden_BFD)


class MeanPoolLinear(nn.Module):
    """Linear layer, mean over the valid frames, linear layer (KS, IC, SID); outputs (B, C)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, PROJECTION)
        self.linear = nn.Linear(PROJECTION, num_classes)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        return self.linear(mean_over_frames(self.projector(features_BFD), num_frames))


class ProbeLinear(nn.Module):
    """One linear layer with zero initial weights, over frames or over their mean (the probe preset).

    Random weights on large features can assign frames to wrong phones at the start, and CTC never corrects them. With
    zero weights and a suitable bias, the head starts as the best classifier that does not depend on the features.
    """

    def __init__(self, width: int, num_classes: int, pool: bool) -> None:
        super().__init__()
        self.linear, self.pool = nn.Linear(width, num_classes), pool
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        logits = self.linear(features_BFD)
        return mean_over_frames(logits, num_frames) if self.pool else logits


def mean_over_frames(values_BFC: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Mean (B, C) of the first ``num_frames`` frames of each item."""
    counts_B = torch.tensor(num_frames, device=values_BFC.device)
    valid_BF = torch.arange(values_BFC.shape[1], device=values_BFC.device) < counts_B[:, None]
    return (values_BFC * valid_BF[..., None]).sum(1) / counts_B[:, None]
