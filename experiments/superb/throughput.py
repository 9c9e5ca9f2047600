"""``python -m experiments.superb.throughput --upstream MODEL``: time an optimizer update of every SUPERB task.

Batches are the recipes', and utterances are noise of one length (:func:`seconds_of`), so no corpus is needed. The
feature cache is measured warm, with every utterance's states on disk. The result is a Markdown table on the standard
output.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import soundfile

from callbacks.hardware import hardware
from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_text
from datamodules.superb.datamodule import SuperbDataModule
from datamodules.superb.registry import find_source
from datamodules.superb.trials import COLUMNS as TRIAL_COLUMNS
from datamodules.superb.trials import trials_file
from experiments.records.runs import git_commit
from experiments.superb.options import RunSettings, TaskData
from experiments.superb.preparation import prepare
from experiments.superb.running import build_module
from experiments.training.on_cpu import prepare_cpu
from lightning_modules.stopwatch import synchronize
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES
from lightning_modules.superb.task_module import deterministic_cudnn
from lightning_modules.superb.upstream import load_upstream

DEFAULT_SECONDS, UTTERANCES = 3.0, 64
COLUMNS = {"text": " ".join(["HELLO"] * 6), "tags": " ".join(["O"] * 5 + ["artist"]), "segments": "a 0 2, b 1 3"}
"""Values of columns that are not labels: six words, each with a tag, and two speakers."""
TRAINED = tuple(task for task in SUPERB_TASKS if TASK_RECIPES[task].updates)


class UpdateTimer(L.Callback):
    """Records the time at the end of each optimizer update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > len(self.ends):
            synchronize(trainer.strategy.root_device)
            self.ends.append(time.perf_counter())


def seconds_of(task: str) -> float:
    """Seconds of an utterance: the length to which the recipe crops, or three."""
    recipe = find_source(task).recipe
    crop = recipe.train_max_samples or recipe.silence_samples
    return crop / SAMPLE_RATE if crop else DEFAULT_SECONDS


def write_corpus(folder: Path, task: str) -> Path:
    """Write a table of noise for the task; an utterance has six words and the label ``one``."""
    layout = find_source(task).table
    if layout is None:
        raise InputError(f"task {task} reads no table, so it cannot be timed: choose some of {','.join(TRAINED)}")
    values = "\t".join(COLUMNS.get(name, "one") for name in layout.columns)
    lines = ["\t".join(("path", "split", *layout.columns))]
    splits = ["train"] * UTTERANCES + ["dev"] * 2 + ["test"] * 2
    for number, split in enumerate(splits):
        noise_T = np.random.default_rng(number).standard_normal(int(seconds_of(task) * SAMPLE_RATE)) * 0.1
        soundfile.write(folder / f"{number}.wav", noise_T, SAMPLE_RATE)
        lines.append(f"{number}.wav\t{split}\t{values}")
    write_text(folder / "lexicon.txt", "HELLO HH AH0 L OW1\n")
    path = folder / "table.tsv"
    write_text(path, "\n".join(lines) + "\n")
    if layout.trials is not None:
        places = {split: splits.index(split) for split in ("dev", "test")}
        pairs = [f"{split}\t{one}\t{one + 1}\t1\n{split}\t{one + 1}\t{one}\t0" for split, one in places.items()]
        write_text(trials_file(str(path)), "\n".join(["\t".join(TRIAL_COLUMNS), *pairs]) + "\n")
    return path


@deterministic_cudnn()
def seconds_per_update(task: str, upstream: str, cached: bool, updates: int, accelerator: str = "auto") -> float:
    """Mean over ``updates`` after a first one that is not counted; with the cache, it is filled beforehand."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_corpus(folder, task)
        data = TaskData(str(table), num_workers=0, lexicon=str(folder / "lexicon.txt"))
        settings = RunSettings(
            task=task,
            upstream=upstream,
            data=data,
            output=str(folder / "run"),
            preset="superb",
            lr=1e-4,
            seed=0,
            updates=updates + 1,
            eval_every=1,
            save_every=1,
            feature_cache=str(folder / "cache") if cached else None,
        )
        encoder = load_upstream(upstream)
        prepared = prepare(settings, encoder.rate)
        module = build_module(settings, encoder, prepared)
        length = prepared.target_length if settings.recipe.sampling == "window" else None
        batches = SuperbDataModule(task, data, length, settings.recipe, 0, prepared.corpus)
        if cached:
            _fill(module, batches)
        timer = UpdateTimer()
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            callbacks=[timer],
            max_steps=updates + 1,
            max_epochs=-1,
            accumulate_grad_batches=settings.recipe.accumulate,
            gradient_clip_val=TASK_RECIPES[task].clip_norm,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        prepare_cpu(trainer)
        trainer.fit(module, datamodule=batches)
        return (timer.ends[-1] - timer.ends[0]) / updates


def _fill(module: Any, batches: SuperbDataModule) -> None:
    """Run every training utterance through the upstream once, so that the cache is full, as late in a long run."""
    batches.setup()
    seen: set[str] = set()
    for batch in batches.train_dataloader():
        for row, waveform_T in zip(batch.rows, batch.waveforms, strict=True):
            if row.key not in seen:
                module.cache.states(waveform_T)
                seen.add(row.key)
        if len(seen) == UTTERANCES:
            return


def superb_throughput(
    upstream: str, tasks: str = ",".join(TRAINED), updates: int = 2, accelerator: str = "auto"
) -> None:
    """Measure all tasks and print the table.

    Args:
        upstream: encoder, as in `interstack superb`.
        tasks: tasks to measure, separated by commas.
        updates: timed optimizer updates per task.
        accelerator: cpu, cuda, mps or auto; one device is used.
    """
    warnings.simplefilter("ignore")
    trainer = L.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    print(f"commit {git_commit()}, {hardware(trainer.strategy.root_device)}\n")
    print("| task | utterances x seconds | s per update | with the cache | ratio |\n|---|---|---|---|---|")
    for task in tasks.split(","):
        plain, cached = (seconds_per_update(task, upstream, cached, updates, accelerator) for cached in (False, True))
        row = f"| {task} | {_batch(task)} | {plain:.2f} | {cached:.2f} | {plain / cached:.1f} |"
        print(row, flush=True)


def _batch(task: str) -> str:
    return f"{find_source(task).recipe.effective_batch} x {seconds_of(task):g}"


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(superb_throughput)
