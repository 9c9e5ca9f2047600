"""Files with the names, shapes and entries of published students, and what their authors' code computes from them.

Written from the code of s3prl, FitHuBERT, ARMHuBERT and DPHuBERT; no published file was at hand. The computation is
plain functions of torch over the published names, one utterance after the other.

Shapes: B batch, T samples, F frames, C channels, D width, K keys.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
FAIRSEQ = {
    "conv": "feature_extractor.conv_layers.{}.0",
    "group_norm": "feature_extractor.conv_layers.0.2",
    "norm": "layer_norm",
    "projection": "post_extract_proj",
    "position": "encoder.pos_conv.0",
    "input_norm": "encoder.layer_norm",
    "attention": "encoder.layers.{}.self_attn",
    "middle_norm": "encoder.layers.{}.self_attn_layer_norm",
    "widen": "encoder.layers.{}.fc1",
    "narrow": "encoder.layers.{}.fc2",
    "last_norm": "encoder.layers.{}.final_layer_norm",
}
TORCHAUDIO = {
    "conv": "feature_extractor.conv_layers.{}.conv",
    "group_norm": "feature_extractor.conv_layers.0.layer_norm",
    "norm": "encoder.feature_projection.layer_norm",
    "projection": "encoder.feature_projection.projection",
    "position": "encoder.transformer.pos_conv_embed.conv",
    "input_norm": "encoder.transformer.layer_norm",
    "attention": "encoder.transformer.layers.{}.attention",
    "middle_norm": "encoder.transformer.layers.{}.layer_norm",
    "widen": "encoder.transformer.layers.{}.feed_forward.intermediate_dense",
    "narrow": "encoder.transformer.layers.{}.feed_forward.output_dense",
    "last_norm": "encoder.transformer.layers.{}.final_layer_norm",
}


@dataclass(frozen=True)
class Student:
    """Sizes of a published student.

    Attributes:
        convs: channels, kernel and stride of each convolution.
        heads: attention heads of each layer; 0: no attention.
        inner: feed-forward width of each layer; 0: none.
        names: names of the weights.
        joined: frames that a convolution before the first layer joins.
        reuses: whether every second layer reuses the attention map of the one before it.
        state_width: width of the heads' outputs; ``None``: no heads.
    """

    convs: Sequence[tuple[int, int, int]]
    width: int
    heads: Sequence[int]
    inner: Sequence[int]
    head_width: int
    names: dict[str, str]
    kernel: int = 128
    groups: int = 16
    normalises: bool = True
    masks: bool = False
    scales: bool = False
    joined: int = 1
    reuses: bool = False
    state_width: int | None = None

    def layer(self, part: str, number: int) -> str:
        """Name of a part of a layer; the time reduction is the first entry of the list of layers."""
        return self.names[part].format(number + (self.joined > 1))

    def weights(self, make: Callable[..., Tensor]) -> Weights:
        """State dict, each weight made by ``make(*shape)``."""
        found: Weights = {}

        def add(name: str, *shape: int) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = make(*shape), make(shape[0]) - 1

        for number, ((narrow, *_), (wide, kernel, _)) in enumerate(pairwise([(1,), *self.convs])):
            found[f"{self.names['conv'].format(number)}.weight"] = make(wide, narrow, kernel)
        add(self.names["group_norm"], self.convs[0][0])
        channels, width = self.convs[-1][0], self.width
        if self.scales:
            found["feature_extractor.dummy_weight"] = make(channels)
        if self.normalises:
            add(self.names["norm"], channels)
        if channels != width or self.scales:
            add(self.names["projection"], width, channels)
        if self.masks:
            found["mask_emb"] = make(width)
        position = self.names["position"]
        found[f"{position}.weight_g"] = make(1, 1, self.kernel)
        found[f"{position}.weight_v"] = make(width, width // self.groups, self.kernel)
        found[f"{position}.bias"] = make(width) - 1
        add(self.names["input_norm"], width)
        if self.joined > 1:
            found["encoder.layers.0.weight"], found["encoder.layers.0.bias"] = (
                make(width, width, self.joined),
                make(width),
            )
            found["upsampler.weight"], found["upsampler.bias"] = make(width, width, self.joined), make(width)
        for number, (heads, inner) in enumerate(zip(self.heads, self.inner, strict=True)):
            attention = self.layer("attention", number)
            for name in ("v",) if self.reuses and number % 2 else ("k", "v", "q"):
                if heads:
                    add(f"{attention}.{name}_proj", heads * self.head_width, width)
            if heads:
                add(f"{attention}.out_proj", width, heads * self.head_width)
            if inner:
                add(self.layer("widen", number), inner, width)
                add(self.layer("narrow", number), width, inner)
            add(self.layer("middle_norm", number), width)
            add(self.layer("last_norm", number), width)
            if self.state_width is not None:
                if self.joined > 1:
                    upsampler = f"proj_head.{number}.upsampler"
                    found[f"{upsampler}.weight"], found[f"{upsampler}.bias"] = (
                        make(width, width, self.joined),
                        make(width),
                    )
                add(f"proj_head.{number}.lin_proj", self.state_width, width)
        return found

    def states(self, weights: Weights, waveforms_BT: Tensor, num_samples: Sequence[int]) -> list[list[Tensor]]:
        """For each utterance the input of the first layer and the state of each layer, (F, D).

        The convolutions see the padded batch, since the norm over time does; the rest sees each utterance alone. Zeros
        are the missing partner of a last frame that is to be joined.
        """
        features_BCF = waveforms_BT[:, None]
        for number, (channels, _, stride) in enumerate(self.convs):
            kernel = weights[f"{self.names['conv'].format(number)}.weight"]
            features_BCF = F.conv1d(features_BCF, kernel, stride=stride)
            if number == 0:
                features_BCF = F.group_norm(features_BCF, channels, *_pair(weights, self.names["group_norm"]))
            features_BCF = F.gelu(features_BCF)
        return [
            self._encode(weights, features_CF.T[: self.num_frames(samples)])
            for features_CF, samples in zip(features_BCF, num_samples, strict=True)
        ]

    def num_frames(self, num_samples: int) -> int:
        for _, kernel, stride in self.convs:
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples

    def _encode(self, weights: Weights, hidden_FD: Tensor) -> list[Tensor]:
        if self.scales:
            hidden_FD = hidden_FD * weights["feature_extractor.dummy_weight"]
        if self.normalises:
            hidden_FD = _norm(weights, self.names["norm"], hidden_FD)
        if f"{self.names['projection']}.weight" in weights:
            hidden_FD = F.linear(hidden_FD, *_pair(weights, self.names["projection"]))
        hidden_FD = _norm(weights, self.names["input_norm"], hidden_FD + self._positions(weights, hidden_FD))
        states, frames, map_HFK = [hidden_FD], len(hidden_FD), torch.empty(0)
        if self.joined > 1:
            padded_FD = F.pad(hidden_FD, (0, 0, 0, -frames % self.joined))
            hidden_FD = F.conv1d(padded_FD.T[None], *_pair(weights, "encoder.layers.0"), stride=self.joined)[0].T
        for number, heads in enumerate(self.heads):
            if heads:
                attended_FD, map_HFK = self._attend(weights, number, heads, hidden_FD, map_HFK)
                hidden_FD = hidden_FD + attended_FD
            hidden_FD = _norm(weights, self.layer("middle_norm", number), hidden_FD)
            if self.inner[number]:
                wide_FD = F.gelu(F.linear(hidden_FD, *_pair(weights, self.layer("widen", number))))
                hidden_FD = hidden_FD + F.linear(wide_FD, *_pair(weights, self.layer("narrow", number)))
            hidden_FD = _norm(weights, self.layer("last_norm", number), hidden_FD)
            state_FD, head = hidden_FD, f"proj_head.{number}"
            if f"{head}.upsampler.weight" in weights:
                upsampler = _pair(weights, f"{head}.upsampler")
                state_FD = F.conv_transpose1d(state_FD.T[None], *upsampler, stride=self.joined)[0].T[:frames]
            if f"{head}.lin_proj.weight" in weights:
                state_FD = F.linear(state_FD, *_pair(weights, f"{head}.lin_proj"))
            states.append(state_FD)
        return states

    def _positions(self, weights: Weights, hidden_FD: Tensor) -> Tensor:
        name = self.names["position"]
        direction, size = weights[f"{name}.weight_v"], weights[f"{name}.weight_g"]
        kernel = size * direction / direction.square().sum((0, 1), keepdim=True).sqrt()
        padding = self.kernel // 2
        found_DF = F.conv1d(hidden_FD.T[None], kernel, weights[f"{name}.bias"], padding=padding, groups=self.groups)[0]
        return F.gelu(found_DF[:, : len(hidden_FD)]).T

    def _attend(
        self, weights: Weights, number: int, heads: int, hidden_FD: Tensor, map_HFK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention head by head, and its map after the softmax, which a reusing layer passes through it again."""
        name = self.layer("attention", number)

        def project(part: str) -> Tensor:
            return F.linear(hidden_FD, *_pair(weights, f"{name}.{part}_proj"))

        slices = [slice(head * self.head_width, (head + 1) * self.head_width) for head in range(heads)]
        if f"{name}.q_proj.weight" in weights:
            query_FD, key_FD = project("q") / self.head_width**0.5, project("k")
            map_HFK = torch.stack([(query_FD[:, own] @ key_FD[:, own].T).softmax(-1) for own in slices])
        else:
            map_HFK = map_HFK.softmax(-1)
        value_FD = project("v")
        seen_FD = torch.cat([map_FK @ value_FD[:, own] for map_FK, own in zip(map_HFK, slices, strict=True)], -1)
        return F.linear(seen_FD, *_pair(weights, f"{name}.out_proj")), map_HFK


def _pair(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, hidden_FD: Tensor) -> Tensor:
    return F.layer_norm(hidden_FD, hidden_FD.shape[-1:], *_pair(weights, name))


def random_weights(seed: int = 0) -> Callable[..., Tensor]:
    """Weights of which every one matters: vectors around 1 (less 1 in a bias), others that keep an input's size."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.3 * noise if len(shape) == 1 else noise * (3 / noise[0].numel()) ** 0.5

    return make


def settings(student: Student, convs: str = "conv_feature_layers") -> dict[str, Any]:
    """Section ``distiller`` of a configuration, as in the YAML files of the projects."""
    joins = {"enable_tr_layer": True, "tr_layer_index": 0, "tr_layer_type": "conv1d"} if student.joined > 1 else {}
    return joins | {
        "extractor_mode": "default",
        convs: " + ".join(f"[({', '.join(map(str, conv))})]" for conv in student.convs),
        "encoder_layers": len(student.heads),
        "encoder_embed_dim": student.width,
        "encoder_ffn_embed_dim": student.inner[0],
        "encoder_attention_heads": student.heads[0],
        "conv_pos": student.kernel,
        "conv_pos_groups": student.groups,
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "dropout": 0.05,
    }


class WarmupLinearSchedule:
    """Stand-in for the schedule of an optimizer of s3prl, which lies in a checkpoint as an object."""

    def __init__(self) -> None:
        self.t_total = 200_000


def distiller_file(student: Student, weights: Weights) -> dict[str, Any]:
    """Entries of a checkpoint of s3prl's pre-training of DistilHuBERT."""
    heads = {"output_layer.0.weight": torch.zeros(2, 2), "output_layer.2.bias": torch.zeros(2)}
    own = {"distiller": settings(student, "extractor_conv_feature_layers"), "teacher": {"model": "hubert_base"}}
    groups = [{"lr": 2e-4, "schedule": WarmupLinearSchedule()}]
    return {
        "Optimizer": {"state": {}, "param_groups": groups},
        "Step": 200_000,
        "Args": argparse.Namespace(upstream="distiller"),
        "Config": own,
        "Distiller": weights | heads,
    }


def lightning_file(student: Student, weights: Weights) -> dict[str, Any]:
    """Entries of a Lightning checkpoint of FitHuBERT, MaskHuBERT, ARMHuBERT or STaRHuBERT."""
    cfg = {"distiller": settings(student), "teacher": {"teacher_model": "/a/b/hubert_base_ls960.pt"}}
    teacher = {"teacher_model.model.mask_emb": torch.zeros(3)}
    return {
        "epoch": 199,
        "state_dict": {f"student_model.{name}": value for name, value in weights.items()} | teacher,
        "optimizer_states": [{"param_groups": [{"schedule": WarmupLinearSchedule()}]}],
        "hyper_parameters": {"cfg": cfg},
    }


def pruned_file(student: Student, weights: Weights) -> dict[str, Any]:
    """Entries of the final file of DPHuBERT."""
    config = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [tuple(conv) for conv in student.convs],
        "extractor_conv_bias": False,
        "encoder_embed_dim": student.width,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": student.kernel,
        "encoder_pos_conv_groups": student.groups,
        "encoder_num_layers": len(student.heads),
        "encoder_use_attention": [heads > 0 for heads in student.heads],
        "encoder_use_feed_forward": [inner > 0 for inner in student.inner],
        "encoder_num_heads": list(student.heads),
        "encoder_head_dim": student.head_width,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": list(student.inner),
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.05,
        "aux_num_out": None,
        "normalize_waveform": False,
        "extractor_prune_conv_channels": False,
    }
    return {"state_dict": weights, "config": config, "distill_linear_projs": {"0.weight": torch.zeros(2, 2)}}


def _convs(*channels: int) -> list[tuple[int, int, int]]:
    """HuBERT's convolutions, or those of FitHuBERT and its followers with two of kernel 1 more."""
    kernels = {7: [(10, 5), *[(3, 2)] * 4, (2, 2), (2, 2)], 9: [(10, 5), (1, 1), *[(3, 2)] * 4, (1, 1), (2, 2), (2, 2)]}
    return [(channel, *kernel) for channel, kernel in zip(channels, kernels[len(channels)], strict=True)]


def distilhubert(channels: int = 512, width: int = 768, inner: int = 3072, heads: int = 12, **small: int) -> Student:
    """DistilHuBERT."""
    convs, layers = _convs(*[channels] * 7), 2
    return Student(convs, width, [heads] * layers, [inner] * layers, width // heads, FAIRSEQ, normalises=False, **small)


def thin(
    channels: tuple[int, int, int],
    width: int,
    inner: int,
    heads: int = 12,
    layers: int = 12,
    state_width: int | None = 768,
    **more: Any,
) -> Student:
    """FitHuBERT, MaskHuBERT, ARMHuBERT or STaRHuBERT, with channels of the first, middle and last convolutions."""
    first, middle, last = channels
    convs = _convs(first, *[middle] * 5, *[last] * 3)
    names, head_width = FAIRSEQ, width // heads
    return Student(convs, width, [heads] * layers, [inner] * layers, head_width, names, state_width=state_width, **more)


FULL = {
    "DistilHuBERT": distilhubert(),
    "FitHuBERT": thin((128, 256, 512), 480, 480, joined=2),
    "MaskHuBERT": thin((128, 256, 480), 480, 640, masks=True),
    "ARMHuBERT": thin((128, 256, 480), 480, 864, masks=True, reuses=True),
    "ARMHuBERT-S": thin((128, 256, 432), 432, 816, masks=True, reuses=True),
}
"""Students of the published sizes."""

_SMALL: dict[str, Any] = {"kernel": 8, "groups": 2}
_THIN: dict[str, Any] = _SMALL | {"heads": 2, "layers": 4, "state_width": 6}
TINY = {
    "DistilHuBERT": distilhubert(6, 8, 10, 2, **_SMALL),
    "FitHuBERT": thin((4, 5, 6), 8, 10, joined=2, **_THIN),
    "MaskHuBERT": thin((4, 5, 8), 8, 10, masks=True, **_THIN),
    "ARMHuBERT": thin((4, 5, 8), 8, 10, masks=True, reuses=True, **_THIN),
    "STaRHuBERT": thin((4, 5, 8), 8, 10, **_THIN | {"state_width": None}),
    "DPHuBERT": Student(_convs(4, 5, 6, 3, 5, 4, 7), 8, [2, 0, 1], [10, 6, 0], 4, TORCHAUDIO, scales=True, **_SMALL),
}
ENTRIES: dict[str, Callable[[Student, Weights], dict[str, Any]]] = {
    "DistilHuBERT": distiller_file,
    **dict.fromkeys(("FitHuBERT", "MaskHuBERT", "ARMHuBERT", "STaRHuBERT"), lightning_file),
    "DPHuBERT": pruned_file,
}


def save_published(layout: str, path: Path, seed: int = 0) -> tuple[Student, Weights]:
    """Write a tiny file of a layout; return its sizes and weights."""
    student = TINY[layout]
    weights = student.weights(random_weights(seed))
    torch.save(ENTRIES[layout](student, weights), path)
    return student, weights
