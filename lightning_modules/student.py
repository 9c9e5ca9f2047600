"""The student: a HuBERT-layout encoder whose depth can change while it trains.

Shapes: B batch, T samples (16 kHz), F frames, D width, L layers.

Facts that shape this file were measured on transformers 5.23:

* LayerDrop and SpecAugment are on by default in ``HubertConfig``. Here LayerDrop is off, since a skipped layer has no
  gradient and no hidden state, and SpecAugment is on only with ``mask_time_prob``.
* Hugging Face installs its hidden-state capture hooks once per model, so a layer added later can be missing from
  ``hidden_states``. The forward pass below is an explicit loop over the layers instead; its values are identical.
* ``requires_grad_(False)`` alone leaves the backward pass of the convolutions on;
  ``feature_extractor._freeze_parameters()`` removes it (a step took 4.6 s with the flag only, 2.8 s really frozen).
  The cause is ``feature_extractor._requires_grad``, which turns on the gradient to the waveform. Nothing uses that
  gradient, and it is a third of the first convolution's cost, so it is off for a trained front end too.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel
from transformers.masking_utils import create_bidirectional_mask

from datamodules.errors import InputError
from lightning_modules import dropout, positions
from lightning_modules.compiling import compile_in_place, compiled_parts
from lightning_modules.front_end import FrontEnd, conv_frames
from lightning_modules.growth.policies import Initialise, compose_ancestry, kept_positions
from lightning_modules.kernels import Kernels, install
from lightning_modules.lengths import before_the_end

OWN_DROPOUT = ("attention_dropout", "hidden_dropout", "activation_dropout")
"""Settings that replace the common rate of dropout in one place."""


FROZEN = "frozen_front_end"
"""Key of the student's extra state if a growth has frozen its front end."""


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
    compile: bool = False
    compile_backend: str = "inductor"
    kernels: Kernels = "auto"


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
    """The Hugging Face configuration of a student, with the layout of ``front_end`` for its convolutions."""
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"model.student.hidden_size={config.hidden_size} is not a multiple of model.student.num_heads="
            f"{config.num_heads}: choose heads that divide the width"
        )
    layout: dict[str, Any] = front_end.config if front_end is not None else {}
    if config.conv_channels is not None:
        layout = {"conv_dim": _narrow_convolutions(config)}
    return HubertConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_hidden_layers=config.num_layers,
        **dropout_rates(config),
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=config.mask_time_prob,
        mask_time_length=config.mask_time_length,
        mask_feature_prob=0.0,
        apply_spec_augment=config.mask_time_prob > 0,
        **layout,
    )


def _narrow_convolutions(config: StudentConfig) -> tuple[int, ...]:
    """HuBERT Base's seven convolutions with the configured channels."""
    assert config.conv_channels is not None
    if config.front_end_init == "teacher":
        raise InputError(
            f"model.student.conv_channels={config.conv_channels}, but model.student.front_end_init=teacher copies the "
            "teacher's convolutions, channels included: set model.student.front_end_init=random"
        )
    if config.conv_channels < 1:
        raise InputError(f"model.student.conv_channels={config.conv_channels} must be at least 1")
    return (config.conv_channels,) * len(HubertConfig().conv_dim)


def state_dict_depth(state_dict: dict[str, Any], prefix: str = "") -> int:
    """Number of Transformer layers in a state dict of a ``HubertModel`` under ``prefix``; 0 if there are none."""
    pattern = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    return max((int(match[1]) + 1 for key in state_dict if (match := pattern.match(key))), default=0)


def _match_depth(hubert: HubertModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rebuild the stack to the depth of the state dict that is about to be loaded, deeper or shallower.

    A pre-hook on the ``HubertModel`` also works for plain ``load_state_dict``, averaged copies and evaluation code.
    The hooks of callbacks run too late, after the weights are loaded.
    """
    depth, layers = state_dict_depth(state_dict, prefix), list(hubert.encoder.layers)
    if depth and depth != len(layers):
        layers += [_clone(hubert, layers[-1]) for _ in range(depth - len(layers))]
        _set_layers(hubert, layers[:depth])


def _clone(hubert: HubertModel, layer: nn.Module) -> nn.Module:
    # The memo keeps one shared config object, since a copy would miss later edits such as the attention kernel.
    return copy.deepcopy(layer, {id(hubert.config): hubert.config})


def _set_layers(hubert: HubertModel, layers: Sequence[nn.Module]) -> None:
    hubert.encoder.layers = nn.ModuleList(layers)
    hubert.config.num_hidden_layers = len(layers)  # otherwise a reload would silently build another depth


def _zero_outputs(layer: Any) -> list[nn.Parameter]:
    """Zero the attention and feed-forward output projections; returns the parameters that were zeroed."""
    zeroed = [*layer.attention.out_proj.parameters(), *layer.feed_forward.output_dense.parameters()]
    for parameter in zeroed:
        nn.init.zeros_(parameter)
    return zeroed


def _reinitialise(layer: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw HuBERT's initialisation on the CPU, so that every rank and every device gets the same numbers."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Student(nn.Module):
    """A ``HubertModel`` that returns all hidden states and can grow by a plan.

    Args:
        config: sizes and settings of the student.
        front_end: the teacher's convolutions to copy; ``None`` if it has none or ``front_end_init`` is ``random``.

    Attributes:
        hubert: the Hugging Face model; it loads a state dict of any depth.
        ancestry: for each layer, the first-stage layer that it descends from (0-based), ``None`` for a fresh one.
        originals: for each first-stage layer, the present position of that same module (0-based).
        frozen_front_end: whether the convolutions do not train any more.
    """

    def __init__(self, config: StudentConfig, front_end: FrontEnd | None = None) -> None:
        super().__init__()
        self.config = config
        if config.front_end == "shared" and config.front_end_init != "teacher":
            raise InputError(
                f"model.student.front_end=shared, but model.student.front_end_init={config.front_end_init}: what is "
                "shared is a copy of the teacher's, so set model.student.front_end_init=teacher"
            )
        if config.front_end_init == "teacher" and front_end is None:
            raise InputError(
                "model.student.front_end_init=teacher, but this teacher has no convolutional front end that a HuBERT "
                "student can copy: set model.student.front_end_init=random"
            )
        front_end = front_end if config.front_end_init == "teacher" else None
        self.hubert = HubertModel(hubert_config(config, front_end))
        dropout.install(self.hubert)
        positions.install(self.hubert)
        self.hubert.register_load_state_dict_pre_hook(_match_depth)
        if front_end is not None:
            self.hubert.feature_extractor.load_state_dict(front_end.state_dict)
        self.hubert.feature_extractor._requires_grad = False  # no gradient to the waveform
        self.frozen_front_end = False
        if config.front_end in ("frozen", "shared"):
            self._freeze_front_end()
        install(self.hubert.feature_extractor, config.kernels)
        self.ancestry: list[int | None] = list(range(config.num_layers))
        self.originals: list[int] = list(range(config.num_layers))

    @property
    def depth(self) -> int:
        """Current number of Transformer layers."""
        return len(self.hubert.encoder.layers)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Frames (int64, same shape) that the front end outputs for ``num_samples`` samples."""
        return conv_frames(self.hubert.config, num_samples.to(torch.long))[-1]

    def start_at(self, depth: int) -> None:
        """Cut the freshly built student to the first ``depth`` layers: the first stage of a growing run."""
        if not 1 <= depth <= self.depth:
            raise InputError(f"the first stage has {depth} layers, but the student was built with {self.depth}")
        _set_layers(self.hubert, list(self.hubert.encoder.layers)[:depth])
        self.ancestry, self.originals = list(range(depth)), list(range(depth))

    def features(self, waveforms_BT: Tensor) -> Tensor:
        """Features (B, F, C) of the convolutions, before the feature projection."""
        return self.hubert.feature_extractor(waveforms_BT).transpose(1, 2)

    def forward(
        self,
        waveforms_BT: Tensor | None,
        num_samples_B: Tensor | None = None,
        features_BFC: Tensor | None = None,
        mask_BF: Tensor | None = None,
    ) -> list[Tensor]:
        """Hidden states, depth + 1 of (B, F, D): entry 0 is the input of the first layer, entry k the k-th output.

        ``num_samples_B`` (valid samples per item) is ``None`` if no item is padded; then no mask is made.
        ``features_BFC`` are the features of a frozen front end if they are already known; waveforms are not used then.
        ``mask_BF`` is true for the frames that are masked; with ``None`` SpecAugment chooses them in training.
        """
        hubert, encoder = self.hubert, self.hubert.encoder
        if self.config.compile:
            compile_in_place(compiled_parts(hubert), self.config.compile_backend)
        if features_BFC is None:
            assert waveforms_BT is not None
            features_BFC = self.features(waveforms_BT)
        valid_BF = self._valid_frames(features_BFC, num_samples_B)
        hidden_BFD = hubert.feature_projection(features_BFC)
        hidden_BFD = hubert._mask_hidden_states(
            hidden_BFD, mask_time_indices=mask_BF, attention_mask=cast(torch.LongTensor, valid_BF)
        )
        if valid_BF is not None:
            hidden_BFD = hidden_BFD.masked_fill(~valid_BF.unsqueeze(-1), 0.0)
        mask = create_bidirectional_mask(config=hubert.config, inputs_embeds=hidden_BFD, attention_mask=valid_BF)
        hidden_BFD = encoder.layer_norm(hidden_BFD + encoder.pos_conv_embed(hidden_BFD))
        hidden_states = [encoder.dropout(hidden_BFD)]
        for layer in encoder.layers:
            hidden_states.append(layer(hidden_states[-1], attention_mask=mask))
        return hidden_states

    def _freeze_front_end(self) -> None:
        self.hubert.feature_extractor._freeze_parameters()
        self.frozen_front_end = True

    def _valid_frames(self, features_BFC: Tensor, num_samples_B: Tensor | None) -> Tensor | None:
        if num_samples_B is None:
            return None
        return before_the_end(self.num_frames(num_samples_B), features_BFC.shape[1], features_BFC.device)

    @torch.no_grad()
    def grow(
        self, plan: Sequence[int | None], initialise: Initialise = "copy", seed: int = 0
    ) -> dict[nn.Parameter, nn.Parameter | None]:
        """Rebuild the stack by ``plan``, and freeze a front end that is trained until the first growth.

        The first position that names a layer keeps that same module; every further one gets a clone. Kept
        parameters stay the same objects, so an optimizer's state for them stays valid.

        Args:
            plan: index of the source (0-based) of each new layer, ``None`` for a fresh layer.
            initialise: initial values of clones: ``copy`` of the source, or ``zero_output`` (a copy whose output
                projections are zero).
            seed: random seed of fresh layers; their generator is seeded by (seed, depth), the same on all ranks.

        Returns:
            The source of every new parameter, or ``None`` where its values are not copied from one.
        """
        old = list(self.hubert.encoder.layers)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(old))
        sources: dict[nn.Parameter, nn.Parameter | None] = {}
        layers: list[nn.Module] = []
        for source in plan:
            template = old[source if source is not None else -1]
            if source is not None and template not in layers:
                layers.append(template)
                continue
            layer = _clone(self.hubert, template)
            sources |= dict(zip(layer.parameters(), template.parameters(), strict=True))
            if source is None:
                _reinitialise(layer, self.hubert.config.initializer_range, generator)
                sources |= dict.fromkeys(layer.parameters())
            elif initialise == "zero_output":
                sources |= dict.fromkeys(_zero_outputs(layer))
            layers.append(layer)
        _set_layers(self.hubert, layers)
        if self.config.front_end == "trained_until_growth":
            self._freeze_front_end()
        kept = kept_positions(plan, len(old))
        self.ancestry = compose_ancestry(self.ancestry, plan)
        self.originals = [kept[position] for position in self.originals]
        return sources

    def get_extra_state(self) -> dict[str, list[Any]]:
        """The lineage of the layers. It is saved with the weights, because ``attach=original`` depends on it.

        So is a front end that was frozen by a growth: the optimizer of a resumed run must not have it.
        """
        lineage: dict[str, list[Any]] = {"ancestry": list(self.ancestry), "originals": list(self.originals)}
        frozen = self.frozen_front_end and self.config.front_end == "trained_until_growth"
        return lineage | ({FROZEN: [True]} if frozen else {})

    def set_extra_state(self, state: dict[str, list[Any]]) -> None:
        self.ancestry, self.originals = list(state["ancestry"]), list(state["originals"])
        if FROZEN in state and self.config.front_end == "trained_until_growth":
            self._freeze_front_end()
