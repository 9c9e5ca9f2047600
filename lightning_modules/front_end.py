"""Convolutional front ends, which turn waveforms into frames, and copies of a teacher's for a student.

Shapes: T samples.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from datamodules.frames import Length, count_windows

CONV_FIELDS = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_activation")


class FrontEnd(NamedTuple):
    """A convolutional front end that a HuBERT-layout student can copy.

    Attributes:
        config: the fields of ``HubertConfig`` that lay out the convolutions, as plain values.
        state_dict: weights for ``HubertModel.feature_extractor``.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]


def conv_frames(config: Any, num_samples: Length) -> list[Length]:
    """Number of frames after each convolution, for one length or a tensor of lengths (int64).

    Args:
        config: Hugging Face configuration with ``conv_kernel`` and ``conv_stride``.
        num_samples: lengths in samples.
    """
    lengths = [num_samples]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths.append(count_windows(lengths[-1], kernel, stride))
    return lengths[1:]


def copyable_front_end(feature_extractor: nn.Module, config: Any) -> FrontEnd | None:
    """A copy of the front end for a HuBERT student; ``None`` if HuBERT's weight names or outputs would differ."""
    layout: dict[str, Any] = {name: getattr(config, name) for name in CONV_FIELDS}
    layout = {name: list(value) if isinstance(value, tuple) else value for name, value in layout.items()}
    layout["feat_extract_norm"] = feat_extract_norm(config)
    layout["num_feat_extract_layers"] = len(layout["conv_dim"])
    # A plain dict of copies. `assign=True` below is stored in a state dict's metadata, and a student that loads
    # the same object would then silently share, and train, the teacher's own weights.
    state_dict = {name: value.clone() for name, value in feature_extractor.state_dict().items()}
    with torch.device("meta"):  # draws no random numbers and takes no memory
        twin = HubertFeatureEncoder(HubertConfig(**layout)).eval()
    try:
        twin.load_state_dict(dict(state_dict), assign=True)
    except RuntimeError:
        return None
    with torch.no_grad():
        same = torch.equal(twin(noise()), feature_extractor(noise()))
    return FrontEnd(layout, state_dict) if same else None


def feat_extract_norm(config: Any) -> str:
    """The kind of norm in the convolutions, ``group`` or ``layer``."""
    # data2vec-audio lacks the field and normalises every layer.
    return getattr(config, "feat_extract_norm", "layer")


def noise() -> Tensor:
    """One second of noise (1, T) from a separate generator, so that the caller's random state does not change."""
    return torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
