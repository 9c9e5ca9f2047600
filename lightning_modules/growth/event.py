"""GrowthEvent: the record of one growth, as ``growth.json``, checkpoints and exported students hold it."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from datamodules.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GrowthEvent:
    """One growth. Fields with a default are missing in records of older versions.

    Attributes:
        epoch: epoch (0-based) that begins with this growth.
        step: optimizer steps done before it.
        policy: name of the growth policy.
        plan: for each new layer the place of its source (0-based), ``None`` for a fresh layer.
        ancestry: for each new layer the first-stage layer that it descends from, ``None`` for a fresh layer.
        depth_before: number of layers before it.
        depth: number of layers after it.
        parameters: parameters of the grown student; 0 if not recorded.
        seconds: duration of the growth; 0 if not recorded.
        loss_before: loss before it on one fixed batch; ``None`` if it was not measured.
        loss_after: loss after it on the same batch.
        train_seconds: seconds of training before it; ``None`` in a run without a clock.
    """

    epoch: int
    step: int
    policy: str = "unknown"
    plan: tuple[int | None, ...] = ()
    ancestry: tuple[int | None, ...]
    depth_before: int
    depth: int
    parameters: int = 0
    seconds: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    train_seconds: float | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "GrowthEvent":
        """Read the plain values of any version.

        Raises:
            InputError: a value without a default is missing.
        """
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for field in fields(cls):
            if field.default is MISSING and field.name not in known:
                raise InputError(f"a growth event lacks the key {field.name!r}")
        return cls(**known | {name: tuple(known.get(name, ())) for name in ("plan", "ancestry")})

    def to_plain(self) -> dict[str, Any]:
        """Plain values by name, with lists instead of tuples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"plan": list(self.plan), "ancestry": list(self.ancestry)}
