"""Options of ``interstack superb``, and its two presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import InputError
from datamodules.superb.recipes import DataRecipe
from datamodules.superb.registry import SuperbData, find_source
from experiments.records.loggers import WandbSettings
from lightning_modules.superb.ctc import Decode
from lightning_modules.superb.featurizer import States
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.tasks import Preset

LR_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Five values, as in SUPERB; the rules allow 1e-1 to 1e-7."""
PROBE_LR, PROBE_UPDATES, PROBE_BATCH = 0.1, 300, 16
PROBE_TRAIN_UTTERANCES, PROBE_EVAL_UTTERANCES = 500, 200
PROBE_AUDIO_BYTES = 2**29
"""Bytes of decoded training audio that a probe keeps in memory: 2.3 hours, more than 500 utterances of LibriSpeech."""


@dataclass(frozen=True)
class TaskData(SuperbData):
    """Location of a task's corpus and the parts to use.

    Args:
        lexicon: for PR, files of lines ``WORD PHONE PHONE ...``; the first pronunciation counts. Without a lexicon, the
            corpus must have phone alignments.
        unknown_words: for PR, "error" lists the words that the lexicon lacks; "skip" leaves their utterances out.
    """

    lexicon: str | Sequence[str] | None = None
    unknown_words: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Devices:
    """Devices and precision of a run.

    Args:
        accelerator: cpu, cuda, mps or auto.
        devices: number of devices per machine; a recipe's batch is split over all of them.
        num_nodes: number of machines.
        precision: precision of the computation; use 32-true for numbers that are to be compared.
        progress_bar: show a progress bar.
        log_every_n_steps: updates between rows of metrics.csv.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    progress_bar: bool = True
    log_every_n_steps: int = 50


@dataclass(frozen=True)
class RunSettings:
    """Settings of one run: one task, one learning rate, one seed, one fold of a corpus that has folds.

    Raises:
        InputError: the task lacks the preset, or training ends before the first evaluation on dev.
    """

    task: str
    upstream: str
    data: TaskData
    output: str
    preset: Preset
    lr: float
    seed: int
    updates: int
    eval_every: int
    save_every: int
    states: States = "all"
    decode: Decode = "fixed"
    normalize: bool | None = None
    feature_cache: str | None = None
    fold: str = ""
    devices: Devices = field(default_factory=Devices)
    wandb: WandbSettings = field(default_factory=WandbSettings)

    def __post_init__(self) -> None:
        presets = TASK_RECIPES[self.task].presets
        if self.preset not in presets:
            raise InputError(f"task {self.task} has no preset {self.preset!r}: give --preset {presets[0]}")
        if self.eval_every > self.updates:
            raise InputError(
                f"--eval_every {self.eval_every} is more than --updates {self.updates}: dev would never be scored, and "
                f"no head chosen; give at most {self.updates}"
            )

    @classmethod
    def from_plain(cls, config: Mapping[str, Any]) -> "RunSettings":
        """Build the settings that a run wrote to its ``config.json``, which has other keys too."""
        own = {one.name: config[one.name] for one in fields(cls) if one.name in config}
        parts = {"data": TaskData(**own["data"]), "devices": Devices(**own["devices"])}
        return cls(**own | parts | {"wandb": WandbSettings(**own["wandb"])})

    @property
    def is_probe(self) -> bool:
        return self.preset == "probe"

    @property
    def recipe(self) -> DataRecipe:
        """SUPERB's batches; the probe's are small and shuffled, with whole utterances (KS's stay balanced)."""
        recipe = find_source(self.task).recipe
        if not self.is_probe:
            return recipe
        sampling: Literal["balanced", "shuffled"] = "balanced" if recipe.sampling == "balanced" else "shuffled"
        return replace(
            recipe, sampling=sampling, batch_size=PROBE_BATCH, accumulate=1, eval_batch_size=1, train_max_samples=None
        )


def task_folder(task: str, preset: Preset) -> str:
    """Name of a task's folder in the output: ``pr``, ``pr_probe``."""
    return f"{task}_probe" if preset == "probe" else task


def settings_of(
    task: str,
    preset: Preset,
    data: TaskData,
    folder: Path,
    lr: float | None = None,
    updates: int | None = None,
    eval_every: int | None = None,
    **shared: Any,
) -> RunSettings:
    """Settings of a task's run; what is ``None`` follows from preset and task.

    Args:
        task: name of the task.
        preset: preset of the run.
        data: corpus of the task; the probe takes few utterances of it, unless it sets a limit.
        folder: parent folder of the task's.
        lr: learning rate.
        updates: optimizer updates.
        eval_every: updates between evaluations; one at the end for the probe, whose learning rate falls to zero.
        **shared: the fields of :class:`RunSettings` that do not depend on the task.
    """
    recipe, is_probe = TASK_RECIPES[task], preset == "probe"
    updates = (updates or (PROBE_UPDATES if is_probe else recipe.updates)) if recipe.updates else 0
    return RunSettings(
        task=task,
        preset=preset,
        data=_few_utterances(data) if is_probe else data,
        output=str(folder / task_folder(task, preset)),
        lr=lr or (PROBE_LR if is_probe else recipe.lr),
        updates=updates,
        eval_every=(eval_every or (updates if is_probe else min(updates, recipe.eval_every))) if updates else 0,
        **shared,
    )


def _few_utterances(data: TaskData) -> TaskData:
    return replace(
        data,
        max_train_utterances=data.max_train_utterances or PROBE_TRAIN_UTTERANCES,
        max_eval_utterances=data.max_eval_utterances or PROBE_EVAL_UTTERANCES,
    )
