"""Normalisation of targets to a scale that suits a squared error.

Some teachers have a few dimensions that are far larger than all others. One dimension of Whisper base's layer 4 has
four fifths of the layer's variance. A student that minimises the squared error there learns only that dimension.

Shapes: S targets (the output, then each hidden layer upwards), B batch, F frames, D width of the teacher.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.teacher import TeacherTargets

Normalization = Literal["none", "layer", "standardize"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "layer", "standardize")
SMALLEST_VARIANCE, SMALLEST_SHARE = 1e-8, 1e-6
"""Constant, and share of a target's mean variance, that are added to the variance of a dimension. So a constant
dimension becomes 0, and a nearly constant one is not scaled up to its rounding errors."""


class TargetStatistics(NamedTuple):
    """Mean and standard deviation of each dimension of each target, (S, D) float32."""

    mean_SD: Tensor
    deviation_SD: Tensor

    def close_to(self, other: "TargetStatistics") -> bool:
        """Whether both statistics are equal within rounding."""
        pairs = zip(self, other, strict=True)
        return all(torch.allclose(own.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4) for own, theirs in pairs)


def measure(targets: Iterable[TeacherTargets], layers: Sequence[int]) -> TargetStatistics:
    """Measure the statistics over all frames of unpadded batches, summed in float64.

    Raises:
        InputError: the batches have no frame.
    """
    frames, sums_SD, squares_SD = 0, torch.zeros(()), torch.zeros(())
    for batch in targets:
        used = batch.output_BFD, *(batch.hidden[k] for k in layers)
        # On the CPU, since Apple's GPU has no float64.
        stacked_SND = torch.stack([target_BFD.flatten(0, 1).cpu().double() for target_BFD in used])
        frames += stacked_SND.shape[1]
        sums_SD, squares_SD = sums_SD + stacked_SND.sum(1), squares_SD + stacked_SND.square().sum(1)
    if not frames:
        raise InputError("targets cannot be standardized: the training data hold no frame")
    mean_SD = sums_SD / frames
    variance_SD = (squares_SD / frames - mean_SD.square()).clamp(min=0)
    least_S1 = SMALLEST_VARIANCE + SMALLEST_SHARE * variance_SD.mean(1, keepdim=True)
    return TargetStatistics(mean_SD.float(), (variance_SD + least_S1).sqrt().float())


class TargetNormalizer(nn.Module):
    """Normalises a teacher's targets. With ``standardize`` the statistics are buffers, so every checkpoint has them.

    Args:
        kind: ``none``, ``layer`` or ``standardize``; see :class:`lightning_modules.objective.ObjectiveConfig`.
        layers: hidden layers that are targets, ascending.
        width: width D of the teacher.
        statistics_seconds: seconds of audio over which the statistics are measured.
    """

    mean_SD: Tensor
    deviation_SD: Tensor
    measured: Tensor

    def __init__(
        self, kind: Normalization, layers: Sequence[int], width: int, statistics_seconds: float = 600.0
    ) -> None:
        super().__init__()
        self.kind, self.layers, self._seconds = kind, tuple(layers), statistics_seconds
        if kind == "standardize":
            shape = 1 + len(self.layers), width
            self.register_buffer("mean_SD", torch.zeros(shape))
            self.register_buffer("deviation_SD", torch.ones(shape))
            self.register_buffer("measured", torch.tensor(False))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a cache of normalised targets must have been made with."""
        seconds = {"objective.statistics_seconds": self._seconds} if self.kind == "standardize" else {}
        return {"objective.normalize_targets": self.kind, **seconds}

    @property
    def statistics(self) -> TargetStatistics | None:
        """The statistics in use; ``None`` before they are known, or if none are needed."""
        known = self.kind == "standardize" and bool(self.measured)
        return TargetStatistics(self.mean_SD, self.deviation_SD) if known else None

    def use(self, statistics: TargetStatistics) -> None:
        """Set the statistics to standardize with."""
        self.mean_SD.copy_(statistics.mean_SD)
        self.deviation_SD.copy_(statistics.deviation_SD)
        self.measured.fill_(True)

    @torch.no_grad()
    def forward(self, targets: TeacherTargets) -> TeacherTargets:
        """Normalise the targets of the layers that the objective uses; in float32 under autocast too."""
        if self.kind == "none":
            return targets
        output_BFD, *hidden = (
            self._normalised(target_BFD.float(), place)
            for place, target_BFD in enumerate((targets.output_BFD, *(targets.hidden[k] for k in self.layers)))
        )
        return targets._replace(output_BFD=output_BFD, hidden=dict(zip(self.layers, hidden, strict=True)))

    def _normalised(self, target_BFD: Tensor, place: int) -> Tensor:
        if self.kind == "standardize":
            return (target_BFD - self.mean_SD[place]) / self.deviation_SD[place]
        with torch.autocast(target_BFD.device.type, enabled=False):
            return F.layer_norm(target_BFD, target_BFD.shape[-1:])
