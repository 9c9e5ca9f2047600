"""Settings of ``LibriSpeechDataModule``: what they may be, and which of them identify its batches."""

from collections.abc import Mapping
from typing import Any

from datamodules.errors import InputError

# Settings that change the samples of an optimizer step.
ORDER_SETTINGS = (
    *("sample_rate", "batch_size", "batch_seconds", "length", "max_samples", "min_samples", "resample"),
    *("batches_per_epoch", "seed"),
)
# Settings that change the fixed segments; the rows identify the corpus itself.
SEGMENT_SETTINGS = ("sample_rate", "batch_size", "batch_seconds", "max_samples", "resample", "segment_seed")
VALIDATION_SETTINGS = ("sample_rate", "resample")  # of its segments; their hash covers what else determines them


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of the data module.

    Raises:
        InputError: one of them has no valid value, or two contradict each other.
    """
    batch_size, batch_seconds = settings["batch_size"], settings["batch_seconds"]
    if (batch_size is None) == (batch_seconds is None):
        raise InputError(
            f"data.batch_size={batch_size} and data.batch_seconds={batch_seconds}: set exactly one, the other to null"
        )
    for name, known in (
        ("length", ("crop", "pad")),
        ("crop", ("random", "fixed")),
        ("on_bad_audio", ("error", "skip")),
    ):
        if settings[name] not in known:
            raise InputError(f"data.{name} is {settings[name]!r}; it may be {' or '.join(known)}")
    positive = ("batch_size", "batch_seconds", "val_batch_size", "batches_per_epoch", "min_samples", "length_grid")
    for name in (*positive, "segments_per_utterance"):
        if settings[name] is not None and settings[name] <= 0:
            raise InputError(f"data.{name} is {settings[name]}; it must be positive")
    if (most := settings["max_samples"]) < (least := settings["min_samples"]):
        raise InputError(f"data.max_samples ({most}) is below data.min_samples ({least})")
    if (grid := settings["length_grid"]) > 1 and settings["length"] == "pad":
        raise InputError(f"data.length_grid={grid} needs data.length=crop: data.length=pad crops nothing")
    if (places := settings["segments_per_utterance"]) > 1 and settings["crop"] != "fixed":
        raise InputError(
            f"data.segments_per_utterance={places} needs data.crop=fixed: random crops are others in every pass"
        )
    if settings["targets"] is not None:
        require_fixed(settings["crop"], settings["length"])
    if not settings["train_splits"]:
        raise InputError("data.train_splits is empty; name at least one folder to train on")


def require_fixed(crop: str, length: str) -> None:
    """Refuse segments whose targets cannot be cached.

    Raises:
        InputError: they change in every pass, or are padded.
    """
    if (crop, length) != ("fixed", "crop"):
        raise InputError(
            f"cached targets need data.crop=fixed and data.length=crop (not {crop} and {length}): the teacher's "
            f"targets change with the position of a crop and with padding"
        )
