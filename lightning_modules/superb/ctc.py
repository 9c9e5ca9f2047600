"""CTC for SUPERB: losses of single utterances, and greedy decoding in s3prl's fixed and legacy variants.

Shapes: B batch, F frames, C classes.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Decode = Literal["fixed", "legacy"]


def ctc_losses(logits_BFC: Tensor, num_frames: Sequence[int], targets: Sequence[Sequence[int]], blank: int) -> Tensor:
    """Loss (B,) of each utterance divided by its target's length; 0 where the frames are too few for the target."""
    lengths = [len(target) for target in targets]
    joined = torch.tensor([label for target in targets for label in target], device=logits_BFC.device)
    scores_FBC = logits_BFC.float().log_softmax(-1).transpose(0, 1)
    losses_B = nn.functional.ctc_loss(
        *(scores_FBC, joined, torch.tensor(num_frames), torch.tensor(lengths)),
        blank=blank, reduction="none", zero_infinity=True,
    )  # fmt: skip
    return losses_B / torch.tensor(lengths, device=losses_B.device).clamp(min=1)


def is_feasible(target: Sequence[int], num_frames: int) -> bool:
    """Whether a path exists, with a frame for each symbol and a blank between equal neighbours."""
    doubles = sum(one == two for one, two in itertools.pairwise(target))
    return len(target) + doubles <= num_frames


def collapse(labels: Sequence[int], blank: int, decode: Decode = "fixed", eos: int | None = None) -> list[int]:
    """Turn the best path into symbols.

    ``fixed`` merges repeats and then drops blanks. ``legacy`` drops blanks and ``eos`` first, so that a symbol spoken
    twice becomes one. s3prl did the latter in PR and SF until May 2022, and the published numbers were made with it.
    """
    if decode == "legacy":
        labels = [label for label in labels if label not in (blank, eos)]
    return [label for label, _ in itertools.groupby(labels) if label != blank]
