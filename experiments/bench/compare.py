"""``interstack bench compare``: measure the speed of each switch on runs of ``interstack fit`` that take turns.

A variant is a recipe of ``experiments/configs`` with overrides as on the command line, so it runs as it would for a
user. Teacher and students have random weights and the corpus is noise; time depends on neither.
"""

import gc
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from callbacks.lookup import find_callback
from datamodules.errors import InputError
from datamodules.files import read_text, write_json
from experiments.bench.command import SCHEDULES, growth_speedup
from experiments.bench.laps import PARTS, StepLaps
from experiments.bench.made import earlier, made, training_device
from experiments.bench.noise import write_noise
from experiments.bench.random_teacher import save_random_teacher
from experiments.records.settings_yaml import load_settings
from experiments.shipped import find_shipped
from experiments.training.cache_targets import TargetsCLI
from experiments.training.fit import DistillationCLI
from lightning_modules.growth.schedules import stage_lengths

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent
TIMES = ("step_ms", *PARTS)
CORPUS_BATCHES = 12  # longer epochs repeat them


@dataclass
class Variant:
    """One setting to measure.

    Args:
        config: shipped recipe or YAML file.
        overrides: settings by their names on the command line.
        targets: ``bf16`` or ``int8`` reads the teacher's targets from a cache, made beforehand and not timed.
        features: ``bf16``, ``int8`` or ``float32`` reads the features of a frozen front end from that cache too.
        expected: expected ratio to other variants, by name; these are compared besides the file's first variant.
    """

    config: str = "full_l2l"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    targets: str | None = None
    features: str | None = None
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def cache(self) -> str | None:
        """Name of the folder of the cache that is read; ``None`` if none is."""
        if self.targets is None:
            return None
        return f"targets_{self.targets}" + (f"_features_{self.features}" if self.features else "")


@dataclass
class Place:
    """Inputs of a benchmark's runs, and the size of their steps."""

    folder: Path
    teacher: str
    batch_size: int
    seconds: float
    steps_per_epoch: int
    accelerator: str
    num_workers: int = 0

    def settings(self) -> dict[str, Any]:
        """Settings and machine of the runs, in plain values; turns with other settings are not comparable."""
        random = Path(self.teacher).parent == self.folder
        return {
            **made(training_device(self.accelerator)),
            **{name: getattr(self, name) for name in ("batch_size", "seconds", "steps_per_epoch", "num_workers")},
            "skipped_steps": skipped_steps(self.num_workers),
            "teacher": "random weights, HuBERT Base" if random else self.teacher,
        }

    def arguments(self, variant: Variant) -> list[str]:
        """Build the command line of a run; a variant's own overrides come last and win."""
        settings: dict[str, Any] = {
            "data.root": str(self.folder / "LibriSpeech"),
            "data.train_splits": ["train-clean-100"],
            "data.val_splits": [],
            "data.batch_size": self.batch_size,
            "data.batches_per_epoch": self.steps_per_epoch,
            "data.num_workers": self.num_workers,
            "data.cache_dir": str(self.folder / "manifests"),
            "model.teacher.init_args.model": self.teacher,
            "model.teacher.init_args.precision": "32",
            "trainer.accelerator": self.accelerator,
            "trainer.devices": 1,
            "trainer.precision": "32-true",
            "trainer.limit_val_batches": 0,
            "trainer.max_epochs": 1 if variant.config.startswith("full") else 4,
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
            "trainer.logger": False,
            "growth.measure_loss": False,
            "wandb.mode": "disabled",
            "log_samples": False,
            "max_batch_per_device": None,  # a lap is a micro-batch: what does not fit fails, instead of taking two
            "name": "run",
            "runs_dir": str(self.folder / "runs"),
        }
        if variant.cache is not None:
            settings |= {"data.crop": "fixed", "data.targets": str(self.folder / variant.cache)}
        settings |= variant.overrides
        words = ["fit", "--config", variant.config, "--trainer.callbacks+", "experiments.bench.laps.StepLaps"]
        for name, value in settings.items():
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return words


def skipped_steps(num_workers: int) -> int:
    """Count the steps of each epoch that do not count: two that compile and allocate, and those whose batches the data
    workers have ready by then (two each), for which no step would wait however slow the workers are."""
    return 2 + 2 * num_workers


def bench_compare(
    variants: str = "variants",
    only: list[str] | None = None,
    batch_size: int = 4,
    seconds: float = 5.0,
    steps_per_epoch: int = 4,
    rounds: int = 5,
    accelerator: str = "auto",
    num_workers: int = 0,
    teacher: str | None = None,
    output: str | None = None,
) -> None:
    """Time whole runs with different switches in turns; print ratios and write JSON.

    A run at full depth has one epoch, a growing run one per stage, of a few steps each. The first two steps of an epoch
    (compilation, optimizer state, first memory allocations) are not counted, and neither are two steps for each data
    worker, whose batches are ready by then. Every other round runs in reverse order, so that a machine that gets slower
    favours no variant. Time per step of a growing run is the mean over its stages
    (equal schedule); growths are reported separately. For a growing run the report also has f, the share of its deepest
    step that scales with depth, and for equal and prop-1 the speed-up predicted from f and the measured one over full
    depth with the same switches (prop-1 from the measured time of each depth).

    Args:
        variants: YAML file, or name of a shipped one: variants (for a CPU), variants_gpu, or variants_gpu_short with
            the few most important ones.
        only: names of the variants to run; those that they are compared with are added.
        batch_size: utterances per step.
        seconds: length of each utterance.
        steps_per_epoch: steps per epoch, more than are not counted; the corpus has at most 12 batches, which repeat.
        rounds: counted turns of every variant; median and quartiles are over these.
        accelerator: cpu, gpu or auto.
        num_workers: processes that decode audio; a fast GPU outruns decoding in the training process.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        output: JSON file to write after every run. The benchmark continues an existing file of the same commit,
            hardware and settings; runs of a variant are kept if its definition is the same.

    Raises:
        InputError: a number or a name is wrong.
        RuntimeError: some variants failed, after the others were measured and printed.
    """
    least = skipped_steps(num_workers) + 1
    if min(batch_size, rounds) < 1 or steps_per_epoch < least or seconds <= 0:
        raise InputError(
            f"batch_size={batch_size} and rounds={rounds} must be at least 1, steps_per_epoch={steps_per_epoch} at "
            f"least {least} with num_workers={num_workers}, and seconds={seconds} positive"
        )
    known = load_variants(find_variants(variants))
    chosen, path = choose(known, only), None if output is None else Path(output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = teacher or str(save_random_teacher(folder / "teacher"))
        place = Place(folder, encoder, batch_size, seconds, steps_per_epoch, accelerator, num_workers)
        turns = turns_of(known, earlier(path, place.settings()))
        missing = {label: variant for label, variant in chosen.items() if len(turns[label]) < rounds}
        if missing:
            write_noise(folder, batch_size * min(steps_per_epoch, CORPUS_BATCHES), seconds)
            attempt(place, *next(iter(missing.items())))  # not counted: it builds the manifest of the corpus
        failed: list[str] = []
        for turn in range(rounds):
            for label in list(missing) if turn % 2 == 0 else reversed(missing):
                if len(turns[label]) > turn or label in failed:
                    continue
                if (result := attempt(place, label, missing[label])) is None:
                    failed.append(label)
                    continue
                turns[label].append(result)
                if path is not None:
                    write_json(path, summarise(known, turns, place))
        print(table(summarise(known, turns, place)))
    if failed:
        raise RuntimeError(f"not measured, for the errors above: {', '.join(failed)}")


def turns_of(variants: Mapping[str, Variant], result: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Collect the turns of each variant from an earlier result, except of variants whose definition has changed."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for name, row in (result or {"variants": {}})["variants"].items():
        definition = vars(variants[name]) if name in variants else {}
        if not definition or any(row.get(key) != value for key, value in definition.items() if key != "expected"):
            log.warning("turns of %r are dropped: its definition has changed or is gone", name)
            continue
        turns[name] = [
            {**turn, "stages": {int(depth): ms for depth, ms in turn["stages"].items()}} for turn in row["turns"]
        ]
    return turns


def attempt(place: Place, label: str, variant: Variant) -> dict[str, Any] | None:
    """Run a variant, after writing its cache if that is not there; an error is logged, since it concerns no other."""
    try:
        if variant.cache is not None and not (place.folder / variant.cache).exists():
            write_cache(place, variant)
        return run(place, variant)
    except Exception:
        log.exception("the variant %r failed", label)
        return None
    finally:
        gc.collect()
        shutil.rmtree(place.folder / "runs", ignore_errors=True)


def find_variants(name: str) -> Path:
    """Find a file by path, or a shipped one by name.

    Raises:
        InputError: there is neither.
    """
    return find_shipped(name, SHIPPED, "--variants")


def load_variants(path: Path) -> dict[str, Variant]:
    """Read variants by name, in the order of the file.

    Raises:
        InputError: a key is unknown, or a variant to compare with is missing.
    """
    loaded = {}
    for name, values in load_settings(read_text(path)).items():
        try:
            loaded[name] = Variant(**(values or {}))
        except TypeError as error:
            raise InputError(f"{path}: variant {name!r}: {error}; keys are {', '.join(vars(Variant()))}") from error
    for name, variant in loaded.items():
        if unknown := sorted(set(variant.expected) - set(loaded)):
            raise InputError(f"{path}: variant {name!r} is compared with {unknown[0]!r}, which is not in the file")
    return loaded


def choose(variants: dict[str, Variant], only: Sequence[str] | None) -> dict[str, Variant]:
    """Select the named variants and those they are compared with, in the file's order; without names, all."""
    first = next(iter(variants))
    unknown = sorted(set(only or ()) - set(variants))
    if unknown:
        raise InputError(f"unknown variants {', '.join(unknown)}: choose from {', '.join(variants)}")
    wanted = set(only or variants)
    wanted |= {first} | {other for name in wanted for other in variants[name].expected}
    return {name: variant for name, variant in variants.items() if name in wanted}


def run(place: Place, variant: Variant) -> dict[str, Any]:
    """Train one run; return milliseconds per step and per part (means over stages), and per step of each depth.

    Growths are listed separately, because a real run has thousands of steps per growth.
    """
    torch.compiler.reset()  # this many runs in one process would reach the limit of compiled variants of a function
    cli = DistillationCLI(place.arguments(variant))
    laps = find_callback(cli.trainer, StepLaps)
    assert laps is not None
    stages: dict[int, list[dict[str, float]]] = {}
    for step in laps.steps:
        stages.setdefault(int(step["depth"]), []).append(step)
    counted = place.steps_per_epoch - skipped_steps(place.num_workers)
    # Means, not medians: with several data workers one step in several waits for all of them.
    means = {
        depth: {name: float(np.mean([step[name] for step in steps[-counted:]])) for name in TIMES}
        for depth, steps in stages.items()
    }
    result: dict[str, Any] = {name: float(np.mean([stage[name] for stage in means.values()])) for name in TIMES}
    result |= {
        "growth_ms": sum(laps.growths_ms),
        "stages": {depth: stage["step_ms"] for depth, stage in means.items()},
        "teacher_precision": cli.model.teacher.precision_used,
    }
    return result


def summarise(
    variants: Mapping[str, Variant], turns: Mapping[str, list[dict[str, Any]]], place: Place
) -> dict[str, Any]:
    """Compute each variant's medians over the turns, and its ratios to other variants within the same round.

    A variant without turns has no row, and nothing is compared with it.
    """
    first, rows = next(iter(variants)), {}
    for name, variant in variants.items():
        if own := turns[name]:
            rows[name] = {
                **vars(variant),
                **{key: median(turn[key] for turn in own) for key in (*TIMES, "growth_ms")},
                "growth": growth_speedup(
                    {depth: median(turn["stages"][depth] for turn in own) for depth in own[0]["stages"]}
                ),
                "against_full": (
                    {
                        schedule: ratio([by_schedule(turn, schedule) for turn in own], turns[full])
                        for schedule in SCHEDULES
                    }
                    if (full := same_switches(variants, name)) and turns[full]
                    else None
                ),
                "ratios": {
                    other: {**ratio(own, turns[other]), "expected": variant.expected.get(other)}
                    for other in dict.fromkeys([first, *variant.expected])
                    if other != name and turns[other]
                },
                "turns": own,
            }
    return {
        **place.settings(),
        "variants": rows,
    }


def same_switches(variants: Mapping[str, Variant], name: str) -> str | None:
    """Find the variant at full depth with the same switches as a growing one."""
    own = variants[name]
    for other, variant in variants.items():
        at_full_depth = variant.config.startswith("full") and not own.config.startswith("full")
        if at_full_depth and (variant.overrides, variant.cache) == (own.overrides, own.cache):
            return other
    return None


def by_schedule(turn: Mapping[str, Any], schedule: str) -> dict[str, float]:
    """Compute the time per step of a growing run whose stages have this schedule's lengths, from its time by depth."""
    depths = sorted(turn["stages"])
    lengths = stage_lengths(schedule, len(depths), 1000)
    spent = sum(turn["stages"][depth] * length for depth, length in zip(depths, lengths, strict=True))
    return {"step_ms": spent / sum(lengths)}


def ratio(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute how many times as fast ``own`` is: median and quartiles over the turns that both have."""
    ratios = [b["step_ms"] / a["step_ms"] for a, b in zip(own, other, strict=False)]
    low, high = np.percentile(ratios, [25, 75])
    return {"median": median(ratios), "low": float(low), "high": float(high)}


def table(result: Mapping[str, Any]) -> str:
    """Format times, ratios and f as Markdown tables, with a line on the settings."""
    parts = [name.removesuffix("_ms") for name in PARTS]
    times = [f"| variant | ms per step | {' | '.join(parts)} | growths |", f"|---|---{'|---' * len(parts)}|---|"]
    ratios = ["| variant | against | ratio | quartiles | expected |", "|---|---|---|---|---|"]
    for name, row in result["variants"].items():
        cells = [f"{row[key]:.0f}" for key in (*TIMES, "growth_ms")]
        times.append(f"| {name} | {' | '.join(cells)} |")
        for other, found in row["ratios"].items():
            expected = "-" if found["expected"] is None else str(found["expected"])
            spread = f"{found['low']:.2f} to {found['high']:.2f}"
            ratios.append(f"| {name} | {other} | {found['median']:.2f} | {spread} | {expected} |")
    growth = ["| variant | f | schedule | predicted | measured | off by |", "|---|---|---|---|---|---|"]
    for name, row in result["variants"].items():
        for schedule in SCHEDULES if row["growth"] else ():
            predicted, cells = row["growth"][schedule]["predicted"], ["-", "-"]
            if row["against_full"]:
                against = row["against_full"][schedule]
                spread = f"({against['low']:.2f} to {against['high']:.2f})"
                cells = [f"{against['median']:.3f} {spread}", f"{100 * (against['median'] / predicted - 1):+.0f} %"]
            growth.append(f"| {name} | {row['growth']['f']:.3f} | {schedule} | {predicted:.3f} | {' | '.join(cells)} |")
    rounds = min((len(row["turns"]) for row in result["variants"].values()), default=0)
    made = (
        f"{result['hardware']}, {result['threads']} threads; {result['batch_size']} x {result['seconds']} s; "
        f"{result['num_workers']} data workers; {rounds} rounds; teacher: {result['teacher']}; "
        f"commit {result['commit']}"
    )
    return "\n".join([*times, "", *ratios, "", *(growth if len(growth) > 2 else []), "", made])


def write_cache(place: Place, variant: Variant) -> None:
    """Write one cache for all variants that read the same: the paper's layers, more than some need."""
    assert variant.targets is not None
    assert variant.cache is not None
    overrides = {"model.student.front_end": "frozen"} if variant.features else {}
    options = place.arguments(Variant(overrides=overrides, targets=variant.targets, features=variant.features))[1:]
    options += ["--output", str(place.folder / variant.cache), "--dtype", variant.targets]
    TargetsCLI(["cache_targets", *options, *(["--features", variant.features] if variant.features else [])])
