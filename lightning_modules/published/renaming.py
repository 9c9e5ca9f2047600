"""Names of weights: those of fairseq (and s3prl) and of torchaudio, in the names of Hugging Face's HuBERT."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from datamodules.errors import InputError

Rules = Mapping[str, str | None]
"""Regular expression of a whole name -> the name in HuBERT, or ``None`` if the weight is left out."""

_WEIGHT_NORM = {"g": "original0", "v": "original1"}

FAIRSEQ: Rules = {
    r"feature_extractor\.conv_layers\.(\d+)\.0\.(\w+)": r"feature_extractor.conv_layers.\1.conv.\2",
    r"feature_extractor\.conv_layers\.0\.2\.(\w+)": r"feature_extractor.conv_layers.0.layer_norm.\1",
    r"post_extract_proj\.(\w+)": r"feature_projection.projection.\1",
    r"layer_norm\.(\w+)": r"feature_projection.layer_norm.\1",
    r"mask_emb": r"masked_spec_embed",
    r"encoder\.pos_conv\.0\.bias": r"encoder.pos_conv_embed.conv.bias",
    **{
        rf"encoder\.pos_conv\.0\.weight_{part}": f"encoder.pos_conv_embed.conv.parametrizations.weight.{name}"
        for part, name in _WEIGHT_NORM.items()
    },
    r"encoder\.layer_norm\.(\w+)": r"encoder.layer_norm.\1",
    r"encoder\.layers\.(\d+)\.self_attn\.(\w+)\.(\w+)": r"encoder.layers.\1.attention.\2.\3",
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)": r"encoder.layers.\1.layer_norm.\2",
    r"encoder\.layers\.(\d+)\.fc1\.(\w+)": r"encoder.layers.\1.feed_forward.intermediate_dense.\2",
    r"encoder\.layers\.(\d+)\.fc2\.(\w+)": r"encoder.layers.\1.feed_forward.output_dense.\2",
    r"encoder\.layers\.(\d+)\.final_layer_norm\.(\w+)": r"encoder.layers.\1.final_layer_norm.\2",
}

TORCHAUDIO: Rules = {
    r"feature_extractor\.conv_layers\..*": r"\g<0>",
    r"feature_extractor\.dummy_weight": r"feature_projection.scale",
    r"encoder\.feature_projection\.(.*)": r"feature_projection.\1",
    **{
        rf"encoder\.transformer\.pos_conv_embed\.conv\.weight_{part}": (
            f"encoder.pos_conv_embed.conv.parametrizations.weight.{name}"
        )
        for part, name in _WEIGHT_NORM.items()
    },
    r"encoder\.transformer\.(.*)": r"encoder.\1",
}


def renamed(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename weights by the first rule that fits each.

    Raises:
        InputError: no rule fits a weight.
    """
    found, unknown = {}, []
    for name, value in weights.items():
        match = next(filter(None, (re.fullmatch(rule, name) for rule in rules)), None)
        if match is None:
            unknown.append(name)
        elif (new := rules[match.re.pattern]) is not None:
            found[match.expand(new)] = value
    if unknown:
        raise InputError(f"this layout has no place for {listed(unknown)}")
    return found


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
