"""The weights that a new run with ``model.init_from`` starts from."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.errors import InputError
from lightning_modules.export import STUDENT_PREFIX, read_checkpoint
from lightning_modules.objective import Objective
from lightning_modules.student import FROZEN, Student, state_dict_depth

log = logging.getLogger(__name__)


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
    if (problem := _load(objective, _below(weights, "objective."))) is not None:
        log.warning("the projections of %s belong to other losses, so new ones are drawn: %s", path, problem)


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
