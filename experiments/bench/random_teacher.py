"""A teacher with random weights for benchmarks, by default in HuBERT Base's sizes."""

from pathlib import Path

import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor


def save_random_teacher(folder: Path, layers: int = 12, width: int = 768, channels: int = 512) -> Path:
    """Write a HuBERT with ``layers`` layers of ``width`` and convolutions of ``channels`` channels to ``folder``."""
    config = HubertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        intermediate_size=4 * width,
        conv_dim=[channels] * 7,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder
