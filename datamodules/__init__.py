"""Speech corpora and what is made of them; names load when they are used, so that an import stays light."""

from typing import Any

__all__ = ["LibriSpeechDataModule"]


def __getattr__(name: str) -> Any:
    if name == "LibriSpeechDataModule":
        from datamodules.librispeech import LibriSpeechDataModule

        return LibriSpeechDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
