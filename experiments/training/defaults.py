"""Defaults of settings that a configuration leaves out, read from where they are defined."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

TRAINER_DEFAULTS = {
    "max_epochs": 75,
    "gradient_clip_val": 5.0,
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 0,
    # The data module cuts global batches by rank itself.
    "use_distributed_sampler": False,
}


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Default of a parameter of a function or class."""
    return inspect.signature(function).parameters[name].default


def max_epochs(settings: Mapping[str, Any]) -> int:
    """Epochs of a run with these settings."""
    return int(settings.get("trainer", {}).get("max_epochs", TRAINER_DEFAULTS["max_epochs"]))
