"""Featurizer: a learned softmax-weighted sum of hidden states, and the number of frames of each utterance.

Shapes: B batch, F frames, D width, L hidden states.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.errors import InputError
from lightning_modules.lengths import before_the_end

States = Literal["all", "last"]
"""Hidden states that a head sees: the weighted sum of all, or the last one."""
MOST_MISSING_FRAMES = 5
"""s3prl refuses an utterance with this many frames fewer than the rule gives."""


def frame_counts(num_samples: Iterable[int], rate: int, available: int) -> list[int]:
    """Number of frames kept of each utterance: ``round(samples / rate)``, half to even, at most ``available``.

    In a padded batch the shorter utterances keep up to one frame (of 20 ms) of padding, as in s3prl.

    Raises:
        InputError: an utterance has five or more frames fewer than the rule gives.
    """
    wanted = [round(samples / rate) for samples in num_samples]
    if max(wanted) - available >= MOST_MISSING_FRAMES:
        raise InputError(
            f"an utterance should have {max(wanted)} frames at {rate} samples a frame, but the upstream gave "
            f"{available}: its rate is wrong"
        )
    return [min(frames, available) for frames in wanted]


def without_padding(features_BFD: Tensor, num_frames: Sequence[int] | Tensor) -> Tensor:
    """Features with zeros beyond each item's frames, as s3prl pads them after the upstream."""
    valid_BF = before_the_end(torch.as_tensor(num_frames), features_BFD.shape[1], features_BFD.device)
    return features_BFD.masked_fill(~valid_BF[..., None], 0)


class Featurizer(nn.Module):
    """Softmax-weighted sum of hidden states, with weights that start at 0; a single hidden state has no weight.

    Args:
        num_states: number of hidden states L.
        width: width D.
        standardise: give each dimension of each hidden state zero mean and variance 1 / D first, so that frames have a
            norm of about 1 (the probe preset; not in SUPERB); it takes effect with :meth:`set_statistics`.
        chosen: index of the only hidden state that is used, from the input of the first layer on; ``None``: all are.
    """

    mean_LD: Tensor
    scale_LD: Tensor

    def __init__(self, num_states: int, width: int, standardise: bool = False, chosen: int | None = None) -> None:
        super().__init__()
        self.num_states, self.standardise, self.chosen = num_states, standardise, chosen
        used = num_states if chosen is None else 1
        self.weights_L = nn.Parameter(torch.zeros(used)) if used > 1 else None
        if standardise:
            self.register_buffer("mean_LD", torch.zeros(used, width))
            self.register_buffer("scale_LD", torch.ones(used, width))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Combination (B, F, D) of hidden states (B, F, D)."""
        states = self._used(states)
        shares_L = self._shares(states[0])
        if self.standardise:
            factors_LD = shares_L[:, None] / self.scale_LD
            offset_D = (factors_LD * self.mean_LD).sum(0)
            return sum(state_BFD * factor_D for state_BFD, factor_D in zip(states, factors_LD, strict=True)) - offset_D
        if self.weights_L is None:
            return states[0]
        summed_BFD = torch.zeros_like(states[0])
        for share, state_BFD in zip(shares_L, states, strict=True):
            summed_BFD = summed_BFD + share * state_BFD
        return summed_BFD

    def _used(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        return states if self.chosen is None else [states[self.chosen]]

    def _shares(self, like: Tensor) -> Tensor:
        return like.new_ones(1) if self.weights_L is None else self.weights_L.softmax(0)

    @property
    def layer_weights(self) -> list[float]:
        """Weight of each of the L hidden states after the softmax; index 0 is the input of the first layer."""
        if self.chosen is not None:
            return [float(state == self.chosen) for state in range(self.num_states)]
        return [1.0] if self.weights_L is None else self.weights_L.detach().softmax(0).tolist()

    def choose(self, state: int) -> None:
        """Use this hidden state, for a featurizer that uses one alone; index 0 is the input of the first layer."""
        self.chosen = state

    def set_statistics(self, utterances: Iterable[Sequence[Tensor]]) -> None:
        """Measure mean and deviation over all frames of ``utterances``, each a list of L hidden states (F, D)."""
        count, total_LD, squares_LD = 0, torch.zeros((), dtype=torch.double), torch.zeros((), dtype=torch.double)
        for states in utterances:
            states_LFD = torch.stack([state_FD.double().cpu() for state_FD in self._used(states)])
            count += states_LFD.shape[1]
            total_LD = total_LD + states_LFD.sum(1)
            squares_LD = squares_LD + states_LFD.square().sum(1)
        mean_LD = total_LD / count
        std_LD = (squares_LD / count - mean_LD.square()).clamp(min=0).sqrt()
        std_LD = std_LD.where(std_LD > 1e-4, 1.0)  # a constant dimension is only centred
        self.mean_LD.copy_(mean_LD)
        self.scale_LD.copy_(std_LD * mean_LD.shape[1] ** 0.5)
