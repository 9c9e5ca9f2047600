"""Summary: the results of a finished run, as ``summary.json`` and the W&B summary hold them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from datamodules.files import finite


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Settings, cost and final losses of a run. A value that a run or an older version does not record is ``None``.

    Attributes:
        growth: all growth settings.
        plans: plan of each growth as text. W&B makes a column from a string, but not from a list of growths.
        ancestry: ancestry of the layers at the end, as text.
        train_seconds: seconds of training. With several students they include shared work, and cannot be compared with
            those of a run alone.
        students: students that were trained side by side in one process.
        utterances: utterances that were trained on, each time that they were.
        train_loss: mean of the last epoch.
        val_output: output loss of the last validation. It can be compared between systems whose intermediate losses
            differ, unlike ``val_loss``, if both have the same ``loss_function``.
        loss_function: what the output loss measures; see ``ObjectiveConfig.loss_function``.
        without_transcript: utterances without text in splits with texts.
        teacher_precision: precision in which the targets were computed.
        cached_features: whether the features of the front end were read from a cache in the last epoch.
    """

    name: str | None = None
    policy: str | None = None
    schedule: str | None = None
    growth: dict[str, Any] | None = None
    seed: int | None = None
    steps: int | None = None
    epochs: int | None = None
    depth: int | None = None
    mean_depth: float | None = None
    plans: str | None = None
    ancestry: str | None = None
    parameters: int | None = None
    train_seconds: float | None = None
    students: int = 1
    audio_seconds: float | None = None
    utterances: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_output: float | None = None
    loss_function: str | None = None
    without_transcript: int | None = None
    world_size: int | None = None
    precision: str | None = None
    teacher_precision: str | None = None
    cached_features: bool = False
    hardware: str | None = None
    versions: dict[str, str] | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Summary":
        """Read the plain values of any version."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def to_plain(self) -> dict[str, Any]:
        """Plain values by name; numbers that are not finite become ``None``."""
        values: dict[str, Any] = finite({field.name: getattr(self, field.name) for field in fields(self)})
        return values
