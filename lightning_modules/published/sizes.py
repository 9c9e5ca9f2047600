"""Sizes of a student in fairseq's names: from the shapes of its weights, and from settings what shapes do not show."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datamodules.errors import InputError

HEADS = 12
"""Attention heads of every published student, where a file does not say."""
STRIDES = {10: 5, 3: 2, 2: 2, 1: 1}
"""Stride of a convolution by its kernel, in every published student."""
REQUIRED = {
    "extractor_mode": "default",
    "conv_bias": False,
    "layer_type": "transformer",
    "attention_type": "original",
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "pos_conv_depth": 1,
    "crop_seq_to_multiple": 1,
}
"""Settings that change what a student computes, with the only value that is read."""
DROPOUTS = {
    "dropout_input": "feat_proj_dropout",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
}


def fairseq_fields(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Make the fields of the configuration, and list which settings were assumed.

    Args:
        weights: state dict of the student.
        settings: section ``distiller`` of its configuration; without any, the published values are assumed.

    Raises:
        InputError: a setting is not what this project computes, or does not fit the weights.
    """
    layers = [int(found[1]) for key in weights if (found := re.match(r"encoder\.layers\.(\d+)\.", key))]
    convs = {int(found[1]) for key in weights if (found := re.match(r"feature_extractor\.conv_layers\.(\d+)\.", key))}
    shapes = [shape_of(weights, f"feature_extractor.conv_layers.{conv}.0.weight") for conv in sorted(convs)]
    (width,) = shape_of(weights, "encoder.layer_norm.weight")
    _, group_width, kernel = shape_of(weights, "encoder.pos_conv.0.weight_v")
    fields = {
        "conv_dim": [shape[0] for shape in shapes],
        "conv_kernel": [shape[2] for shape in shapes],
        "conv_stride": [STRIDES.get(shape[2], 1) for shape in shapes],
        "hidden_size": width,
        "intermediate_size": shape_of(weights, "encoder.layers.0.fc1.weight")[0],
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": HEADS,
        "num_conv_pos_embeddings": kernel,
        "num_conv_pos_embedding_groups": width // group_width,
        "feat_proj_layer_norm": "layer_norm.weight" in weights,
        "layerdrop": 0.0,
        "mask_time_prob": 0.05 if "mask_emb" in weights else 0.0,
    }
    if "post_extract_proj.weight" not in weights:
        fields["feature_projection"] = False
    if not settings:
        if width % HEADS:
            raise InputError(f"{HEADS} attention heads, as published, do not divide its width {width}: give --config")
        return fields, [f"{HEADS} attention heads", f"strides {fields['conv_stride']}"]
    own = {
        "encoder_layers": fields["num_hidden_layers"],
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": fields["intermediate_size"],
        "conv_pos_groups": fields["num_conv_pos_embedding_groups"],
    }
    require(settings, REQUIRED)
    require(settings, own, "its weights have")
    heads = value_of(settings, "encoder_attention_heads")
    if width % heads:
        raise InputError(f"its settings have encoder_attention_heads={heads}, which does not divide its width {width}")
    fields |= {"conv_stride": _strides(settings, shapes), "num_attention_heads": heads}
    return fields | {field: settings[name] for name, field in DROPOUTS.items() if name in settings}, []


def _strides(settings: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> list[int]:
    """Strides of a list such as ``[(512, 10, 5)] + [(512, 3, 2)] * 4``, whose sizes must be those of the weights."""
    text = str(settings.get("conv_feature_layers") or settings.get("extractor_conv_feature_layers"))
    found: list[tuple[int, ...]] = []
    for group, times in re.findall(r"\[(.*?)\](?:\s*\*\s*(\d+))?", text):
        layers = re.findall(r"\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", group)
        found += int(times or 1) * [tuple(map(int, layer)) for layer in layers]
    sizes = [(shape[0], shape[2]) for shape in shapes]
    if [layer[:2] for layer in found] != sizes:
        raise InputError(f"its settings have the convolutions {text}, but its weights have (channels, kernel) {sizes}")
    return [layer[2] for layer in found]


def require(settings: Mapping[str, Any], required: Mapping[str, Any], why: str = "this project computes") -> None:
    """Refuse settings that have another value than a required one; a setting may be absent."""
    for name, value in required.items():
        if settings.get(name, value) != value:
            raise InputError(f"its settings have {name}={settings[name]!r}, but {why} {value!r}")


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a setting, which must be there."""
    if name not in settings:
        raise InputError(f"its settings lack {name}")
    return settings[name]


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a weight, which must be there."""
    if name not in weights:
        raise InputError(f"it lacks the weight {name}")
    return tuple(weights[name].shape)
