"""The weights that a new run starts from: its teacher's first layers, or those of another run (``model.init_from``)."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datamodules.errors import InputError
from lightning_modules.export import STUDENT_PREFIX, read_checkpoint
from lightning_modules.growth.layers import state_dict_depth
from lightning_modules.objective import Objective
from lightning_modules.student import FROZEN, Student
from lightning_modules.teacher import HuggingFaceTeacher, Teacher

log = logging.getLogger(__name__)

LIKE_THE_TEACHER = ("feature_projection.", "encoder.pos_conv_embed.")


@torch.no_grad()
def copy_first_layers(teacher: Teacher, student: Student) -> None:
    """Copy the teacher's first layers, positional convolution and feature projection, as ``init_layers`` asks for.

    The norm before the first layer keeps its initial values, as in the code of DistilHuBERT.

    Raises:
        InputError: the teacher's layers do not have HuBERT's weights, or other sizes.
    """
    config, count = student.config, student.config.init_layers
    if not count:
        return
    asked = f"model.student.init_layers={count}"
    if not isinstance(teacher, HuggingFaceTeacher):
        raise InputError(
            f"{asked}, but {type(teacher).__name__} has no layers that a HuBERT student can copy: set it to 0"
        )
    if teacher.final_norm:
        raise InputError(
            f"{asked}, but the teacher's layers begin with their norms (as HuBERT Large's) and a student's end with "
            "them: choose a teacher of HuBERT Base's kind, or set it to 0"
        )
    copied = (*LIKE_THE_TEACHER, *(f"encoder.layers.{layer}." for layer in range(count)))
    own = {name: weight for name, weight in student.hubert.state_dict().items() if name.startswith(copied)}
    theirs = {name: weight for name, weight in teacher.model.state_dict().items() if name.startswith(copied)}
    if not config.feature_norm:
        theirs = {name: weight for name, weight in theirs.items() if ".layer_norm." not in name or ".layers." in name}
    if heads := _other_heads(teacher, config.num_heads):
        raise InputError(f"{asked}, but the teacher has {heads} attention heads: set model.student.num_heads={heads}")
    for name in sorted(own.keys() | theirs.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (own, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{asked}, but {name} is {shapes[0] or 'missing'} in the student and {shapes[1] or 'missing'} in the "
                "teacher: choose the teacher's sizes (hidden_size, intermediate_size) and layers of HuBERT's kind"
            )
        own[name].copy_(theirs[name])


def _other_heads(teacher: HuggingFaceTeacher, num_heads: int) -> int:
    """The teacher's number of attention heads if it is another one; else 0."""
    heads = int(teacher.model.config.num_attention_heads)
    return 0 if heads == num_heads else heads


def load_initial_weights(path: Path, student: Student, objective: Objective) -> None:
    """Load the student, and the projections if the losses are equal. The student already has its first depth.

    Raises:
        InputError: the checkpoint's student has another depth or other sizes.
    """
    weights = read_checkpoint(path)["state_dict"]
    if (depth := state_dict_depth(weights, STUDENT_PREFIX)) != student.depth:
        raise InputError(
            f"model.init_from={path} has {depth} layers, but this run begins with {student.depth}: add "
            "--growth.policy none for a run without growth, or give a checkpoint of that depth (stage_N.ckpt)"
        )
    own = _below(weights, "student.")
    own.get("_extra_state", {}).pop(FROZEN, None)  # a new run trains its front end until its own growth
    if (problem := _load(student, own)) is not None:
        raise InputError(f"model.init_from={path} has a student of other sizes: {problem}") from problem
    if objective.config.attach == "original" and student.originals != list(range(depth)):
        raise InputError(
            f"model.init_from={path} has grown, so that its layers are no longer the first ones of their targets, as "
            "model.objective.attach=original takes them: set it to block_end"
        )
    # Statistics of targets are those of this run's own teacher and layers.
    saved = {k: v for k, v in _below(weights, "objective.").items() if not k.startswith("normalizer.")}
    own = {k: v for k, v in objective.state_dict().items() if not k.startswith("normalizer.")}
    if saved.keys() != own.keys() or any(saved[name].shape != value.shape for name, value in own.items()):
        log.warning("the projections of %s belong to other losses, so new ones are drawn", path)
    else:
        objective.load_state_dict(saved, strict=False)


def load_front_end(path: Path, student: Student) -> None:
    """Load the front end alone, whatever the depth of the checkpoint's student.

    Raises:
        InputError: it has other sizes.
    """
    weights = read_checkpoint(path)["state_dict"]
    extractor = student.hubert.feature_extractor
    if (problem := _load(extractor, _below(weights, f"{STUDENT_PREFIX}feature_extractor."))) is not None:
        raise InputError(f"model.init_from={path} has a front end of other sizes: {problem}") from problem


def _below(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}


def _load(module: nn.Module, weights: dict[str, Any]) -> RuntimeError | None:
    """Load the weights; the error, on one line, if they do not fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        return RuntimeError(" ".join(str(error).split())[:300])
    return None
