"""The result of a run in plain values, and its upload to W&B."""

from importlib.metadata import version
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

from callbacks.guards import NonFiniteGuard
from callbacks.hardware import hardware
from experiments.records.runs import git_commit
from experiments.superb.checkpoint import TaskCheckpoint
from experiments.superb.options import RunSettings
from experiments.superb.preparation import Prepared
from lightning_modules.superb.task_module import TaskModule

PACKAGES = ("torch", "torchaudio", "lightning", "transformers", "torchmetrics", "numpy")
SAMPLES_SHOWN = 20
SCORES = ("dev", "test", "tests")


def result_of(
    settings: RunSettings,
    config: dict[str, Any],
    module: TaskModule,
    prepared: Prepared,
    checkpoint: TaskCheckpoint,
    guard: NonFiniteGuard,
    trainer: L.Trainer,
) -> dict[str, Any]:
    """Collect scores, sizes, settings and versions; ``test`` is the first test set, ``tests`` all of them."""
    names = list(prepared.corpus.tests)
    tests = {name: module.task.score(module.test_predictions[index]) for index, name in enumerate(names)}
    return {
        "task": settings.task,
        "preset": settings.preset,
        "upstream": settings.upstream,
        "lr": settings.lr,
        "seed": settings.seed,
        "dev": checkpoint.best,
        "test": tests[names[0]],
        "tests": tests,
        "best_step": checkpoint.best_step,
        "updates": trainer.global_step,
        "layer_weights": module.featurizer.layer_weights,
        "trainable_parameters": module.trainable_parameters,
        "hidden_states": module.upstream.num_states,
        "width": module.upstream.width,
        "utterances": {name: len(rows) for name, rows in prepared.corpus.splits.items()},
        "labels": [len(names) for names in prepared.corpus.labels],
        "batch_size": settings.recipe.effective_batch,
        "left_out": {"bad_audio": len(prepared.corpus.skipped), "unknown_words": prepared.unknown_words},
        "unknown_symbols": prepared.unknown_symbols,
        "infeasible_for_ctc": prepared.infeasible(module.upstream),
        "skipped_updates": guard.skipped_steps,
        "feature_cache": None if module.cache is None else "disk" if settings.feature_cache else "memory",
        "hours": checkpoint.seconds / 3600,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "hardware": hardware(trainer.strategy.root_device, trainer.world_size),
        "commit": git_commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "config": config,
    }


@rank_zero_only
def log_samples(trainer: L.Trainer, module: TaskModule, result: dict[str, Any]) -> None:
    """Log metrics, a table of hypotheses and references, and the layer weights as bars to W&B."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    import wandb

    prefix = _prefix(result)
    rows = [(one.key, *module.task.texts(one)) for one in module.test_predictions[0][:SAMPLES_SHOWN]]
    layers = wandb.Table(["layer", "weight"], [[str(i), weight] for i, weight in enumerate(result["layer_weights"])])
    for logger in loggers:
        logger.experiment.log(
            {
                f"{prefix}samples": wandb.Table(["utterance", "hypothesis", "reference"], [list(row) for row in rows]),
                f"{prefix}layer_weights": wandb.plot.bar(layers, "layer", "weight", title="layer weights"),
                **{
                    f"{prefix}test/{split}/{key}": value
                    for split, part in result["tests"].items()
                    for key, value in part.items()
                },
            }
        )
        logger.experiment.summary.update(summary_of(result))
        logger.finalize("success")


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """Build W&B's summary; a probe's scores get keys of their own, so that no panel shows them as SUPERB's."""
    prefix = _prefix(result)
    return {f"{prefix}{key}" if key in SCORES else key: value for key, value in result.items() if key != "config"}


def _prefix(result: dict[str, Any]) -> str:
    return "probe_" if result["preset"] == "probe" else ""


def table_of(results: list[dict[str, Any]]) -> Table:
    """Build a table with one row per run and test set; probes are marked. All results have one preset."""
    title = "Probes (not comparable with SUPERB)" if results[0]["preset"] == "probe" else "SUPERB"
    table = Table("task", "test", "lr", "seed", "step", "metrics (dev)", "metrics (test)", title=title)
    for result in results:
        task = f"{result['task']} (probe)" if result["preset"] == "probe" else result["task"]
        for test, scores in result["tests"].items():
            dev, shown = _shown(result["dev"]), _shown(scores)
            table.add_row(task, test, f"{result['lr']:g}", str(result["seed"]), str(result["best_step"]), dev, shown)
    return table


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
