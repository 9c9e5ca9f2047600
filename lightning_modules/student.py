"""The student: an encoder in HuBERT's layout whose depth can change while it trains.

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

from collections.abc import Container, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from datamodules.cached_records import CachedRecords
from datamodules.errors import InputError
from lightning_modules import dropout, positions
from lightning_modules.architectures import build_model
from lightning_modules.compiling import compile_in_place, compiled_parts
from lightning_modules.front_end import FrontEnd, conv_frames
from lightning_modules.gradients import scale_gradient
from lightning_modules.growth.layers import Sources, grow_layers, layer_group, match_depth, set_layers
from lightning_modules.growth.policies import Initialise, compose_ancestry, kept_positions
from lightning_modules.kernels import install
from lightning_modules.lengths import before_the_end
from lightning_modules.masking import mask_states
from lightning_modules.student_config import StudentConfig, hubert_config

FROZEN = "frozen_front_end"
"""Key of the student's extra state if a growth has frozen its front end."""


class Student(nn.Module):
    """A model of :mod:`lightning_modules.architectures` that returns all hidden states and can grow by a plan.

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
        plain = hubert_config(config, front_end).to_dict()
        self.hubert = build_model(plain, config.architecture)
        dropout.install(self.hubert)
        positions.install(self.hubert)
        self.hubert.register_load_state_dict_pre_hook(match_depth)
        if front_end is not None:
            self.hubert.feature_extractor.load_state_dict(front_end.state_dict)
        self.hubert.feature_extractor._requires_grad = False  # no gradient to the waveform
        self.frozen_front_end = False
        if config.starts_frozen:
            self._freeze_front_end()
        install(self.hubert.feature_extractor, config.kernels)
        self.ancestry: list[int | None] = list(range(config.num_layers))
        self.originals: list[int] = list(range(config.num_layers))

    @property
    def depth(self) -> int:
        """Current number of Transformer layers."""
        return len(self.hubert.encoder.layers)

    @property
    def layer_group(self) -> int:
        """Number of layers that stay together when the student grows."""
        return layer_group(self.hubert)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Frames (int64, same shape) that the front end outputs for ``num_samples`` samples."""
        return conv_frames(self.hubert.config, num_samples.to(torch.long))[-1]

    def start_at(self, depth: int) -> None:
        """Cut the freshly built student to the first ``depth`` layers: the first stage of a growing run."""
        if not 1 <= depth <= self.depth:
            raise InputError(f"the first stage has {depth} layers, but the student was built with {self.depth}")
        set_layers(self.hubert, list(self.hubert.encoder.layers)[:depth])
        self.ancestry, self.originals = list(range(depth)), list(range(depth))

    def features(self, waveforms_BT: Tensor) -> Tensor:
        """Features (B, F, C) of the convolutions, before the feature projection."""
        return self.hubert.feature_extractor(waveforms_BT).transpose(1, 2)

    def known_features(self, shared_BFC: Tensor | None, records: Sequence[CachedRecords | None]) -> Tensor | None:
        """Features (B, F, C) of a frozen front end that the teacher (``shared_BFC``) or a cache has; else ``None``."""
        if not self.frozen_front_end:
            return None
        if self.config.front_end == "shared" and shared_BFC is not None:
            return shared_BFC
        return next((part.features_BFC for part in records if part is not None and part.layout.features_width), None)

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
        hidden_BFD = hubert.feature_projection(scale_gradient(features_BFC, self.config.front_end_gradient))
        if mask_BF is not None:
            hidden_BFD = mask_states(hubert, hidden_BFD, mask_BF)
        elif hidden_BFD.shape[1] >= hubert.config.mask_time_length:
            hidden_BFD = hubert._mask_hidden_states(hidden_BFD, None, cast(torch.LongTensor, valid_BF))
        elif self.training and hubert.config.mask_time_prob > 0:  # no mask fits, but DDP waits for the embedding
            hidden_BFD = mask_states(hubert, hidden_BFD, hidden_BFD.new_zeros(hidden_BFD.shape[:2], dtype=torch.bool))
        if valid_BF is not None:
            hidden_BFD = hidden_BFD.masked_fill(~valid_BF.unsqueeze(-1), 0.0)
        hidden_BFD = encoder.layer_norm(hidden_BFD + encoder.pos_conv_embed(hidden_BFD))
        hidden_BFD = encoder.dropout(hidden_BFD)
        if (layer_states := getattr(encoder, "layer_states", None)) is not None:
            return [hidden_BFD, *layer_states(hidden_BFD, valid_BF, self._branch)]
        mask = create_bidirectional_mask(config=hubert.config, inputs_embeds=hidden_BFD, attention_mask=valid_BF)
        hidden_states = [hidden_BFD]
        for number, layer in enumerate(encoder.layers):
            hidden_BFD, state_BFD = self._branch(layer(hidden_BFD, attention_mask=mask), number)
            hidden_states.append(state_BFD)
        return hidden_states

    def _branch(self, output_BFD: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """What the next layer and the losses get of the output of layer ``number`` (from 0); both have its values."""
        if not self.config.scale_layer_gradients:
            return output_BFD, output_BFD
        above = self.depth - number
        onward = above / (above + 1)
        onward_BFD = scale_gradient(output_BFD, onward)
        return onward_BFD, scale_gradient(onward_BFD, 1 - onward)

    def train_states(self, used: Container[int]) -> None:
        """Let what makes a hidden state of a layer's output be trained for the ``used`` states (from 1), and no other.

        DDP waits for the gradient of every parameter that is trained. A layer of HuBERT is its own hidden state.
        """
        for place, layer in enumerate(self.hubert.encoder.layers, start=1):
            for part in (getattr(layer, name, None) for name in ("restore", "state_projection")):
                if part is not None:
                    part.requires_grad_(place in used)

    def _freeze_front_end(self) -> None:
        self.hubert.feature_extractor._freeze_parameters()
        self.frozen_front_end = True

    def _valid_frames(self, features_BFC: Tensor, num_samples_B: Tensor | None) -> Tensor | None:
        if num_samples_B is None:
            return None
        return before_the_end(self.num_frames(num_samples_B), features_BFC.shape[1], features_BFC.device)

    @torch.no_grad()
    def grow(self, plan: Sequence[int | None], initialise: Initialise = "copy", seed: int = 0) -> Sources:
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
        depth, sources = self.depth, grow_layers(self.hubert, plan, initialise, seed)
        if self.config.front_end == "trained_until_growth":
            self._freeze_front_end()
        kept = kept_positions(plan, depth)
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
