"""The settings of a student, and the Hugging Face configuration that follows from them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HubertConfig

from datamodules.errors import InputError
from lightning_modules.architectures import COMPACT, HUBERT, config_class
from lightning_modules.compact_hubert import PAIR, CompactHubertConfig
from lightning_modules.front_end import FrontEnd
from lightning_modules.kernels import Kernels

OWN_DROPOUT = ("attention_dropout", "hidden_dropout", "activation_dropout")
"""Settings that replace the common rate of dropout in one place."""


@dataclass
class StudentConfig:
    """Sizes and regularisation of the student; the defaults are the paper's 12 x 384 (26.87M parameters).

    Args:
        hidden_size: width D of the Transformer.
        intermediate_size: width of the feed-forward layers.
        num_heads: attention heads per layer.
        num_layers: depth at the end of training; a growing run starts shallower.
        dropout: dropout of hidden states, attention weights and feed-forward activations, as in HuBERT.
        attention_dropout: dropout of attention weights; default: ``dropout``. Above 0 a CPU cannot use its fused
            attention.
        hidden_dropout: dropout of hidden states; default: ``dropout``.
        activation_dropout: dropout of feed-forward activations; default: ``dropout``.
        mask_time_prob: share of frames that SpecAugment, or masked distillation (``model.objective.masked``), masks in
            the student's input; 0 removes the mask embedding.
        mask_time_length: frames per mask.
        front_end: ``trained``, ``frozen`` (no gradient flows into the convolutions), ``shared`` (a frozen copy of the
            teacher's convolutions, whose features the teacher computes once for both), or ``trained_until_growth``
            (trained in the first stage and frozen from the first growth on).
        front_end_init: ``teacher`` copies the teacher's convolutions and their layout; ``random`` draws new ones with
            HuBERT Base's layout.
        conv_channels: channels of the convolutions that ``front_end_init=random`` draws; default: HuBERT Base's 512,
            which take half of a small student's step on a CPU.
        conv_layers: [channels, kernel, stride] of each convolution that ``front_end_init=random`` draws; default:
            HuBERT Base's. The strides must multiply to the teacher's, which is 320.
        front_end_gradient: factor of the gradient that flows into the convolutions; DistilHuBERT has 0.1.
        feature_norm: normalise the convolutions' output over its channels; DistilHuBERT does not.
        feature_projection: a linear layer from the convolutions' channels to ``hidden_size``. Without it, as in
            ARMHuBERT, both must be equal.
        input_dropout: dropout after that linear layer.
        init_layers: number of layers, from the first on, that start as copies of the teacher's, with its positional
            convolution and feature projection. The sizes of both models must be equal.
        time_reduction: frames that are joined to one inside the layers; FitHuBERT joins 2. Each layer's hidden state is
            brought back to the teacher's frame rate.
        reuse_attention: let every second layer use the attention map of the layer before it, as in ARMHuBERT; such
            layers have no queries and keys, and the student grows by pairs.
        scale_layer_gradients: multiply the gradient that layer i of N (from 0) gets from the layers above by
            m = (N - i) / (N - i + 1), and the one that it gets from its own losses by m (1 - m), as ARMHuBERT's code
            does.
        architecture: ``hubert``, ``compact_hubert`` or the dotted path of a subclass of transformers' ``HubertModel``
            of your own, such as ``my_students.MyModel``; default: the one that the settings above need.
        options: further fields of the configuration of an architecture of your own.
        compile: compile convolutions, feature projection, each layer and each loss with ``torch.compile``; one graph
            serves all layers, before and after a growth.
        compile_backend: backend of ``torch.compile``.
        kernels: implementation of the convolutions. ``plain`` is Hugging Face's; ``channels_last`` uses matrix products
            with channels after time, equal within rounding, meant for a GPU and not measured there; ``auto`` is
            ``plain``, which is faster on a CPU.
    """

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_heads: int = 8
    num_layers: int = 12
    dropout: float = 0.1
    attention_dropout: float | None = None
    hidden_dropout: float | None = None
    activation_dropout: float | None = None
    mask_time_prob: float = 0.0
    mask_time_length: int = 10
    front_end: Literal["trained", "frozen", "shared", "trained_until_growth"] = "trained"
    front_end_init: Literal["teacher", "random"] = "teacher"
    conv_channels: int | None = None
    conv_layers: list[list[int]] | None = None
    front_end_gradient: float = 1.0
    feature_norm: bool = True
    feature_projection: bool = True
    input_dropout: float = 0.0
    init_layers: int = 0
    time_reduction: int = 1
    reuse_attention: bool = False
    scale_layer_gradients: bool = False
    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    compile_backend: str = "inductor"
    kernels: Kernels = "auto"

    @property
    def starts_frozen(self) -> bool:
        """Whether the front end never learns, so that a cache can hold its features."""
        return self.front_end in ("frozen", "shared")


def dropout_rates(config: StudentConfig) -> dict[str, Any]:
    """Rates of attention, hidden and activation dropout, under the names of their settings.

    Raises:
        InputError: a rate is not at least 0 and below 1; the message names its setting.
    """
    own = {name: getattr(config, name) for name in OWN_DROPOUT}
    rates = {name: config.dropout if rate is None else rate for name, rate in own.items()}
    for name, rate in {"dropout": config.dropout, **rates}.items():
        if not 0 <= rate < 1:
            raise InputError(f"model.student.{name}={rate} must be at least 0 and below 1")
    return rates


def hubert_config(config: StudentConfig, front_end: FrontEnd | None) -> HubertConfig:
    """The Hugging Face configuration of a student, with the layout of ``front_end`` for its convolutions.

    Raises:
        InputError: settings do not fit each other; the message names them.
    """
    _require_fitting(config)
    compact = config.architecture == COMPACT or (config.architecture is None and _needs_compact(config))
    own: dict[str, Any] = dict(config.options)
    if compact:
        own["feature_projection"], own["time_reduction"] = config.feature_projection, config.time_reduction
        own["attention_reuse"] = "map" if config.reuse_attention else "none"
    made: type[HubertConfig] = CompactHubertConfig if compact else config_class(config.architecture or HUBERT)
    built = made(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_hidden_layers=config.num_layers,
        **dropout_rates(config),
        feat_proj_dropout=config.input_dropout,
        feat_proj_layer_norm=config.feature_norm,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=config.mask_time_prob,
        mask_time_length=config.mask_time_length,
        mask_feature_prob=0.0,
        apply_spec_augment=config.mask_time_prob > 0,
        **(front_end.config if front_end is not None else _drawn_convolutions(config)),
        **own,
    )
    if getattr(built, "do_stable_layer_norm", False):
        raise InputError(
            "model.student.options has do_stable_layer_norm=true: a student's layers end with their norms, as HuBERT "
            "Base's; leave it out"
        )
    if not config.feature_projection and built.conv_dim[-1] != config.hidden_size:
        raise InputError(
            f"model.student.feature_projection=false, but the convolutions have {built.conv_dim[-1]} channels and "
            f"model.student.hidden_size={config.hidden_size}: make them equal"
        )
    return built


def _needs_compact(config: StudentConfig) -> bool:
    return config.time_reduction != 1 or config.reuse_attention or not config.feature_projection


def _require_fitting(config: StudentConfig) -> None:
    """Refuse settings that contradict each other or are out of range."""
    where = "model.student."
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"{where}hidden_size={config.hidden_size} is not a multiple of {where}num_heads="
            f"{config.num_heads}: choose heads that divide the width"
        )
    for name in ("conv_channels", "conv_layers"):
        if (value := getattr(config, name)) is not None and config.front_end_init == "teacher":
            raise InputError(
                f"{where}{name}={value}, but {where}front_end_init=teacher copies the teacher's convolutions, "
                f"channels included: set {where}front_end_init=random"
            )
    if config.conv_channels is not None and config.conv_layers is not None:
        raise InputError(f"{where}conv_channels and {where}conv_layers both give the channels: remove one of them")
    if config.conv_channels is not None and config.conv_channels < 1:
        raise InputError(f"{where}conv_channels={config.conv_channels} must be at least 1")
    for layer in config.conv_layers or []:
        if len(layer) != 3 or min(layer) < 1:
            raise InputError(f"{where}conv_layers holds {layer}: every entry is [channels, kernel, stride], from 1 up")
    for name in ("front_end_gradient", "input_dropout"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise InputError(f"{where}{name}={value} must be from 0 to 1")
    if config.time_reduction < 1:
        raise InputError(f"{where}time_reduction={config.time_reduction} must be at least 1, which joins no frames")
    if not 0 <= config.init_layers <= config.num_layers:
        raise InputError(f"{where}init_layers={config.init_layers} must be from 0 to {where}num_layers")
    if config.reuse_attention and config.num_layers % PAIR:
        raise InputError(
            f"{where}reuse_attention=true makes pairs of layers, but {where}num_layers={config.num_layers} is odd"
        )
    if config.architecture not in (None, COMPACT) and _needs_compact(config):
        raise InputError(
            f"{where}time_reduction, {where}reuse_attention and {where}feature_projection are settings of "
            f"{where}architecture={COMPACT}, not of {config.architecture}"
        )
    if config.options and config.architecture in (None, HUBERT, COMPACT):
        raise InputError(f"{where}options={config.options} are for an {where}architecture of your own")


def _drawn_convolutions(config: StudentConfig) -> dict[str, Any]:
    """Layout of convolutions that are drawn; without settings HuBERT Base's."""
    if config.conv_channels is not None:
        return {"conv_dim": (config.conv_channels,) * len(HubertConfig().conv_dim)}
    if config.conv_layers is None:
        return {}
    channels, kernels, strides = zip(*config.conv_layers, strict=True)
    return {"conv_dim": channels, "conv_kernel": kernels, "conv_stride": strides}
