"""CompactHubertModel: HuBERT with what published students change in it.

* FitHuBERT (Lee et al., Interspeech 2022) joins two frames before the first layer, and a transposed convolution after
  each layer restores the frame rate.
* ARMHuBERT (Jang et al., Interspeech 2023) reuses the attention map of every odd layer in the layer after it, which so
  needs no queries and keys. Both papers' students project each layer's state to the teacher's width.
* DPHuBERT (Peng et al., Interspeech 2023) has another number of heads and another feed-forward width in every layer.

The file needs nothing but torch and transformers, since it is copied into exported folders, where
``AutoModel.from_pretrained(folder, trust_remote_code=True)`` reads it.

Shapes: B batch, T samples, F frames, H heads, D width, C channels of the convolutions. Inside the layers F may be the
smaller number of joined frames.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoConfig, AutoModel, HubertConfig, HubertModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.hubert.modeling_hubert import (
    HubertAttention,
    HubertEncoder,
    HubertEncoderLayer,
    HubertFeatureEncoder,
    HubertFeedForward,
    HubertPreTrainedModel,
)

PAIR = 2
"""Layers that share one attention map."""


class CompactHubertConfig(HubertConfig):
    """The configuration of HuBERT, and what a compact one changes.

    Attributes:
        feature_projection: whether a linear layer follows the convolutions; without it their channels are the width.
        feature_scale: whether each channel of the convolutions' output has a factor, as DPHuBERT has.
        time_reduction: frames that are joined to one inside the layers.
        attention_reuse: ``none``, ``map`` (every second layer uses the attention map of the layer before it), or
            ``softmax`` (as ``map``, and the map passes a second softmax, as it does in the code of ARMHuBERT).
        state_width: width to which a linear layer projects the state of each layer; ``None``: no projection.
        layer_heads: attention heads of each layer, 0 for a layer without attention; ``None``: equal in all layers.
        layer_head_width: width of a head, where ``layer_heads`` is given.
        layer_intermediate_sizes: feed-forward width of each layer, 0 for none; ``None``: equal in all layers.
    """

    model_type = "compact_hubert"

    feature_projection: bool = True
    feature_scale: bool = False
    time_reduction: int = 1
    attention_reuse: Literal["none", "map", "softmax"] = "none"
    state_width: int | None = None
    layer_heads: list[int] | None = None
    layer_head_width: int = 64
    layer_intermediate_sizes: list[int] | None = None

    @property
    def width_of_states(self) -> int:
        """Width of the hidden states that a call returns."""
        return self.state_width or self.hidden_size


class CompactAttention(HubertAttention):
    """Self-attention with any number of heads, that gives its map where the next layer reuses it.

    Args:
        config: configuration of the model.
        heads: number of heads.
        head_width: width of each head.
        gives_map: whether the map is needed; then it is computed without a fused kernel.
    """

    def __init__(self, config: CompactHubertConfig, heads: int, head_width: int, gives_map: bool) -> None:
        nn.Module.__init__(self)
        self.embed_dim, self.num_heads, self.head_dim = config.hidden_size, heads, head_width
        self.dropout, self.config = float(config.attention_dropout), config
        self.scaling, self.is_decoder, self.is_causal = head_width**-0.5, False, False
        for name in ("k_proj", "v_proj", "q_proj"):
            setattr(self, name, nn.Linear(self.embed_dim, heads * head_width))
        self.out_proj = nn.Linear(heads * head_width, self.embed_dim)
        self.map_dropout = nn.Dropout(self.dropout) if gives_map else None

    def forward(  # type: ignore[override]
        self, hidden_BFD: Tensor, attention_mask: Tensor | None = None, map_BHFF: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, F, D) and, where the next layer reuses it, the attention map (B, H, F, F)."""
        if self.map_dropout is None:
            return super().forward(hidden_BFD, attention_mask=attention_mask)[0], None
        query_BHFD, key_BHFD, value_BHFD = (
            project(hidden_BFD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        map_BHFF = _softmax((query_BHFD * self.scaling) @ key_BHFD.transpose(-1, -2), attention_mask)
        output_BFD = (self.map_dropout(map_BHFF) @ value_BHFD).transpose(1, 2).flatten(2)
        return self.out_proj(output_BFD), map_BHFF


class ReusingAttention(nn.Module):
    """Self-attention with the map of the layer before it; there is no dropout of the map.

    Args:
        config: configuration of the model.
        second_softmax: pass the map through a second softmax, which makes it nearly uniform.
    """

    def __init__(self, config: CompactHubertConfig, second_softmax: bool) -> None:
        super().__init__()
        self.num_heads, self.second_softmax = config.num_attention_heads, second_softmax
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_BFD: Tensor, attention_mask: Tensor | None = None, map_BHFF: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Output (B, F, D), and no map."""
        assert map_BHFF is not None
        value_BHFD = self.v_proj(hidden_BFD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.second_softmax:
            map_BHFF = _softmax(map_BHFF, attention_mask)
        return self.out_proj((map_BHFF @ value_BHFD).transpose(1, 2).flatten(2)), None


def _softmax(scores_BHFF: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Softmax over the keys that a mask allows: true or 0 where a query may see a key (B, 1, F, F); ``None``: all."""
    if attention_mask is not None:
        hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
        scores_BHFF = scores_BHFF.masked_fill(hidden, torch.finfo(scores_BHFF.dtype).min)
    return scores_BHFF.softmax(-1)


class CompactLayer(HubertEncoderLayer):
    """A Transformer layer; it also makes the hidden state that a reader sees of its output.

    Args:
        config: configuration of the model.
        number: place of the layer, from 0.
    """

    def __init__(self, config: CompactHubertConfig, number: int) -> None:
        nn.Module.__init__(self)
        width, reuse = config.hidden_size, config.attention_reuse
        heads, head_width = config.num_attention_heads, width // config.num_attention_heads
        if config.layer_heads is not None:
            heads, head_width = config.layer_heads[number], config.layer_head_width
        inner = config.intermediate_size
        if config.layer_intermediate_sizes is not None:
            inner = config.layer_intermediate_sizes[number]
        self.attention: Any = None
        if reuse != "none" and number % PAIR:
            self.attention = ReusingAttention(config, second_softmax=reuse == "softmax")
        elif heads:
            self.attention = CompactAttention(config, heads, head_width, gives_map=reuse != "none")
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward: Any = HubertFeedForward(config) if inner else None
        if self.feed_forward is not None and inner != config.intermediate_size:
            self.feed_forward.intermediate_dense = nn.Linear(width, inner)
            self.feed_forward.output_dense = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        joined = config.time_reduction
        self.restore = nn.ConvTranspose1d(width, width, joined, stride=joined) if joined > 1 else None
        self.state_projection = nn.Linear(width, config.state_width) if config.state_width is not None else None

    def forward(  # type: ignore[override]
        self, hidden_BFD: Tensor, attention_mask: Tensor | None = None, map_BHFF: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, F, D) and the attention map for the next layer, which is ``None`` if that does not reuse it."""
        if self.attention is not None:
            attended_BFD, map_BHFF = self.attention(hidden_BFD, attention_mask, map_BHFF)
            hidden_BFD = hidden_BFD + self.dropout(attended_BFD)
        hidden_BFD = self.layer_norm(hidden_BFD)
        if self.feed_forward is not None:
            hidden_BFD = hidden_BFD + self.feed_forward(hidden_BFD)
        return self.final_layer_norm(hidden_BFD), map_BHFF

    def state(self, hidden_BFD: Tensor, num_frames: int) -> Tensor:
        """Make the state (B, ``num_frames``, state width) of an output (B, F, D), at the model's frame rate."""
        if self.restore is not None:
            hidden_BFD = self.restore(hidden_BFD.transpose(1, 2)).transpose(1, 2)[:, :num_frames]
        return hidden_BFD if self.state_projection is None else self.state_projection(hidden_BFD)


Branch = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class CompactEncoder(HubertEncoder):
    """The positional convolution and the layers, whose states it returns at the model's frame rate."""

    def __init__(self, config: CompactHubertConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(CompactLayer(config, number) for number in range(config.num_hidden_layers))
        width, joined = config.hidden_size, config.time_reduction
        self.reduce = nn.Conv1d(width, width, joined, stride=joined) if joined > 1 else None

    def layer_states(
        self, hidden_BFD: Tensor, valid_BF: Tensor | None, branch: Branch | None = None, last_only: bool = False
    ) -> list[Tensor]:
        """Compute the states (B, F, D) of the layers from the first one's input.

        Frames are joined after a frame of zeros was added, so that a last frame without partner is not lost.

        Args:
            hidden_BFD: input of the first layer.
            valid_BF: true where a frame is not padding; ``None`` if none is.
            branch: splits an output, with the number of its layer, into what the next layer gets and what the state is
                made of.
            last_only: make no state but the last layer's.
        """
        num_frames = hidden_BFD.shape[1]
        if self.reduce is not None:
            joined = self.config.time_reduction
            if valid_BF is not None:
                hidden_BFD = hidden_BFD.masked_fill(~valid_BF.unsqueeze(-1), 0.0)
                # A joined frame is valid if its first frame is.
                valid_BF = valid_BF[:, ::joined]
            padded_BDF = nn.functional.pad(hidden_BFD.transpose(1, 2), (0, joined - 1))
            hidden_BFD = self.reduce(padded_BDF).transpose(1, 2)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_BFD, attention_mask=valid_BF)
        states, map_BHFF = [], None
        for number, layer in enumerate(self.layers):
            hidden_BFD, map_BHFF = layer(hidden_BFD, mask, map_BHFF)
            own_BFD = hidden_BFD
            if branch is not None:
                hidden_BFD, own_BFD = branch(hidden_BFD, number)
            if not last_only or number == len(self.layers) - 1:
                states.append(cast(CompactLayer, layer).state(own_BFD, num_frames))
        return states


class CompactFeatureProjection(nn.Module):
    """What is between the convolutions and the encoder: factors, a norm and a linear layer, each of which can lack."""

    def __init__(self, config: CompactHubertConfig) -> None:
        super().__init__()
        channels = config.conv_dim[-1]
        self.scale = nn.Parameter(torch.ones(channels)) if config.feature_scale else None
        self.layer_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps) if config.feat_proj_layer_norm else None
        self.projection = nn.Linear(channels, config.hidden_size) if config.feature_projection else None
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, features_BFC: Tensor) -> Tensor:
        """Input (B, F, D) of the encoder from features (B, F, C)."""
        if self.scale is not None:
            features_BFC = features_BFC * self.scale
        for part in (self.layer_norm, self.projection):
            if part is not None:
                features_BFC = part(features_BFC)
        return self.dropout(features_BFC)


class CompactHubertModel(HubertModel):
    """HuBERT with the changes of :class:`CompactHubertConfig`.

    Its hidden states are the input of the first layer (left out where ``state_width`` gives the layers' states another
    width), and the state of each layer.
    """

    config_class = CompactHubertConfig
    _no_split_modules = ["CompactLayer"]
    _can_record_outputs: dict[str, Any] = {}

    def __init__(self, config: CompactHubertConfig) -> None:
        HubertPreTrainedModel.__init__(self, config)
        self.feature_extractor = HubertFeatureEncoder(config)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size).uniform_())
        self.feature_projection: Any = CompactFeatureProjection(config)
        self.encoder: Any = CompactEncoder(config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Whether the kernel of attention can be chosen: it can where no map is reused, as in HuBERT."""
        return True

    @property
    def layer_group(self) -> int:
        """Number of layers that stay together when the model grows."""
        return 1 if self.config.attention_reuse == "none" else PAIR

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode waveforms (B, T), as ``HubertModel`` does.

        Args:
            input_values: waveforms (B, T).
            attention_mask: 1 where a sample is not padding (B, T); ``None`` if none is.
            mask_time_indices: true where a frame (B, F) is replaced by the mask embedding.
            output_hidden_states: return all hidden states too.
            return_dict: return a ``BaseModelOutput``, not a tuple.
        """
        features_BFC = self.feature_extractor(input_values).transpose(1, 2)
        valid_BF = None
        if attention_mask is not None:
            valid_BF = self._get_feature_vector_attention_mask(features_BFC.shape[1], cast(LongTensor, attention_mask))
        hidden_BFD = self.feature_projection(features_BFC)
        hidden_BFD = self._mask_hidden_states(hidden_BFD, mask_time_indices)
        if valid_BF is not None:
            hidden_BFD = hidden_BFD.masked_fill(~valid_BF.unsqueeze(-1), 0.0)
        encoder = self.encoder
        hidden_BFD = encoder.dropout(encoder.layer_norm(hidden_BFD + encoder.pos_conv_embed(hidden_BFD)))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = encoder.layer_states(hidden_BFD, valid_BF, last_only=not wanted)
        if self.config.state_width is None:
            states = [hidden_BFD, *states]
        hidden = tuple(states) if wanted else None
        if return_dict is False:
            return (states[-1],) if hidden is None else (states[-1], hidden)
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=hidden)


CompactHubertConfig.register_for_auto_class()
CompactHubertModel.register_for_auto_class("AutoModel")
AutoConfig.register(CompactHubertConfig.model_type, CompactHubertConfig)
AutoModel.register(CompactHubertConfig, CompactHubertModel)
