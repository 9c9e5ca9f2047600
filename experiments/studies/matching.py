"""Runs of equal cost: how long a run must be to cost as much as another one."""

from collections.abc import Mapping
from typing import Any

from datamodules.errors import InputError
from experiments.training.defaults import max_epochs


def cost_ratio(target: Mapping[str, Any], reference: Mapping[str, Any], cost: str) -> float:
    """Divide the cost of one run by that of another; both are results of ``distil`` jobs.

    Raises:
        InputError: their seconds do not compare, since they had other hardware or other students beside them.
    """
    for fact in ("hardware", "students") if cost == "train_seconds" else ():
        if (one := target.get(fact, 1)) != (other := reference.get(fact, 1)):
            raise InputError(
                f"equal seconds of {target['row']} and {reference['row']}, seed {target['seed']}, have no meaning, "
                f"since their {fact} were {one} and {other}: train both alike, or match their flops"
            )
    return float(target[cost] / reference[cost])


def matched(settings: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Change ``settings`` to a run ``ratio`` times as long, by fewer steps per epoch, or else fewer epochs."""
    data, trainer = dict(settings.get("data", {})), dict(settings.get("trainer", {}))
    epochs = max_epochs(settings)
    if per_epoch := data.get("batches_per_epoch"):
        steps = ratio * per_epoch * epochs
        # A few epochs fewer are used if that gets nearer to the wanted number of steps.
        candidates = [(n, max(1, round(steps / n))) for n in range(epochs, max(0, epochs - 4), -1)]
        epochs, per_epoch = min(candidates, key=lambda pair: abs(pair[0] * pair[1] - steps))
        data["batches_per_epoch"] = per_epoch
    else:
        epochs = max(1, round(ratio * epochs))
    return settings | {"data": data, "trainer": trainer | {"max_epochs": epochs}}
