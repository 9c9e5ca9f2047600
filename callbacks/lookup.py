"""Look-up of another callback of the same trainer."""

from typing import TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

Found = TypeVar("Found", bound=Callback)


def find_callback(trainer: L.Trainer, kind: type[Found]) -> Found | None:
    """The first callback of this class, or ``None``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
