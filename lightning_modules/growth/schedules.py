"""Growth schedules, which set the number of epochs of each stage and so the epochs at which the student grows.

A schedule is written as one word. ``equal`` gives all stages the same length. ``prop-ALPHA`` (PROP-alpha) gives stage i
of B a share proportional to i^alpha, so ``prop-0`` is ``equal``. ``explicit-E1,E2,...`` lists the epochs (0-based) at
whose start the student grows. Any other is the path of a function (``my_module.my_schedule``) from the number of stages
and of epochs to the epochs of each stage.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from datamodules.errors import InputError
from lightning_modules.lookup import find_named

_PROPORTIONAL = re.compile(r"prop-(\d{1,2}(?:\.\d+)?)")
_EXPLICIT = re.compile(r"explicit-(\d+(?:,\d+)*)")


def stage_lengths(schedule: str | Sequence[int], num_stages: int, max_epochs: int) -> list[int]:
    """Number of epochs of every stage, each at least 1; they sum to ``max_epochs``.

    Args:
        schedule: ``equal``, ``prop-ALPHA``, ``explicit-E1,E2,...``, the list [E1, E2, ...] itself, or the path of a
            function.
        num_stages: number of stages B, one more than the number of growths.
        max_epochs: epochs T of the whole run.

    Raises:
        InputError: the schedule is unknown, there are fewer epochs than stages, or the growth epochs are not
            increasing, not inside the run, or not ``num_stages - 1`` in number.
    """
    if max_epochs < num_stages:
        raise InputError(
            f"trainer.max_epochs={max_epochs} is too few for {num_stages} stages of at least one epoch each: train "
            f"for {num_stages} epochs or more, or use fewer stages"
        )
    if not isinstance(schedule, str):
        return _between(list(schedule), num_stages, max_epochs)
    if match := _EXPLICIT.fullmatch(schedule):
        return _between([int(epoch) for epoch in match[1].split(",")], num_stages, max_epochs)
    if match := _PROPORTIONAL.fullmatch("prop-0" if schedule == "equal" else schedule):
        return _proportional(float(match[1]), num_stages, max_epochs)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", schedule):
        raise InputError(
            f"unknown schedule {schedule!r}: write equal, prop-ALPHA (such as prop-1 or prop-0.5, below 100), "
            "explicit-E1,E2,... (such as explicit-2,5,8) or the path of a function, my_module.my_schedule"
        )
    function = find_named(schedule, {}, "schedule", "a function from stages and epochs to the epochs of each stage")
    lengths = [int(length) for length in function(num_stages, max_epochs)]
    if len(lengths) != num_stages or min(lengths) < 1 or sum(lengths) != max_epochs:
        raise InputError(
            f"the schedule {schedule} gives stages of {lengths} epochs: it must give {num_stages}, each of at least "
            f"one epoch, {max_epochs} in all"
        )
    return lengths


def _proportional(alpha: float, num_stages: int, max_epochs: int) -> list[int]:
    """T i^alpha / sum_j j^alpha, rounded by largest remainder; ties go to the earlier stage."""
    # Fractions are used, since a rounding error must not decide a tie between two remainders.
    weights = [Fraction(stage**alpha) for stage in range(1, num_stages + 1)]
    shares = [max_epochs * weight / sum(weights) for weight in weights]
    lengths = [int(share) for share in shares]
    by_remainder = sorted(range(num_stages), key=lambda stage: lengths[stage] - shares[stage])
    for stage in by_remainder[: max_epochs - sum(lengths)]:
        lengths[stage] += 1
    while 0 in lengths:
        lengths[lengths.index(max(lengths))] -= 1
        lengths[lengths.index(0)] += 1
    return lengths


def _between(epochs: list[int], num_stages: int, max_epochs: int) -> list[int]:
    """Lengths of the stages between growths at the start of ``epochs``."""
    if len(epochs) != num_stages - 1:
        raise InputError(
            f"the schedule names {len(epochs)} growth epochs {epochs}, but {num_stages} stages need {num_stages - 1}"
        )
    boundaries = [0, *epochs, max_epochs]
    if any(end <= start for start, end in pairwise(boundaries)):
        raise InputError(
            f"growth epochs {epochs} must increase and lie from 1 to {max_epochs - 1}, inside the run of "
            f"{max_epochs} epochs"
        )
    return [end - start for start, end in pairwise(boundaries)]


def growth_epochs(lengths: Sequence[int]) -> list[int]:
    """The epochs (0-based) at whose start the student grows, one fewer than the number of stages."""
    return list(accumulate(lengths))[:-1]


def depth_at(epoch: int, stages: Sequence[int], lengths: Sequence[int]) -> int:
    """Depth during ``epoch`` (0-based); after the run's end the depth of its last stage."""
    return stages[sum(epoch >= start for start in growth_epochs(lengths))]


def mean_depth(stages: Sequence[int], lengths: Sequence[int]) -> float:
    """Depth averaged over epochs, which must be equal in a comparison of policies with different stages."""
    return sum(depth * length for depth, length in zip(stages, lengths, strict=True)) / sum(lengths)
