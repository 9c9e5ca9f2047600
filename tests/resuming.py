"""Runs that are resumed from every one of their checkpoints, compared bit for bit with the uninterrupted one.

In one process call :func:`hop_problems`. For two, ``tests/callbacks/test_resume.py`` starts::

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.resuming FOLDER INPUTS SPECS.json

where each rank writes what went wrong to ``FOLDER/problems_RANK.json``.
"""

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpointing import RunCheckpoint
from callbacks.metrics import TrainingMetrics
from callbacks.resume_guard import ResumeGuard
from callbacks.throughput import ThroughputCallback
from tests.helpers import POLICY_STAGES, make_data, make_module, make_stacking, make_trainer
from tests.students import KINDS, PAIR_STAGES

# What no resume repeats and no training depends on: wall-clock time, metrics that describe the last validation
# (none has been made since the resume), and progress of a validation loop (which begins anew).
IGNORED = re.compile(r"/(train_)?seconds$|^/interstack/metrics/|/epoch_loop\.val_loop\b")

# Of the teacher's 4 layers depth 1 learns 0, depth 2 also 2, depth 3 only 0 again, and depth 4 all.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "skip": {"intermediate": "l2l", "layers": [0, 1, 2, 3], "unmatched": "skip", "head": "mlp", "output_weight": 0.5},
    "masked": {"masked": "drawn"},
}
MASKS: dict[str, Any] = {"mask_time_prob": 0.8, "mask_time_length": 2}

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Scenario:
    """Settings that a resume must not notice; 4 epochs, stages 1, 2, 3, 4, or 2, 4, 6, 8 of layers in pairs."""

    num_workers: int = 0
    accumulate: int = 1
    validation: str = "none"  # "epoch": at each epoch's end; "mid": in the middle of epochs too
    batches_per_epoch: int | None = None  # the corpus makes 3 global batches
    precision: str = "32-true"
    odd_tail: bool = False  # the epoch's last accumulation window has fewer micro-batches
    dropout: float = 0.1
    objective: str | None = None  # name in OBJECTIVES
    accelerator: str = "cpu"
    student: str = "hubert"  # see tests.students

    def trainer_settings(self) -> dict[str, Any]:
        batches = (self.batches_per_epoch or 3) * self.accumulate
        settings: dict[str, Any] = {
            "accumulate_grad_batches": self.accumulate,
            "precision": self.precision,
            "accelerator": self.accelerator,
            "deterministic": self.accelerator != "cpu",  # a CPU is by itself
            "gradient_clip_val": 1.0,
            "enable_checkpointing": True,
        }
        if self.odd_tail:
            settings["limit_train_batches"] = batches = batches - 1
        if self.validation == "none":
            settings["limit_val_batches"] = 0
        if self.validation == "mid":
            settings["val_check_interval"] = max(1, batches // 2)
        return settings


@dataclass
class Recorder(Callback):
    """(epoch, batch, loss, rows, learning rate) of each micro-batch of this rank, and validation losses."""

    batches: list[tuple[int, int, float, list[int], float]] = field(default_factory=list)
    validations: list[tuple[int, int, float]] = field(default_factory=list)  # micro-batches, steps, loss

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = (trainer.current_epoch, batch_idx, float(outputs["loss"]), batch.index.tolist(), rate)
        self.batches.append(row)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        micro_batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.validations.append((micro_batches, trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def fit(folder: Path, inputs: Path, scenario: Scenario, resume: Path | None = None) -> Recorder:
    """One run in ``folder``; ``inputs`` holds ``teacher`` and ``corpus``."""
    recorder = Recorder()
    stages = PAIR_STAGES["interleaved"] if scenario.student == "reused maps" else POLICY_STAGES["interleaved"]
    callbacks = [make_stacking(stages=stages), ResumeGuard(), TrainingMetrics(), ThroughputCallback(), recorder]
    checkpoint = RunCheckpoint(every_n_steps=1, keep=1000)
    settings = scenario.trainer_settings()
    if WORLD_SIZE > 1:
        settings |= {"devices": WORLD_SIZE, "strategy": "ddp"}
    trainer = make_trainer(folder, *callbacks, checkpoint, **settings)
    data = make_data(
        inputs / "corpus",
        inputs / "cache",
        batch_size=8,
        num_workers=scenario.num_workers,
        batches_per_epoch=scenario.batches_per_epoch,
    )
    optimizer, objective = {"lr": 3e-3, "warmup_fraction": 0.2}, OBJECTIVES.get(scenario.objective or "")
    student = MASKS if scenario.objective == "masked" else {}
    trainer.fit(
        make_module(
            inputs / "teacher",
            stages[-1],
            dropout=scenario.dropout,
            optimizer=optimizer,
            objective=objective,
            **KINDS[scenario.student] | student,
        ),
        datamodule=data,
        ckpt_path=str(resume) if resume else None,
    )
    return recorder


def checkpoints(folder: Path) -> list[Path]:
    """Those of steps, in their order."""
    return sorted((folder / "checkpoints").glob("step=*.ckpt"))


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Every place where two checkpoints (or parts of them) are not the same bit for bit, ``IGNORED`` aside."""
    if type(one) is not type(other):
        yield f"{where}: {type(one).__name__} against {type(other).__name__}"
    elif isinstance(one, dict):
        for key in one.keys() | other.keys():
            place = f"{where}/{key}"
            if IGNORED.search(place):
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
    checkpoint = torch.load(start, weights_only=True)
    done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    expected = reference.batches[done["processed"] :]
    problems = [f"{len(run.batches)} batches instead of {len(expected)}"] if len(run.batches) != len(expected) else []
    problems += [f"batch {b} instead of {a}" for a, b in zip(expected, run.batches, strict=False) if a != b]
    later = [validation for validation in reference.validations if validation[0] > done["processed"]]
    problems += [f"validations {run.validations} instead of {later}"] if run.validations != later else []
    # A validation after the checkpoint's last micro-batch comes before the checkpoint: no resume makes it up.
    # (The metrics of a resumed run's checkpoint are those since its resume.)
    known = [loss for seen, _, loss in reference.validations if seen <= done["processed"]]
    if known and start.is_relative_to(whole) and checkpoint["interstack"]["metrics"]["val/loss"] != known[-1]:
        problems.append("the checkpoint lacks the validation that was due before it")
    if RANK == 0:
        problems += _written_problems(whole, resumed, start)
    return [f"rank {RANK} from {start.parent.parent.name}/{start.name}: {problem}" for problem in problems]


def _written_problems(whole: Path, resumed: Path, start: Path) -> list[str]:
    later = [path for path in checkpoints(whole) if path.name > start.name]
    written = checkpoints(resumed)
    if [path.name for path in written] != [path.name for path in later]:
        return [f"wrote {[p.name for p in written]} instead of {[p.name for p in later]}"]
    return [text for ours, theirs in zip(later, written, strict=True) for text in file_differences(ours, theirs)]


def hop_problems(folder: Path, inputs: Path, scenario: Scenario, second_hops: int | None = None) -> list[str]:
    """What goes wrong on resuming from every checkpoint of a run, and from those that the resumed runs write.

    Args:
        second_hops: how many of the second kind, spread over all pairs; default: all.
    """
    whole = folder / "whole"
    reference = fit(whole, inputs, scenario)
    starts = checkpoints(whole)[:-1]
    assert len(starts) == 4 * (scenario.batches_per_epoch or 3) - 1
    pairs = list(itertools.combinations(range(len(starts)), 2))
    chosen = sorted(set(pairs if second_hops is None else _spread(pairs, second_hops)))
    problems: list[str] = []
    for first, start in enumerate(starts):
        once = folder / f"from_{first}"
        problems += resume_problems(whole, reference, once, fit(once, inputs, scenario, start), start)
        for second in (second for at, second in chosen if at == first):
            twice, again = folder / f"from_{first}_{second}", once / "checkpoints" / starts[second].name
            problems += resume_problems(whole, reference, twice, fit(twice, inputs, scenario, again), again)
            _remove(twice)
        _remove(once)
    _remove(whole)
    return problems


def _remove(folder: Path) -> None:
    """Only rank zero writes checkpoints, so it alone may remove them: after the comparison, which it makes."""
    if RANK == 0:
        shutil.rmtree(folder)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of ``items``, evenly spaced, the first and the last among them."""
    return [items[position * (len(items) - 1) // max(1, count - 1)] for position in range(count)]


def main() -> None:
    folder, inputs, specs = (Path(argument) for argument in sys.argv[1:])
    problems: dict[str, list[str]] = {}
    for name, spec in json.loads(specs.read_text()).items():
        problems[name] = hop_problems(folder / name, inputs, Scenario(**spec["scenario"]), spec["second_hops"])
    (folder / f"problems_{RANK}.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main()
