"""The layouts of published students. A reader is a function of a file's entries and of settings.

Names and shapes are those of the projects' code. Sizes come from the weights' shapes; settings, from the file or from
the YAML file beside it, give the rest.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from datamodules.errors import InputError
from lightning_modules.compact_hubert import PAIR
from lightning_modules.published.renaming import FAIRSEQ, TORCHAUDIO, Rules, listed, renamed
from lightning_modules.published.sizes import fairseq_fields, require, shape_of, value_of

Contents = Mapping[str, Any]
STUDENT = "student_model."
REQUIRED_TO_JOIN = {"tr_layer_type": "conv1d", "tr_layer_index": 0, "required_seq_len_multiple": 1}
REQUIRED_OF_PRUNED = {
    "extractor_mode": "group_norm",
    "extractor_conv_bias": False,
    "encoder_layer_norm_first": False,
    "aux_num_out": None,
}
FIELDS_OF_PRUNED = {
    "hidden_size": "encoder_embed_dim",
    "num_hidden_layers": "encoder_num_layers",
    "layer_head_width": "encoder_head_dim",
    "num_conv_pos_embeddings": "encoder_pos_conv_kernel",
    "num_conv_pos_embedding_groups": "encoder_pos_conv_groups",
    "feat_proj_dropout": "encoder_projection_dropout",
    "hidden_dropout": "encoder_dropout",
    "attention_dropout": "encoder_attention_dropout",
    "activation_dropout": "encoder_ff_interm_dropout",
}
HEADS_OF_LAYERS: Rules = {
    r"encoder\.reduce\.(\w+)": r"encoder.reduce.\1",
    r"proj_head\.(\d+)\.upsampler\.(\w+)": r"encoder.layers.\1.restore.\2",
    r"proj_head\.(\d+)\.lin_proj\.(\w+)": r"encoder.layers.\1.state_projection.\2",
    r"upsampler\.(\w+)": None,
    r"final_proj\.(weight|bias)": None,
}
UNUSED = {"upsampler": "a transposed convolution that is never called", "final_proj": "a head for training only"}

PLAIN_STATES = "The hidden states are the input of the first layer and the state of each layer."
PROJECTED_STATES = (
    "The hidden states are those of its heads: the state of each layer, projected to the teacher's width. The input of "
    "the first layer is not among them."
)
IN_S3PRL = (
    "In s3prl the feature `paper` is the last hidden state. The list hidden_states there begins with the projected "
    "features before the positional convolution, and ends with the outputs of the heads."
)
IN_STARHUBERT = "The authors' list of hidden states has no input of the first layer."
IN_DPHUBERT = "The authors' first hidden state is the projection before the positional convolution."
JOINED = (
    "The authors' code drops a last frame without partner; here it is joined with zeros. So an utterance with an odd "
    "number of frames has other states than there."
)
REUSED = (
    "A reused attention map passes a second softmax, as in the authors' code. There a batch of several utterances "
    "mixes the maps of utterances and heads; here every utterance has its own."
)


class Published(NamedTuple):
    """A published student in HuBERT's terms.

    Attributes:
        layout: name of the layout.
        fields: fields of ``CompactHubertConfig`` that it sets.
        weights: state dict in the names of the model.
        left_out: what the file has and the model has not.
        remarks: what a user should know of the model.
        assumed: settings that the file does not have.
        teacher: name of its teacher in the file.
        normalize: whether waveforms get zero mean and unit variance.
    """

    layout: str
    fields: dict[str, Any]
    weights: dict[str, Tensor]
    left_out: list[str]
    remarks: list[str]
    assumed: list[str]
    teacher: str = "unknown"
    normalize: bool = False


class Layout(NamedTuple):
    """One layout of files.

    Attributes:
        describes: its students and how a file of it is recognised, for messages.
        fits: whether a file's entries have it.
        read: reader of the entries, and of settings that replace the file's own.
    """

    describes: str
    fits: Callable[[Contents], bool]
    read: Callable[[Contents, Contents], Published]


def read_published(contents: Contents, settings: Contents | None = None) -> Published:
    """Read a student of any known layout.

    Args:
        contents: entries of the file.
        settings: section ``distiller`` of the YAML file beside it; ``None``: the file's own settings.

    Raises:
        InputError: the layout is not known, or the student has a part that no model of this project has.
    """
    for layout in LAYOUTS:
        if layout.fits(contents):
            return layout.read(contents, settings or {})
    inner = contents.get("state_dict")
    weights = f"; its state_dict begins with {listed(list(inner))}" if isinstance(inner, dict) else ""
    raise InputError(
        f"its layout is not known. Its first entries are {listed(list(map(str, contents)))}{weights}. "
        f"Known are {'; '.join(layout.describes for layout in LAYOUTS)}"
    )


def distilhubert(contents: Contents, settings: Contents) -> Published:
    """DistilHuBERT of s3prl (Chang et al., ICASSP 2022)."""
    own, weights = _entry(contents, "Config"), contents["Distiller"]
    fields, assumed = fairseq_fields(weights, settings or _entry(own, "distiller"))
    return Published(
        "DistilHuBERT",
        fields,
        renamed(weights, {**FAIRSEQ, r"output_layer\..*": None}),
        _present(weights, {"output_layer": "heads that predict the teacher's layers"}),
        [PLAIN_STATES, IN_S3PRL],
        assumed,
        str(_entry(own, "teacher").get("model", "unknown")),
    )


def lightning_student(contents: Contents, settings: Contents) -> Published:
    """FitHuBERT (Lee et al., Interspeech 2022), MaskHuBERT and ARMHuBERT (Jang et al., 2023), STaRHuBERT (2024)."""
    own = _entry(_entry(contents, "hyper_parameters"), "cfg")
    settings = settings or _entry(own, "distiller")
    weights = {
        key.removeprefix(STUDENT): value for key, value in contents["state_dict"].items() if key.startswith(STUDENT)
    }
    if any(re.match(r"final_proj\.(lin_proj|upsampler)\.", key) for key in weights):
        raise InputError(
            "only the head of its last layer is left (final_proj), so the other layers have no hidden states: convert "
            "the file that the training wrote, with proj_head.0 to the last"
        )
    weights, joined = _reduction_apart(weights, settings)
    fields, assumed = fairseq_fields(weights, settings)
    name, remarks = "STaRHuBERT", [PLAIN_STATES, IN_STARHUBERT]
    if "proj_head.0.lin_proj.weight" in weights:
        name, remarks = "MaskHuBERT", [PROJECTED_STATES]
        fields["state_width"] = shape_of(weights, "proj_head.0.lin_proj.weight")[0]
    if _reuses_attention(weights, fields["num_hidden_layers"]):
        name, remarks = "ARMHuBERT", [*remarks, REUSED]
        fields["attention_reuse"] = "softmax"
    if joined > 1:
        name, remarks = "FitHuBERT", [*remarks, JOINED]
        fields["time_reduction"] = joined
    teacher = str(_entry(own, "teacher").get("teacher_model", "unknown")).rpartition("/")[2]
    left_out = _present(weights, UNUSED)
    return Published(
        name, fields, renamed(weights, {**FAIRSEQ, **HEADS_OF_LAYERS}), left_out, remarks, assumed, teacher
    )


def _reduction_apart(weights: dict[str, Tensor], settings: Contents) -> tuple[dict[str, Tensor], int]:
    """Name the time reduction ``encoder.reduce`` and number the layers without it; also the number of joined frames."""
    places = [match for key in weights if (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(\d\.)?weight", key))]
    if not places:
        return weights, 1
    place, kernel = places[0], weights[places[0][0]]
    if place[1] != "0" or kernel.ndim != 3:
        raise InputError(
            f"its time reduction is {place[0]} of shape {list(kernel.shape)} (tr_layer_index, tr_layer_type): only a "
            "convolution before the first layer is read, as FitHuBERT has"
        )
    require(settings, REQUIRED_TO_JOIN)
    apart = {}
    for key, value in weights.items():
        if layer := re.match(r"encoder\.layers\.(\d+)\.", key):
            number = int(layer[1])
            key = (f"encoder.layers.{number - 1}." if number else "encoder.reduce.") + key[layer.end() :]
        apart[key] = value
    return apart, kernel.shape[2]


def _reuses_attention(weights: Mapping[str, Tensor], layers: int) -> bool:
    reusing = [number for number in range(layers) if f"encoder.layers.{number}.self_attn.q_proj.weight" not in weights]
    if reusing and reusing != [number for number in range(layers) if number % PAIR]:
        raise InputError(
            f"layers {reusing} have no queries (reuse_pattern): every second layer, from layer 1 on, must reuse the "
            "attention map of the layer before it"
        )
    return bool(reusing)


def dphubert(contents: Contents, settings: Contents) -> Published:
    """DPHuBERT (Peng et al., Interspeech 2023)."""
    own: dict[str, Any] = contents["config"]
    if settings:
        raise InputError("a file of DPHuBERT has its own settings: leave out --config")
    if "encoder_remaining_heads" in own:
        raise InputError("it is a DPWavLM, whose attention has relative positions; of this kind only DPHuBERT is read")
    require(own, REQUIRED_OF_PRUNED)
    fields = {field: value_of(own, name) for field, name in FIELDS_OF_PRUNED.items()}
    convs = value_of(own, "extractor_conv_layer_config")
    if not isinstance(convs, list | tuple) or not all(_are_integers(conv, 3) for conv in convs):
        raise InputError(f"its settings have extractor_conv_layer_config={convs!r}, not a list of triples of numbers")
    inner = _where(own, "encoder_use_feed_forward", "encoder_ff_interm_features")
    fields |= {
        **{
            name: [conv[place] for conv in convs]
            for place, name in enumerate(("conv_dim", "conv_kernel", "conv_stride"))
        },
        "feature_scale": True,
        "num_attention_heads": fields["hidden_size"] // fields["layer_head_width"],
        "layer_heads": _where(own, "encoder_use_attention", "encoder_num_heads"),
        "intermediate_size": max(inner),
        "layer_intermediate_sizes": inner,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
    }
    return Published(
        "DPHuBERT",
        fields,
        renamed(contents["state_dict"], TORCHAUDIO),
        _present(contents, {"distill_linear_projs": "projections that predict the teacher's layers"}),
        [PLAIN_STATES, IN_DPHUBERT],
        [],
        normalize=bool(value_of(own, "normalize_waveform")),
    )


def _where(settings: Mapping[str, Any], used: str, sizes: str) -> list[int]:
    """Sizes of each layer's part, 0 where it was removed."""
    layers = value_of(settings, "encoder_num_layers")
    for name in (used, sizes):
        if not _are_integers(values := value_of(settings, name), layers):
            raise InputError(f"its settings have {name}={values!r}, not a number for each of {layers} layers")
    return [size if is_used else 0 for is_used, size in zip(settings[used], settings[sizes], strict=True)]


def _are_integers(values: Any, count: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == count and all(isinstance(one, int) for one in values)


def _entry(entries: Contents, name: str) -> Contents:
    """The entries below a name; none if there are none."""
    found = entries.get(name)
    return found if isinstance(found, dict) else {}


def _present(entries: Contents, described: Mapping[str, str]) -> list[str]:
    """Those of the described parts that a file has."""
    return [f"{part} ({text})" for part, text in described.items() if any(key.split(".")[0] == part for key in entries)]


LAYOUTS = (
    Layout(
        "DistilHuBERT of s3prl (entries Distiller and Config)", lambda it: bool(_entry(it, "Distiller")), distilhubert
    ),
    Layout(
        f"FitHuBERT, MaskHuBERT, ARMHuBERT and STaRHuBERT (entry state_dict with {STUDENT}*)",
        lambda it: any(key.startswith(STUDENT) for key in _entry(it, "state_dict")),
        lightning_student,
    ),
    Layout(
        "DPHuBERT (entries state_dict, and config with encoder_use_attention)",
        lambda it: bool(_entry(it, "state_dict")) and "encoder_use_attention" in _entry(it, "config"),
        dphubert,
    ),
)
