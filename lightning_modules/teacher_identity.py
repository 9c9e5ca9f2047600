"""Hashes and settings by which a run's checkpoints and a cache recognise their teacher, and a cache its front end.

A checkpoint has :func:`teacher_digest`, which is quick to compute, since a run computes it at every checkpoint. A cache
has :func:`teacher_settings`, whose hashes cover every byte of the weights that its targets depend on. Old checkpoints
and caches hold both values, so neither may change.
"""

import hashlib
import re
from typing import Any

import torch
from torch import Tensor
from transformers import HubertModel

from lightning_modules.front_end import CONV_FIELDS
from lightning_modules.teacher import Teacher
from lightning_modules.teacher_loading import MASK_EMBEDDING, UNUSED_WEIGHTS


def teacher_digest(teacher: Teacher) -> str:
    """Hash of the name, shape and first 64 values of each of the teacher's weights; their path does not matter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(teacher.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def teacher_settings(teacher: Teacher) -> dict[str, Any]:
    """Settings, by name, of a teacher whose layers are chosen; the path of its weights is not among them.

    Each target has a hash of all weights up to its layer, so that weights above the layer do not change the hash.
    """
    digests = weight_digests(teacher)
    return {
        **teacher.settings,
        "teacher.output_layer": teacher.output_layer,
        "teacher.output_weights": digests[teacher.output_layer],
        **{f"teacher.layer_{layer}_weights": digests[layer] for layer in teacher.hidden_layers},
        **({"teacher.mask_embedding": _mask_embedding_digest(teacher)} if teacher.takes_masks else {}),
    }


def front_end_digest(hubert: HubertModel) -> str:
    """Hash of the convolutions of a student: their layout, and the names, shapes and bytes of their weights."""
    layout = {name: getattr(hubert.config, name) for name in (*CONV_FIELDS, "feat_extract_norm")}
    digest = hashlib.sha256(repr(sorted((name, str(value)) for name, value in layout.items())).encode())
    for name, weight in sorted(hubert.feature_extractor.state_dict().items()):
        _add(digest, name, weight)
    return digest.hexdigest()[:16]


def weight_digests(teacher: Teacher) -> dict[int, str]:
    """Hash, for each chosen layer, the names, shapes and bytes of the weights that its output depends on.

    If the teacher has no ``layer_prefix``, the hash covers all weights.
    """
    pattern = None if teacher.layer_prefix is None else re.compile(re.escape(teacher.layer_prefix) + r"(\d+)\.")
    layers: dict[int, list[tuple[str, Tensor]]] = {}
    for name, weight in sorted(teacher.state_dict().items()):
        match = None if pattern is None else pattern.match(name)
        # Hugging Face draws at random the weights that a checkpoint may lack.
        if not name.removeprefix("model.").startswith(UNUSED_WEIGHTS):
            layers.setdefault(int(match[1]) + 1 if match else 0, []).append((name, weight))
    digest, digests = hashlib.sha256(), {}
    for layer in range(max(*teacher.hidden_layers, teacher.output_layer, 0) + 1):
        for name, weight in layers.get(layer, []):
            _add(digest, name, weight)
        digests[layer] = digest.hexdigest()[:16]
    return digests


def _mask_embedding_digest(teacher: Teacher) -> str:
    """Hash of the mask embedding, on which the targets depend only in masked distillation."""
    digest = hashlib.sha256()
    for name, weight in teacher.state_dict().items():
        if name.removeprefix("model.") == MASK_EMBEDDING:
            _add(digest, name, weight)
    return digest.hexdigest()[:16]


def _add(digest: Any, name: str, weight: Tensor) -> None:
    digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
