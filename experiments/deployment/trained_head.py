"""Heads that ``interstack superb`` trained, read from its result folders."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from datamodules.errors import InputError
from datamodules.files import read_json
from experiments.superb.checkpoint import BEST
from experiments.superb.running import CONFIG, LABELS, RESULT
from lightning_modules.checkpoint_files import require_sound
from lightning_modules.deployment.head import DEPLOYABLE, TrainedHead
from lightning_modules.superb.recipes import TASK_RECIPES, build_task
from lightning_modules.superb.task_module import build_parts
from lightning_modules.superb.tasks import ProbeStart, Task, TaskInputs

RERUN = "run the same `interstack superb` again"


def read_head(folder: str) -> TrainedHead:
    """Load the best featurizer and head of a finished run.

    Args:
        folder: output folder of one run: one task, one rate, one seed, one fold.

    Raises:
        InputError: it is no such folder, the run is not finished, or its task has no export.
    """
    path = Path(folder)
    name, is_probe = _config(path)["task"], _config(path)["preset"] == "probe"
    _require_deployable(name)
    config, result = finished_run(path)
    if not (path / LABELS).is_file():
        raise InputError(f"{folder!r} is of an earlier version and has no {LABELS}: {RERUN}, which adds it")
    require_sound(path / BEST, f"delete the folder and {RERUN}")
    labels = read_json(path / LABELS)["labels"]
    # Phones come with the lexicon, but its words are not needed to read what a head says.
    lexicon = None if config["data"]["lexicon"] is None else ()
    task = build_task(name, TaskInputs(labels, lexicon, config["decode"], fold=config.get("fold", "")))
    start = ProbeStart(2, 1) if is_probe else None  # any: the bias is loaded
    states = config.get("states", "all")  # earlier versions had no such setting
    featurizer, head = build_parts(task, result["hidden_states"], result["width"], start, states)
    state = torch.load(path / BEST, map_location="cpu", weights_only=True)["state_dict"]
    parts = nn.ModuleDict({"featurizer": featurizer, "head": head}).eval()
    try:
        parts.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{BEST} in {folder!r} does not fit its {LABELS} and {RESULT}: {RERUN}") from error
    return TrainedHead(
        folder,
        name,
        config["preset"],
        task,
        featurizer,
        head,
        result["width"],
        config["upstream_digest"],
        result["test"],
    )


def finished_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and result of the finished run in a folder that holds a trained head.

    Raises:
        InputError: it is no such folder, the run is not finished, or its head is lost.
    """
    config = _config(path)
    if not (path / RESULT).is_file():
        raise InputError(f"the run in {str(path)!r} is not finished: {RERUN}, which continues it")
    if not (path / BEST).is_file():
        raise InputError(f"{str(path)!r} has lost its {BEST}: delete the folder and {RERUN}")
    return config, read_json(path / RESULT)


def _config(path: Path) -> dict[str, Any]:
    """Settings of the run in a folder."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if "upstream_digest" not in config:
        raise InputError(
            f"{str(path)!r} is no run of `interstack superb`: give the folder with {CONFIG} and {BEST} of one task, "
            "rate, seed and fold, such as runs/superb/NAME/ks/lr0.0001_seed1337"
        )
    return config


def _require_deployable(name: str) -> None:
    def fits(kind: type[Task]) -> bool:
        return issubclass(kind, DEPLOYABLE) and kind.features is Task.features

    if name not in TASK_RECIPES or not fits(TASK_RECIPES[name].task):
        able = ", ".join(task for task, recipe in TASK_RECIPES.items() if fits(recipe.task))
        raise InputError(f"a head of task {name} has no export: give one of {able}")
