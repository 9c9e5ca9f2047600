"""Runs that are resumed from every one of their checkpoints, compared bit for bit with the uninterrupted one.

Shared by the tests of one process and, through ``tests/ddp/resume.py``, of two.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpointing import RunCheckpoint
from callbacks.fingerprint import ResumeGuard
from callbacks.metrics import TrainingMetrics
from callbacks.throughput import ThroughputCallback
from tests.helpers import make_data, make_module, make_stacking, make_trainer

# Wall-clock time, which no resume can repeat.
TIMES = ("train_seconds", "seconds")


@dataclass(frozen=True)
class Scenario:
    """Settings that a resume must not notice; 4 epochs, stages 1, 2, 3, 4, dropout 0.1."""

    num_workers: int = 0
    accumulate: int = 1
    validation: str = "none"  # "epoch": at each epoch's end; "mid": in the middle of epochs too
    batches_per_epoch: int | None = None  # the corpus makes 3 global batches
    precision: str = "32-true"
    odd_tail: bool = False  # the epoch's last accumulation window has fewer micro-batches

    def trainer_settings(self) -> dict[str, Any]:
        batches = (self.batches_per_epoch or 3) * self.accumulate
        settings: dict[str, Any] = {
            "accumulate_grad_batches": self.accumulate,
            "precision": self.precision,
            "gradient_clip_val": 1.0,
            "enable_checkpointing": True,
        }
        if self.odd_tail:
            settings["limit_train_batches"] = batches = batches - 1
        if self.validation == "mid":
            settings["val_check_interval"] = max(1, batches // 2)
        return settings


@dataclass
class Recorder(Callback):
    """(epoch, batch, loss, rows, learning rate) of each micro-batch of this rank, and validation losses."""

    batches: list[tuple[int, int, float, list[int], float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = (trainer.current_epoch, batch_idx, float(outputs["loss"]), batch.index.tolist(), rate)
        self.batches.append(row)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def fit(folder: Path, inputs: Path, scenario: Scenario, resume: Path | None = None) -> Recorder:
    """One run in ``folder``; ``inputs`` holds ``teacher`` and ``corpus``."""
    recorder = Recorder()
    callbacks = [make_stacking(), ResumeGuard(), TrainingMetrics(), ThroughputCallback(), recorder]
    checkpoint = RunCheckpoint(every_n_steps=1, keep=1000)
    trainer = make_trainer(folder, *callbacks, checkpoint, **scenario.trainer_settings())
    data = make_data(
        inputs / "corpus",
        inputs / "cache",
        batch_size=8,
        num_workers=scenario.num_workers,
        batches_per_epoch=scenario.batches_per_epoch,
        val_splits=[] if scenario.validation == "none" else ["dev"],
    )
    optimizer = {"lr": 3e-3, "warmup_fraction": 0.2}
    trainer.fit(
        make_module(inputs / "teacher", optimizer=optimizer),
        datamodule=data,
        ckpt_path=str(resume) if resume else None,
    )
    return recorder


def checkpoints(folder: Path) -> list[Path]:
    """Those of steps, in their order."""
    return sorted((folder / "checkpoints").glob("step=*.ckpt"))


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Every place where two checkpoints (or parts of them) are not the same bit for bit, wall-clock times aside."""
    if type(one) is not type(other):
        yield f"{where}: {type(one).__name__} against {type(other).__name__}"
    elif isinstance(one, dict):
        for key in one.keys() | other.keys():
            place = f"{where}/{key}"
            if key in TIMES:
                continue
            if key not in one or key not in other:
                yield f"{place}: in one only"
            else:
                yield from differences(one[key], other[key], place)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} items against {len(other)}"
        for position, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{where}[{position}]")
    elif isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            yield f"{where}: {_distance(one, other)}"
    elif one != other:
        yield f"{where}: {one!r} against {other!r}"


def _distance(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)} against {tuple(other.shape)}"
    return f"tensors differ by up to {(one.double() - other.double()).abs().max().item():.2e}"


def file_differences(one: Path, other: Path) -> list[str]:
    """Of two checkpoint files."""
    loaded = [torch.load(path, weights_only=True, map_location="cpu") for path in (one, other)]
    return [f"{other.name}{text}" for text in differences(*loaded)]


def resume_problems(whole: Path, reference: Recorder, resumed: Path, run: Recorder, start: Path) -> list[str]:
    """What a run resumed from ``start`` did otherwise than the uninterrupted one from there on."""
    done = torch.load(start, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    expected = reference.batches[done["processed"] :]
    problems = [f"{len(run.batches)} batches instead of {len(expected)}"] if len(run.batches) != len(expected) else []
    problems += [f"batch {b} instead of {a}" for a, b in zip(expected, run.batches, strict=False) if a != b]
    last = reference.validations[len(reference.validations) - len(run.validations) :]
    problems += [f"validation {b} instead of {a}" for a, b in zip(last, run.validations, strict=True) if a != b]
    later = [path for path in checkpoints(whole) if path.name > start.name]
    written = checkpoints(resumed)
    if [path.name for path in written] != [path.name for path in later]:
        problems.append(f"wrote {[p.name for p in written]} instead of {[p.name for p in later]}")
    for ours, theirs in zip(later, written, strict=False):
        problems += file_differences(ours, theirs)
    return [f"resumed from {start.parent.parent.name}/{start.name}: {problem}" for problem in problems]


def hop_problems(
    folder: Path, inputs: Path, scenario: Scenario, second_hops: int | None = None
) -> tuple[list[str], int]:
    """Resume from every checkpoint of a run, and again from the checkpoints that those runs write.

    Args:
        second_hops: how many of the second kind, spread over all pairs; default: all.

    Returns:
        What went wrong (nothing, one hopes), and the number of runs that were resumed.
    """
    whole = folder / "whole"
    reference = fit(whole, inputs, scenario)
    starts = checkpoints(whole)[:-1]
    pairs = list(itertools.combinations(range(len(starts)), 2))
    chosen = set(pairs if second_hops is None else _spread(pairs, second_hops))
    problems: list[str] = []
    for first, start in enumerate(starts):
        once = folder / f"from_{first}"
        problems += resume_problems(whole, reference, once, fit(once, inputs, scenario, start), start)
        for _, second in sorted(pair for pair in chosen if pair[0] == first):
            twice, again = folder / f"from_{first}_{second}", once / "checkpoints" / starts[second].name
            if not again.is_file():
                problems.append(f"{again} is missing")
                continue
            problems += resume_problems(whole, reference, twice, fit(twice, inputs, scenario, again), again)
    return problems, len(starts) + len(chosen)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of ``items``, evenly spaced, the first and the last among them."""
    return [items[position * (len(items) - 1) // max(1, count - 1)] for position in range(count)]
