"""Random encoders of every family that a teacher may be, and audio for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    UniSpeechSatConfig,
    Wav2Vec2Config,
    WavLMConfig,
)

LAYERS, WIDTH = 5, 16
TINY: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,  # larger than usual, so that each layer changes its input visibly
    "conv_dim": (8,) * 7,
    "num_conv_pos_embedding_groups": 2,
}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
FAMILIES = {
    "hubert": lambda: HubertConfig(**TINY, num_conv_pos_embeddings=16),
    "hubert_large": lambda: HubertConfig(**TINY, num_conv_pos_embeddings=16, **STABLE),
    "wav2vec2": lambda: Wav2Vec2Config(**TINY, num_conv_pos_embeddings=16),
    "wav2vec2_large": lambda: Wav2Vec2Config(**TINY, num_conv_pos_embeddings=16, **STABLE),
    "wavlm": lambda: WavLMConfig(**TINY, num_conv_pos_embeddings=16),
    "wavlm_large": lambda: WavLMConfig(**TINY, num_conv_pos_embeddings=16, **STABLE),
    "unispeech_sat": lambda: UniSpeechSatConfig(**TINY, num_conv_pos_embeddings=16),
    "unispeech_sat_large": lambda: UniSpeechSatConfig(**TINY, num_conv_pos_embeddings=16, **STABLE),
    "data2vec_audio": lambda: Data2VecAudioConfig(**TINY, conv_pos_kernel_size=5),
}
STABLE_FAMILIES = tuple(name for name in FAMILIES if name.endswith("_large"))


def save_model(folder: Path, config: Any, model_class: Any = AutoModel.from_config) -> Path:
    """A random encoder on disk; norms get random values, or an applied norm would look like an identity."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    model.save_pretrained(folder)
    return folder


def waveforms(num_items: int = 2, num_samples: int = 8000) -> Tensor:
    return torch.randn(num_items, num_samples, generator=torch.Generator().manual_seed(1))


PADDED = torch.tensor([8000, 5000])


def padded_waveforms() -> Tensor:
    return waveforms().masked_fill(torch.arange(8000) >= PADDED[:, None], 0.0)


def far(left: Tensor, right: Tensor, margin: float = 0.05) -> bool:
    return float((left - right).abs().mean()) > margin
