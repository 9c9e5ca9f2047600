"""A student that starts from its teacher's first layers, as DistilHuBERT does (Chang et al., ICASSP 2022)."""

import torch

from datamodules.errors import InputError
from lightning_modules.student import Student
from lightning_modules.teacher import HuggingFaceTeacher, Teacher

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
