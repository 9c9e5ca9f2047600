"""``interstack superb``: train and score heads on a frozen encoder, as SUPERB does, or as a quick probe."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from callbacks.guards import DivergedError
from datamodules.errors import InputError
from datamodules.files import write_json
from datamodules.superb.registry import find_source
from experiments.records.loggers import WandbSettings
from experiments.superb.options import (
    LR_GRID,
    PROBE_UPDATES,
    Devices,
    RunSettings,
    TaskData,
    settings_of,
)
from experiments.superb.preparation import Prepared, prepare
from experiments.superb.results import mean_over_folds, table_of
from experiments.superb.running import RESULT, is_finished, run_task
from lightning_modules.superb.ctc import Decode
from lightning_modules.superb.featurizer import States
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES
from lightning_modules.superb.tasks import Preset
from lightning_modules.superb.upstream import Upstream, is_class_path, load_upstream

log = logging.getLogger(__name__)


def superb(
    task: str,
    upstream: str,
    data: TaskData,
    output: str | None = None,
    preset: Preset = "superb",
    lr: float | None = None,
    lr_sweep: bool = False,
    lr_grid: list[float] = list(LR_GRID),  # noqa: B006 (never mutated)
    seed: int = 1337,
    updates: PositiveInt | None = None,
    eval_every: PositiveInt | None = None,
    save_every: PositiveInt = 1000,
    states: States = "all",
    decode: Decode = "fixed",
    normalize: bool | None = None,
    feature_cache: str | None = None,
    trainer: Devices = Devices(),  # noqa: B008 (frozen)
    wandb: WandbSettings = WandbSettings(),  # noqa: B008
) -> None:
    """Score an encoder on SUPERB's tasks (docs/superb.md).

    Args:
        task: pr, ks, ic, sid, er, asr, qbe, sf, asv, sd, several of them (pr,sid) or all; or, as a probe only, frames
            (the phone of each frame, on a corpus with phone alignments).
        upstream: exported student, training checkpoint, any Hugging Face encoder by name or folder, fbank, or the path
            of your own subclass of Teacher (my_package.MyTeacher) whose __init__ needs no arguments; if it does, give a
            subclass that sets them.
        data: corpus of the task.
        output: folder of the results, with one folder per task, rate and seed (a probe's is pr_probe); default:
            runs/superb/UPSTREAM.
        preset: superb is the benchmark; probe trains a linear head on few utterances in minutes, and its scores are not
            comparable with the benchmark's.
        lr: Adam's learning rate; default: the task's.
        lr_sweep: run every rate of lr_grid and choose on dev.
        lr_grid: learning rates of the sweep; SUPERB allows 1e-1 to 1e-7.
        seed: seed of initialisation, order, crops and dropout.
        updates: optimizer updates; default: the task's; qbe has none.
        eval_every: updates between evaluations on dev; default: the task's.
        save_every: updates between checkpoints to resume from.
        states: hidden states that heads see, the weighted sum of all, or the last alone, as in the published numbers of
            DistilHuBERT and FitHuBERT.
        decode: decoding of PR and SF, fixed, or legacy as in the published numbers; both are reported, this one gives
            the main scores.
        normalize: give waveforms zero mean and unit variance; default: the encoder's own setting.
        feature_cache: folder for cached hidden states; not for numbers that are compared with s3prl's.
        trainer: devices and precision.
        wandb: settings of Weights & Biases.
    """
    names = task_names(task, preset)
    if lr is not None and lr_sweep:
        raise InputError("--lr and --lr_sweep exclude each other: the sweep runs the rates of --lr_grid")
    encoder = load_upstream(upstream, normalize)
    folder = Path(output or f"runs/superb/{_folder_name(upstream)}")
    tasks = [
        settings_of(
            name,
            preset,
            data,
            folder,
            lr,
            updates,
            eval_every,
            upstream=upstream,
            seed=seed,
            save_every=save_every,
            states=states,
            decode=decode,
            normalize=normalize,
            feature_cache=feature_cache,
            devices=trainer,
            wandb=wandb,
        )
        for name in names
    ]
    # Every corpus is read before the first training, so that a missing one ends the call at once.
    sweeps = [lr_sweep and settings.updates > 0 for settings in tasks]
    pairs = list(zip(tasks, sweeps, strict=True))
    corpora = [_prepare(settings, lr_grid if swept else [settings.lr], encoder.rate) for settings, swept in pairs]
    results = [
        sweep(settings, encoder, lr_grid, corpus) if swept else _one(settings, encoder, corpus)
        for (settings, swept), corpus in zip(pairs, corpora, strict=True)
    ]
    if len(results) == 1:  # for programs that call this command
        _write(folder / "result.json", results[0] | {"metrics": results[0]["test"]})
    _show(results)


def task_names(task: str, preset: Preset) -> list[str]:
    """List the tasks that ``--task`` names; "all" are those of SUPERB that have the preset.

    Raises:
        InputError: a task does not exist.
    """
    if task == "all":
        return [name for name in SUPERB_TASKS if preset in TASK_RECIPES[name].presets]
    for name in (names := task.split(",")):
        if name not in TASK_RECIPES:
            raise InputError(f"there is no task {name!r}: choose all, or some of {','.join(TASK_RECIPES)}")
    return names


def superb_probe(
    upstream: str | Upstream,
    data: TaskData,
    output: str,
    task: str = "pr",
    seed: int = 0,
    updates: int = PROBE_UPDATES,
) -> dict[str, Any]:
    """Run the probe preset and return its result; a finished one in ``output`` is kept. No progress bar, no W&B.

    Args:
        upstream: as in :func:`superb`, or a loaded upstream.
        data: the corpus; for ``pr`` without a lexicon it needs phone alignments.
        output: parent folder of the run.
        task: name of the task.
        seed: seed of everything that is random.
        updates: optimizer updates.
    """
    encoder = load_upstream(upstream) if isinstance(upstream, str) else upstream
    settings = settings_of(
        task,
        "probe",
        data,
        Path(output),
        updates=updates,
        upstream=encoder.name,
        seed=seed,
        save_every=updates,
        devices=Devices(accelerator="cpu", progress_bar=False),
        wandb=WandbSettings(mode="disabled"),
    )
    return _one(settings, encoder)


Corpora = dict[str, Prepared]
"""Task and corpus of each fold; the name of the only one is empty if the corpus has no folds."""


def _prepare(settings: RunSettings, rates: list[float], hop: int) -> Corpora:
    """Prepare task and corpus of the folds that have a run at one of these rates to do."""
    runs = [_runs(replace(settings, lr=lr)) for lr in rates]
    todo = {fold: run for folds in runs for fold, run in folds.items() if not is_finished(run)}
    return {fold: prepare(run, hop) for fold, run in todo.items()}


def _runs(settings: RunSettings) -> dict[str, RunSettings]:
    """The run of each fold, with its output folder."""
    folder = _rate_folder(settings)
    folds = find_source(settings.task).corpus_of(settings.data, settings.data.lexicon is not None).folds
    return {fold: replace(settings, fold=fold, output=str(folder / fold)) for fold in folds or ("",)}


def _rate_folder(settings: RunSettings) -> Path:
    return Path(settings.output) / f"lr{settings.lr:g}_seed{settings.seed}"


def _one(settings: RunSettings, upstream: Upstream, corpora: Mapping[str, Prepared] = {}) -> dict[str, Any]:
    """Run one rate, with every fold of the corpus, and return the result or the folds' mean."""
    results = {fold: run_task(run, upstream, corpora.get(fold)) for fold, run in _runs(settings).items()}
    if "" in results:
        return results[""]
    mean = mean_over_folds(results)
    _write(_rate_folder(settings) / RESULT, mean)
    return mean


def sweep(
    settings: RunSettings, upstream: Upstream, grid: list[float], corpora: Mapping[str, Prepared] = {}
) -> dict[str, Any]:
    """Run every rate and return the result of the one that is best on dev.

    ``chosen_seedN.json`` keeps the choice and every rate's dev score. Rates that diverge are excluded; of equal ones
    the first of the grid wins.

    Raises:
        InputError: all rates diverge.
    """
    recipe = TASK_RECIPES[settings.task]
    results: dict[float, dict[str, Any]] = {}
    for lr in grid:
        try:
            results[lr] = _one(replace(settings, lr=lr), upstream, corpora)
        except DivergedError as error:
            log.warning("the learning rate %g is excluded: %s", lr, error)
    if not results:
        raise InputError(f"every learning rate of the grid {grid} diverged on {settings.task}: give lower ones")
    dev = {lr: result["dev"][recipe.monitor] for lr, result in results.items()}
    best = results[(max if recipe.higher_is_better else min)(dev, key=lambda lr: dev[lr])]
    shown = {str(lr): dev.get(lr) for lr in grid}
    choice = {"chosen_lr": best["lr"], "monitor": recipe.monitor, "dev": shown}
    _write(Path(settings.output) / f"chosen_seed{settings.seed}.json", choice)
    return best | {"lr_sweep": choice}


def _folder_name(upstream: str) -> str:
    if is_class_path(upstream):
        return upstream
    path = Path(upstream)
    return path.parent.parent.name if path.suffix == ".ckpt" and path.parent.name == "checkpoints" else path.stem


_write = rank_zero_only(write_json)


@rank_zero_only
def _show(results: list[dict[str, Any]]) -> None:
    console = Console()
    console.width = max(console.width, 130)
    console.print(table_of(results))
