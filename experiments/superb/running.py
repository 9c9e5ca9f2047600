"""Run one task once: train, choose on dev, test, write the result. Finished runs are kept, killed ones continued."""

import json
import logging
import uuid
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from callbacks.guards import NonFiniteGuard
from datamodules.batching import MicroBatch
from datamodules.errors import InputError
from datamodules.files import FolderLock, clear_temporaries, read_json, read_text, write_bytes, write_json
from datamodules.superb.datamodule import SuperbDataModule
from experiments.launch.meeting import warn_if_unreachable
from experiments.records.loggers import build_loggers
from experiments.records.runs import is_rank_zero
from experiments.superb.checkpoint import LAST, TaskCheckpoint, load_best
from experiments.superb.choosing import choose_state
from experiments.superb.options import PROBE_AUDIO_BYTES, RunSettings
from experiments.superb.preparation import Prepared, prepare
from experiments.superb.results import log_samples, result_of
from experiments.training.on_cpu import prepare_cpu
from lightning_modules.checkpoint_files import require_sound
from lightning_modules.superb.feature_cache import FeatureCache
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.task_module import TaskModule, TaskOptimisation, deterministic_cudnn
from lightning_modules.superb.upstream import Upstream

log = logging.getLogger(__name__)

RESULT, CONFIG, LABELS, WANDB_ID = "result.json", "config.json", "labels.json", "wandb_id"
# s3prl skips every update whose gradient is NaN and goes on; this many in a row mean that training has diverged.
MOST_SKIPPED_UPDATES = 1000


def is_finished(settings: RunSettings) -> bool:
    """Whether the run's folder holds its result."""
    return (Path(settings.output) / RESULT).is_file()


@deterministic_cudnn()
def run_task(settings: RunSettings, upstream: Upstream, prepared: Prepared | None = None) -> dict[str, Any]:
    """Train, test, write ``result.json`` and the files of hypotheses, and return the result.

    Args:
        settings: settings of the run.
        upstream: the frozen encoder.
        prepared: task and corpus, if they are already read.

    Raises:
        InputError: the corpus is faulty, or the folder holds a run with other settings.
    """
    folder = Path(settings.output)
    config = _plain(settings) | {"upstream_digest": upstream.digest()}
    _require_same(folder, config)
    if is_finished(settings):
        log.info("kept the finished run in %s", folder)
        result = read_json(folder / RESULT)
        _add_labels(settings, upstream, result)
        return result
    with FolderLock(folder, "run.lock", "wait for it, or choose another --output") if is_rank_zero() else nullcontext():
        return _run(settings, config, upstream, prepared)


def _add_labels(settings: RunSettings, upstream: Upstream, result: dict[str, Any]) -> None:
    """Add the label lists to a run that was finished before they were kept, if its corpus is there and has as many."""
    path = Path(settings.output) / LABELS
    if path.is_file():
        return
    try:
        labels = prepare(settings, upstream.rate).corpus.labels
    except InputError as error:
        log.warning("%s is not added, since the corpus cannot be read: %s", path, error)
        return
    if [len(names) for names in labels] == result.get("labels"):
        _write_json(path, {"labels": labels})
    else:
        log.warning("%s is not added, since the corpus no longer has the labels of the run", path)


def _run(
    settings: RunSettings, config: dict[str, Any], upstream: Upstream, prepared: Prepared | None
) -> dict[str, Any]:
    folder = Path(settings.output)
    if is_rank_zero():
        clear_temporaries(folder)
    if settings.updates and (tail := settings.updates % settings.eval_every):
        log.warning(
            "the last %d of %d updates are not scored on dev, which is every %d (as in s3prl)",
            *(tail, settings.updates, settings.eval_every),
        )
    prepared = prepared or prepare(settings, upstream.rate)
    _write_json(folder / CONFIG, config)
    _write_json(folder / LABELS, {"labels": prepared.corpus.labels})
    module = build_module(settings, upstream, prepared)
    data = build_data(settings, prepared)
    checkpoint = TaskCheckpoint(folder, settings.save_every)
    guard = NonFiniteGuard(MOST_SKIPPED_UPDATES)
    trainer = build_trainer(settings, config, [checkpoint, guard] if settings.updates else [])
    _require_batches(prepared, settings, trainer.world_size)
    if module.cache is not None:
        module.cache.require_room(_read_whole(data, settings))
    if settings.is_probe:
        _standardise(module, data, trainer)
    if settings.updates:
        _train(module, data, trainer, folder)
    else:
        states = range(upstream.num_states)
        choose_state(module, data, trainer, checkpoint, states[-1:] if settings.states == "last" else states)
    trainer.test(module, datamodule=data, verbose=False, weights_only=True)
    result = result_of(settings, config, module, prepared, checkpoint, guard, trainer)
    _write_files(folder, module)
    log_samples(trainer, module, result)
    _write_json(folder / RESULT, result)
    return result


def _train(module: TaskModule, data: SuperbDataModule, trainer: L.Trainer, folder: Path) -> None:
    """Train from the last checkpoint, if there is one, and load the best featurizer and head."""
    last = folder / LAST
    if last.is_file():
        require_sound(last, "delete it to begin this run again")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # the upstream always is
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    load_best(folder, module)


def build_data(settings: RunSettings, prepared: Prepared) -> SuperbDataModule:
    """Build the data module of the prepared corpus; a probe keeps its training audio in memory."""
    return SuperbDataModule(
        settings.task,
        settings.data,
        prepared.target_length if settings.recipe.sampling == "window" else None,
        settings.recipe,
        settings.seed,
        prepared.corpus,
        PROBE_AUDIO_BYTES if settings.is_probe else 0,
    )


def build_module(settings: RunSettings, upstream: Upstream, prepared: Prepared) -> TaskModule:
    """Build the module with the feature cache that the settings ask for and, for a probe, its starting bias."""
    cache = None
    if settings.feature_cache is not None or settings.is_probe:
        place = Path(settings.feature_cache) if settings.feature_cache else None
        cache = FeatureCache(upstream, place, settings.devices.precision)
    optimisation = TaskOptimisation(settings.lr, settings.updates if settings.is_probe else None)
    start = prepared.probe_start(upstream) if settings.is_probe else None
    tests = prepared.corpus.tests
    return TaskModule(upstream, prepared.task, optimisation, settings.seed, cache, start, tests, settings.states)


def build_trainer(settings: RunSettings, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
    """Build a trainer that counts optimizer updates over endless batches, and evaluates and clips as s3prl does."""
    recipe, devices = settings.recipe, settings.devices
    folder = Path(settings.output)
    name = f"{settings.task}-{settings.preset}-{Path(settings.upstream).stem}-lr{settings.lr:g}-seed{settings.seed}"
    several = devices.devices * devices.num_nodes > 1
    trainer = L.Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        num_nodes=devices.num_nodes,
        strategy="ddp" if several else "auto",
        precision=devices.precision,
        logger=build_loggers(folder, name, settings.wandb, run_id=_wandb_id(folder), config=config),
        callbacks=callbacks,
        max_steps=settings.updates or -1,
        max_epochs=-1,
        val_check_interval=settings.eval_every * recipe.accumulate or None,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=TASK_RECIPES[settings.task].clip_norm,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=devices.progress_bar,
        log_every_n_steps=devices.log_every_n_steps,
        default_root_dir=str(folder),
    )
    prepare_cpu(trainer)
    warn_if_unreachable(trainer.num_nodes, trainer.local_rank)
    return trainer


def _wandb_id(folder: Path) -> str:
    """Read the run's W&B id, or make one: training, testing and every resume use it. Only rank zero's is used."""
    path = folder / WANDB_ID
    if path.is_file():
        return read_text(path)
    made = uuid.uuid4().hex[:12]
    _write(path, made)
    return made


def _standardise(module: TaskModule, data: SuperbDataModule, trainer: L.Trainer) -> None:
    """Set the featurizer's statistics from the training utterances; states are computed once, as in training."""
    assert module.cache is not None
    cache, rows = module.cache, data.corpus.train
    device = trainer.strategy.root_device
    module.upstream.to(device)

    def waveform(index: int) -> Tensor:
        whole = np.array([rows[index].num_samples])
        batch = data.train_set[MicroBatch(np.array([index]), np.zeros(1, dtype=int), whole, whole)]
        return batch.waveforms[0].to(device)

    with trainer.precision_plugin.forward_context():
        module.featurizer.set_statistics(cache.states(waveform(index)) for index in range(len(rows)))


def _require_batches(prepared: Prepared, settings: RunSettings, world_size: int) -> None:
    """Refuse fewer batches than processes: a rank without a batch skips the evaluation, and the others wait for it."""
    for name, rows in prepared.corpus.splits.items():
        batches = -(-len(rows) // settings.recipe.eval_batch_size)
        if name != "train" and batches < world_size:
            raise InputError(
                f"{name!r} has {batches} batches of {settings.recipe.eval_batch_size}, fewer than {world_size} "
                "processes: use fewer devices"
            )


def _read_whole(data: SuperbDataModule, settings: RunSettings) -> list[int]:
    """Samples of each utterance whose states a cache keeps; of train at most as many as the updates draw."""
    (train, evaluated), recipe = data.whole_utterances(), settings.recipe
    # A probe reads all of train for its statistics.
    drawn = len(train) if settings.is_probe else (settings.updates or 0) * recipe.accumulate * recipe.batch_size
    longest_first = sorted((row.num_samples for row in train), reverse=True)
    return longest_first[:drawn] + [row.num_samples for row in evaluated]


def _require_same(folder: Path, config: dict[str, Any]) -> None:
    path = folder / CONFIG
    if not path.is_file():
        return
    old, new = _decisive(read_json(path)), _decisive(json.loads(json.dumps(config)))
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        shown = ", ".join(f"{key}: {old.get(key)} there, {new[key]} now" for key in different)
        raise InputError(f"{folder} holds a run with other settings ({shown}): choose another --output, or delete it")


IRRELEVANT = ("output", "devices", "wandb", "save_every", "upstream", "data")
"""Settings that do not influence the numbers, or whose parts are compared one by one."""


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """Select the settings that influence a run's numbers: whether there is a cache counts, its folder does not."""
    own = {key: value for key, value in config.items() if key not in IRRELEVANT}
    own |= {"fold": config.get("fold", ""), "states": config.get("states", "all")}  # earlier versions had neither
    data = {f"data.{key}": value for key, value in config["data"].items() if key not in ("num_workers", "cache_dir")}
    cached = config["preset"] == "probe" or config["feature_cache"] is not None
    return own | data | {"feature_cache": cached, "trainer.precision": config["devices"]["precision"]}


def _plain(settings: RunSettings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


@rank_zero_only
def _write(path: Path, content: str | bytes) -> None:
    write_bytes(path, content if isinstance(content, bytes) else content.encode())


@rank_zero_only
def _write_files(folder: Path, module: TaskModule) -> None:
    for name, predictions in module.test_predictions.items():
        for file, content in module.task.hypothesis_files(name, predictions).items():
            _write(folder / file, content)


_write_json = rank_zero_only(write_json)
