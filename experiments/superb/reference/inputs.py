"""Inputs and weights from formulas, so that s3prl's environment and this project's make the same ones.

Shapes: B batch, F frames, D width.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 16
"""Width of all features."""
FRAMES = (15, 12, 9)
"""Frames of the three utterances of PR, ASR, SF, KS, IC, SID and ER."""
ASV_FRAMES = (40, 33, 21)

PHONES = ("HH AH0 L OW1 W ER1 L D", "SIL K AE1 T", "AH0 B IY1")
LETTERS = ("HELLO WORLD", "A CAT", "IT'S")
SLOT_TYPES = ("object", "object_name", "artist", "playlist")
SLOT_TEXTS = ("PLAY JAZZ BY MILES\tO playlist O artist", "ADD & STOP\tO O object_name", "R B\tobject object")
KEYWORDS = ("yes/a_nohash_0", "no/a_nohash_0", "_silence_/b")
INTENTS = (("activate", "lights", "kitchen"), ("decrease", "volume", "none"), ("activate", "music", "none"))
SPEAKERS = ("id10003/video/00001", "id10001/video/00002", "id11251/other/00001")
EMOTIONS = (3, 0, 2)
ASV_SPEAKERS, ASV_TARGETS = 7, (2, 0, 6)
ASR_PATH = (4, 4, 6, 1, 1, 4, 0, 4, 5, 3, 4, 2)
"""Classes of frames with a ``<pad>`` (1), a blank (0), an ``<unk>`` (3) and a ``</s>`` (2) in them."""
ASR_GROUPS = 33, 16
"""Utterances, the n-th with 5000 + n samples, and size of a group."""
FBANK_SAMPLES = (16_000, 5_001)
"""Samples of the two waveforms of FBANK."""
ENCODER_SAMPLES = (4_000, 3_000)
CORRUPTIONS = ("spaces", "marks", "all")
CORRUPTED = 400
SEEDS = {
    "features": 10, "head": 20, "layers": 30, "layer_weights": 40, "waves": 50, "encoder_waves": 60, "slots": 70,
    "eer": 80, "probabilities": 90, "qbe": 100, "asv": 110, "sd": 120, "corrupt": 130,
}  # fmt: skip


class Segment(NamedTuple):
    """A speaker's segment, in seconds."""

    speaker: str
    start: float
    end: float


SD_SECONDS, SD_CHUNK, SD_HOP = 2.6, 50, 320
SD_SEGMENTS = (Segment("b", 0.105, 0.5), Segment("a", 0.31, 0.77), Segment("b", 0.8, 2.3), Segment("a", 2.2, 2.6))
"""The third one covers the second chunk (frames 50 to 99) and has no boundary in it."""
SD_FRAMES = (47, 46, 30)
"""Frames of the features; the labels of the chunks have 50, 50 and 30."""
SD_PROBABILITIES = 60
SD_GRID = tuple((threshold, median) for threshold in (0.3, 0.5, 0.7) for median in (1, 11))
QBE_QUERIES, QBE_DOCUMENTS = (12, 4, 7), (30, 22, 41, 6)
EER_TRIALS = 400
TRIALS = ((1, 0, 1), (0, 0, 2), (1, 2, 1))
"""Label and the two utterances of each trial."""


def noise(seed: int, *shape: int) -> np.ndarray:
    """Uniform numbers in [-1, 1), float64: splitmix64 of ``2**32 seed + position``."""
    z = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).reshape(shape)


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(noise(seed, *shape)).float()


def shares(seed: int, *shape: int) -> np.ndarray:
    """Uniform numbers in [0, 1)."""
    return (noise(seed, *shape) + 1) / 2


def features(seed: int, lengths: Sequence[int], width: int = WIDTH) -> list[Tensor]:
    """Features (F, D) of each utterance."""
    return [tensor(100 * seed + index, frames, width) for index, frames in enumerate(lengths)]


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Set the n-th parameter to ``sqrt(3 / last dimension) * noise(100 seed + n)``."""
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(math.sqrt(3 / parameter.shape[-1]) * tensor(100 * seed + index, *parameter.shape))


@torch.no_grad()
def fill_by_name(model: nn.Module) -> None:
    """Set the weights of an encoder, each by a seed from its name; scales of norms are about 1."""
    for name, parameter in sorted(model.named_parameters()):
        values = tensor(int(hashlib.sha1(name.encode()).hexdigest()[:7], 16), *parameter.shape)
        if name.endswith("original0") or ("norm" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.5 * values)
        else:
            parameter.copy_(values * (math.sqrt(3 / parameter[0].numel()) if parameter.ndim > 1 else 0.1))


def tiny_encoder(stable: bool) -> Any:
    """A HuBERT of three layers, with the norm of Base or of Large."""
    from transformers import HubertConfig, HubertModel

    kind: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    config = HubertConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **(kind if stable else {}),
    )  # fmt: skip
    model = HubertModel(config).eval()
    fill_by_name(model)
    return model


def waves(seed: int, lengths: Sequence[int]) -> list[Tensor]:
    """Waveforms (T,)."""
    return [0.1 * tensor(100 * seed + index, samples) for index, samples in enumerate(lengths)]


def slot_utterances() -> list[str]:
    """``words<TAB>tags`` of 400 utterances of 3 to 10 words, about half of them in slots."""
    vocabulary = ("PLAY", "THE", "ALBUM", "A", "BB", "IT'S", "EVE", "DUKE", "SONG", "TO")
    drawn = shares(SEEDS["slots"], CORRUPTED, 11, 3)
    texts = []
    for row in drawn:
        words: list[str] = []
        tags: list[str] = []
        for word, slot, keep in row[1 : 4 + int(8 * row[0, 0])]:
            words.append(vocabulary[int(word * len(vocabulary))])
            tag = SLOT_TYPES[int(2 * slot * len(SLOT_TYPES)) % len(SLOT_TYPES)] if slot < 0.5 else "O"
            tags.append(tags[-1] if tags and keep < 0.3 else tag)
        texts.append(f"{' '.join(words)}\t{' '.join(tags)}")
    return texts


def corrupted(labels: Sequence[int], kind: str, number: int, first_mark: int = 31) -> list[int]:
    """Classes of a hypothesis: those of utterance ``number`` with lost spaces, wrong marks, or any errors."""
    space, end = 3, first_mark + 2 * len(SLOT_TYPES)
    seed = SEEDS["corrupt"] * 1000 + 500 * CORRUPTIONS.index(kind) + number
    result: list[int] = []
    for label, (chance, place) in zip(labels, shares(seed, len(labels), 2), strict=True):
        mark = first_mark + int(place * (end - first_mark))
        other = 2 + int(place * (end - 2))
        if kind == "spaces":
            result += [] if label == space and chance < 0.4 else [label]
        elif kind == "marks" and label >= first_mark:
            wrong = [mark] if chance < 0.35 else [label, mark]
            result += [] if chance < 0.15 else wrong if chance < 0.45 else [label]
        elif kind == "all":
            wrong = [other] if chance < 0.12 else [other, label]
            result += [] if chance < 0.06 else wrong if chance < 0.16 else [label]
        else:
            result.append(label)
    return result
