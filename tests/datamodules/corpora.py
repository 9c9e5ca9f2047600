"""Small made-up corpora in LibriSpeech's layout."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def noise(num_samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    shape = (num_samples,) if channels == 1 else (num_samples, channels)
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def write_audio(path: Path, num_samples: int, seed: int = 0, rate: int = 16000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(num_samples, seed, channels), rate)
    return path


def utterance(root: Path, number: int, split: str = "train", suffix: str = "flac") -> Path:
    """Path of an utterance of chapter 198."""
    return root / split / "19" / "198" / f"19-198-{number:04d}.{suffix}"


def write_corpus(root: Path, lengths: Mapping[str, list[int]], transcripts: bool = True) -> Path:
    """Utterance i of a split has the i-th length in samples; texts are "WORD i"."""
    for split, samples in lengths.items():
        for number, num_samples in enumerate(samples):
            write_audio(utterance(root, number, split), num_samples, seed=number)
        if transcripts:
            write_transcripts(root, range(len(samples)), split)
    return root


def write_transcripts(root: Path, numbers: range | list[int], split: str = "train") -> Path:
    path = utterance(root, 0, split).with_name("19-198.trans.txt")
    path.write_text("".join(f"19-198-{number:04d} WORD {number}\n" for number in numbers), encoding="utf-8")
    return path


def truncate(path: Path, keep: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def storage_fault(path: Path, number: int) -> Callable[..., os.stat_result]:
    """An ``os.stat`` that fails for one file."""
    stat = os.stat

    def fail(asked: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(asked) == str(path):
            raise OSError(number, os.strerror(number), str(path))
        return stat(asked, *args, **kwargs)

    return fail
