"""The choice of one hidden state on dev, for a task that trains nothing (QbE)."""

import time
from collections.abc import Sequence

import lightning as L

from datamodules.files import read_json, write_json
from datamodules.superb.datamodule import SuperbDataModule
from experiments.superb.checkpoint import TaskCheckpoint
from lightning_modules.superb.task_module import TaskModule

STATES = "states.json"


def choose_state(
    module: TaskModule, data: SuperbDataModule, trainer: L.Trainer, checkpoint: TaskCheckpoint, states: Sequence[int]
) -> None:
    """Score each of these hidden states on dev, and choose the best, the first of equal ones.

    ``states.json`` keeps the scores, so that a killed run goes on with the next state.
    """
    path, since = checkpoint.folder / STATES, time.perf_counter()
    done = read_json(path) if path.is_file() else {}
    for state in states:
        if str(state) not in done:
            module.featurizer.choose(state)
            trainer.validate(module, datamodule=data, verbose=False, weights_only=True)
            done[str(state)] = module.scores
            if trainer.is_global_zero:
                write_json(path, done)
    recipe = module.task.recipe
    best = (max if recipe.higher_is_better else min)(done, key=lambda state: done[state][recipe.monitor])
    module.featurizer.choose(int(best))
    checkpoint.best, checkpoint.seconds = done[best], time.perf_counter() - since
