"""Heads of the SUPERB tasks, from features (B, F, D) with ``num_frames`` valid frames per item to logits.

Shapes: B batch, F frames, D width, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_modules.lengths import before_the_end

PROJECTION = 256
LSTM_WIDTH = 1024
DIARIZATION_WIDTH = 512
XVECTOR_WIDTH, XVECTOR_POOLED = 512, 1500
XVECTOR_CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
"""Kernel and dilation of each layer before the pooling."""
SPEAKER_PROBE_WIDTH = 128
AM_SCALE, AM_MARGIN = 30.0, 0.4


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


class SpeakerClasses(nn.Module):
    """Cosines (B, C) between embeddings (B, D) and a vector for each training speaker."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.vectors_DC = nn.Parameter(torch.empty(width, num_classes))
        nn.init.xavier_normal_(self.vectors_DC)

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        return nn.functional.normalize(embeddings_BD, dim=-1) @ nn.functional.normalize(self.vectors_DC, dim=0)


class XVector(nn.Module):
    """x-vector (ASV): five dilated layers over time, mean and deviation over frames, two linear layers.

    In training it outputs cosines (B, C) to the training speakers, otherwise embeddings (B, 512) of norm 1, which are
    taken after the first linear layer and its ReLU. As in s3prl, the layers see the zeros after a shorter item, and its
    statistics include the first frame that does.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, XVECTOR_WIDTH)
        outputs = [*[XVECTOR_WIDTH] * (len(XVECTOR_CONTEXTS) - 1), XVECTOR_POOLED]
        self.layers = nn.ModuleList(
            nn.Conv1d(XVECTOR_WIDTH, channels, kernel, dilation=dilation)
            for channels, (kernel, dilation) in zip(outputs, XVECTOR_CONTEXTS, strict=True)
        )
        self.embedding = nn.Linear(2 * XVECTOR_POOLED, XVECTOR_WIDTH)
        self.linear = nn.Linear(XVECTOR_WIDTH, XVECTOR_WIDTH)
        self.classes = SpeakerClasses(XVECTOR_WIDTH, num_classes)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        hidden_BDF = self.projector(features_BFD).transpose(1, 2)
        for layer in self.layers:
            hidden_BDF = layer(hidden_BDF).relu()
        lost, total = features_BFD.shape[1] - hidden_BDF.shape[2], hidden_BDF.shape[2]
        valid = [min(frames - lost + 1, total) for frames in num_frames]
        pooled_BD = torch.stack(
            [
                torch.cat([row_DF[:, :frames].mean(-1), row_DF[:, :frames].std(-1)])
                for row_DF, frames in zip(hidden_BDF, valid, strict=True)
            ]
        )
        embeddings_BD = self.embedding(pooled_BD).relu()
        if self.training:
            return self.classes(self.linear(embeddings_BD).relu())
        return nn.functional.normalize(embeddings_BD, dim=-1)


class SpeakerProbe(nn.Module):
    """Mean over frames and one linear layer (the probe preset of ASV); outputs as :class:`XVector` does."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, SPEAKER_PROBE_WIDTH)
        self.classes = SpeakerClasses(SPEAKER_PROBE_WIDTH, num_classes)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        embeddings_BD = self.linear(mean_over_frames(features_BFD, num_frames))
        return self.classes(embeddings_BD) if self.training else nn.functional.normalize(embeddings_BD, dim=-1)


def am_softmax_losses(
    cosines_BC: Tensor, classes_B: Tensor, scale: float = AM_SCALE, margin: float = AM_MARGIN
) -> Tensor:
    """Cross-entropy (B,) of scaled cosines, from which the right class's ``margin`` is subtracted first.

    Wang et al., Additive Margin Softmax for Face Verification, 2018.
    """
    wanted_BC = nn.functional.one_hot(classes_B, cosines_BC.shape[1]).to(cosines_BC)
    return nn.functional.cross_entropy(scale * (cosines_BC - margin * wanted_BC), classes_B, reduction="none")


class DiarizationLSTM(nn.Module):
    """One unidirectional LSTM layer over all frames, padding included, and a linear layer (SD); outputs (B, F, 2)."""

    def __init__(self, width: int, num_speakers: int = 2) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, DIARIZATION_WIDTH, batch_first=True)
        self.linear = nn.Linear(DIARIZATION_WIDTH, num_speakers)

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        return self.linear(self.lstm(features_BFD)[0])


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


def mean_over_frames(values_BFC: Tensor, num_frames: Sequence[int] | Tensor) -> Tensor:
    """Mean (B, C) of the first ``num_frames`` frames of each item."""
    counts_B = torch.as_tensor(num_frames, device=values_BFC.device)
    valid_BF = before_the_end(counts_B, values_BFC.shape[1], values_BFC.device)
    return (values_BFC * valid_BF[..., None]).sum(1) / counts_B[:, None]
