"""The result of a run in plain values, and its upload to W&B."""

from collections.abc import Mapping, Sequence
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
    tests = module.test_scores
    return {
        "task": settings.task,
        "preset": settings.preset,
        "upstream": settings.upstream,
        "lr": settings.lr,
        "seed": settings.seed,
        "fold": settings.fold,
        "dev": checkpoint.best,
        "test": next(iter(tests.values())),
        "tests": tests,
        "best_step": checkpoint.best_step,
        "updates": trainer.global_step,
        "layer_weights": module.featurizer.layer_weights,
        "trainable_parameters": module.trainable_parameters,
        "hidden_states": module.upstream.num_states,
        "width": module.upstream.width,
        "utterances": {name: len(rows) for name, rows in prepared.corpus.splits.items()},
        "trials": {name: len(trials.pairs) for name, trials in prepared.corpus.trials.items()},
        "labels": [len(names) for names in prepared.corpus.labels],
        "batch_size": settings.recipe.effective_batch,
        "left_out": {
            "bad_audio": len(prepared.corpus.skipped),
            "too_short": prepared.corpus.too_short,
            "unknown_words": prepared.unknown_words,
        },
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


def mean_over_folds(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Build the result of a corpus with folds: the mean of every score, what all folds share, and each fold's own."""
    first, *others = results.values()
    shared = {key: value for key, value in first.items() if all(other[key] == value for other in others)}
    tests = {name: _mean([result["tests"][name] for result in results.values()]) for name in first["tests"]}
    return shared | {
        "fold": f"mean of {len(results)}",
        "dev": _mean([result["dev"] for result in results.values()]),
        "test": next(iter(tests.values())),
        "tests": tests,
        "best_step": ", ".join(str(result["best_step"]) for result in results.values()),
        "hours": sum(result["hours"] for result in results.values()),
        "config": {key: value for key, value in first["config"].items() if key not in ("fold", "output")},
        "folds": {
            fold: {key: value for key, value in result.items() if key in SCORES or key not in shared}
            for fold, result in results.items()
        },
    }


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


@rank_zero_only
def log_samples(trainer: L.Trainer, module: TaskModule, result: dict[str, Any]) -> None:
    """Log metrics, a table of hypotheses and references, and the layer weights as bars to W&B."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    import wandb

    prefix = _prefix(result)
    rows = [(one.key, *module.task.texts(one)) for one in next(iter(module.test_predictions.values()))[:SAMPLES_SHOWN]]
    layers = wandb.Table(["layer", "weight"], [[str(i), weight] for i, weight in enumerate(result["layer_weights"])])
    for logger in loggers:
        logger.experiment.log(
            {
                "trainer/global_step": trainer.global_step,
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


OVERALL: dict[str, dict[str, bool]] = {
    "pr": {"per": False},
    "ks": {"accuracy": True},
    "ic": {"accuracy": True},
    "sid": {"accuracy": True},
    "er": {"accuracy": True},
    "asr": {"wer": False},
    "qbe": {"mtwv": True},
    "sf": {"slot_type_f1": True, "slot_value_cer": False},
    "asv": {"eer": False},
    "sd": {"der": False},
}
"""The eleven metrics of the overall score, and whether more is better."""


def overall(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of the eleven metrics of all ten tasks in percent, errors as 100 minus the error; ``None`` without all ten.

    It is the overall score of the papers that compare distilled students on SUPERB (DPHuBERT, ARMHuBERT), 80.8 for
    HuBERT Base.
    """
    tests = {result["task"]: result["test"] for result in results if result["preset"] == "superb"}
    if not set(OVERALL) <= set(tests):
        return None
    parts = [(tests[task][name], more) for task, metrics in OVERALL.items() for name, more in metrics.items()]
    return sum(value if more else 100 - value for value, more in parts) / len(parts)


def table_of(results: list[dict[str, Any]]) -> Table:
    """Build a table with one row per run and test set, and the overall score below all ten tasks; probes are marked.

    All results have one preset.
    """
    title = "Probes (not comparable with SUPERB)" if results[0]["preset"] == "probe" else "SUPERB"
    table = Table("task", "test", "lr", "seed", "step", "metrics (dev)", "metrics (test)", title=title)
    for result in results:
        task = f"{result['task']} (probe)" if result["preset"] == "probe" else result["task"]
        for test, scores in result["tests"].items():
            dev, shown = _shown(result["dev"]), _shown(scores)
            table.add_row(task, test, f"{result['lr']:g}", str(result["seed"]), str(result["best_step"]), dev, shown)
    if (mean := overall(results)) is not None:
        table.add_row("overall", "", "", "", "", "", f"{mean:.2f}")
    return table


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
