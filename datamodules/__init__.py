"""Speech corpora and the batches made from them. Names load on first use, so that an import stays fast."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LibriSpeechDataModule":
        from datamodules.librispeech import LibriSpeechDataModule

        return LibriSpeechDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
