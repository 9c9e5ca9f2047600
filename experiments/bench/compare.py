"""``interstack bench compare``: what each switch is worth, measured on runs of ``interstack fit`` that take turns.

A variant is a recipe of ``experiments/configs`` and overrides, as on the command line: what is measured is what a user
of that setting gets. Teacher and students have random weights and the corpus is noise; time depends on neither.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from callbacks.lookup import find_callback
from callbacks.summary import hardware
from experiments.bench.laps import PARTS, StepLaps
from experiments.bench.random_teacher import SAMPLE_RATE, save_random_teacher
from experiments.cache_targets import TargetsCLI
from experiments.runs import git_commit, write_atomically
from experiments.training import DistillationCLI

VARIANTS = Path(__file__).with_name("variants.yaml")


@dataclass
class Variant:
    """One setting to measure.

    Args:
        config: shipped recipe or YAML file.
        overrides: settings by their names on the command line.
        against: variant that its ratio is relative to; by default the first of the file.
        expected: ratio that was written down before measuring.
        targets: read the teacher's targets from a cache of this dtype (bf16, int8), which is written before the clock
            starts; segments are then fixed.
    """

    config: str = "full_l2l"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    expected: float | None = None
    targets: str | None = None


@dataclass
class Place:
    """Where the runs of a benchmark find their inputs, and the size of their steps."""

    folder: Path
    teacher: str
    batch_size: int
    seconds: float
    steps_per_epoch: int
    accelerator: str

    def arguments(self, variant: Variant) -> list[str]:
        """Command line of a run; a variant's own overrides come last and win."""
        settings: dict[str, Any] = {
            "data.root": str(self.folder / "LibriSpeech"),
            "data.train_splits": ["train-clean-100"],
            "data.val_splits": [],
            "data.batch_size": self.batch_size,
            "data.num_workers": 0,
            "data.cache_dir": str(self.folder / "manifests"),
            "model.teacher.init_args.model": self.teacher,
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
            "name": "run",
            "runs_dir": str(self.folder / "runs"),
        }
        if variant.targets is not None:
            settings |= {"data.crop": "fixed", "data.targets": str(self.folder / f"targets_{variant.targets}")}
        settings |= variant.overrides
        words = ["fit", "--config", variant.config, "--trainer.callbacks+", "experiments.bench.laps.StepLaps"]
        for name, value in settings.items():
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return words


def bench_compare(
    variants: str | None = None,
    only: list[str] | None = None,
    batch_size: int = 4,
    seconds: float = 5.0,
    steps_per_epoch: int = 2,
    rounds: int = 5,
    accelerator: str = "auto",
    teacher: str | None = None,
    output: str | None = None,
) -> None:
    """Time whole runs with different switches in turns; print ratios and write JSON.

    A run at full depth has one epoch, a growing run one for each stage, of a few steps each; the first step of a run
    (compilation, optimizer state) is not counted. Time per step of a growing run weighs its stages as the run does and
    has the growths in it.

    Args:
        variants: YAML file; default: the shipped one.
        only: names of the variants to run; those that they are compared with are added.
        batch_size: utterances per step.
        seconds: length of each.
        steps_per_epoch: steps of each epoch.
        rounds: counted turns of every variant; median and quartiles are over these.
        accelerator: cpu, gpu or auto.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        output: JSON file to write; after every round, so that an interrupted benchmark leaves what it has.
    """
    if min(batch_size, rounds) < 1 or steps_per_epoch < 2 or seconds <= 0:
        raise ValueError(
            f"batch_size={batch_size} and rounds={rounds} must be at least 1, steps_per_epoch={steps_per_epoch} at "
            f"least 2 and seconds={seconds} positive"
        )
    chosen = choose(load_variants(Path(variants) if variants else VARIANTS), only)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder, batch_size * steps_per_epoch, seconds)
        encoder = teacher or str(save_random_teacher(folder / "teacher"))
        place = Place(folder, encoder, batch_size, seconds, steps_per_epoch, accelerator)
        for dtype in sorted({variant.targets for variant in chosen.values() if variant.targets is not None}):
            write_targets(place, dtype)
        turns: dict[str, list[dict[str, float]]] = {variant: [] for variant in chosen}
        for turn in range(rounds + 1):
            for label, variant in chosen.items():
                measured = run(place, variant)
                if turn:  # the first turn builds caches of compiled kernels and of the corpus
                    turns[label].append(measured)
            result = summarise(chosen, turns, place)
            if output is not None and turn:
                write_atomically(Path(output), json.dumps(result, indent=1) + "\n")
    print(table(result))


def load_variants(path: Path) -> dict[str, Variant]:
    """Variants by name, in the order of the file.

    Raises:
        ValueError: an unknown key, or a variant to compare with that is not there.
    """
    loaded = {}
    for name, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        try:
            loaded[name] = Variant(**(values or {}))
        except TypeError as error:
            raise ValueError(f"{path}: variant {name!r}: {error}; keys are {', '.join(vars(Variant()))}") from error
    for name, variant in loaded.items():
        if variant.against is not None and variant.against not in loaded:
            raise ValueError(f"{path}: variant {name!r} is compared with {variant.against!r}, which is not in the file")
    return loaded


def choose(variants: dict[str, Variant], only: Sequence[str] | None) -> dict[str, Variant]:
    """The named variants with those they are compared with, in the file's order; all where none is named."""
    first = next(iter(variants))
    unknown = sorted(set(only or ()) - set(variants))
    if unknown:
        raise ValueError(f"unknown variants {', '.join(unknown)}: choose from {', '.join(variants)}")
    wanted = set(only or variants)
    wanted |= {variants[name].against or first for name in wanted}
    return {name: variant for name, variant in variants.items() if name in wanted}


def run(place: Place, variant: Variant) -> dict[str, float]:
    """Milliseconds per step of one run and of its parts, as its stages weigh them, with the growths in it."""
    torch.compiler.reset()  # so many runs in one process would reach the limit of compiled variants of a function
    cli = DistillationCLI(place.arguments(variant))
    laps = find_callback(cli.trainer, StepLaps)
    assert laps is not None
    stages = sorted({step["epoch"] for step in laps.steps})
    names = ("step_ms", *PARTS)
    per_stage = [
        {name: median(s[name] for s in laps.steps if s["epoch"] == stage) for name in names} for stage in stages
    ]
    result = {name: float(np.mean([stage[name] for stage in per_stage])) for name in names}
    result["growth_ms"] = sum(laps.growths_ms)
    result["step_ms"] += result["growth_ms"] / (len(stages) * place.steps_per_epoch)
    del cli
    gc.collect()
    shutil.rmtree(place.folder / "runs")
    return result


def summarise(
    variants: Mapping[str, Variant], turns: Mapping[str, list[dict[str, float]]], place: Place
) -> dict[str, Any]:
    """Plain values: per variant the medians over the turns, and the ratio to another variant's turn beside it."""
    first, rows = next(iter(variants)), {}
    for name, variant in variants.items():
        own, other = turns[name], turns[variant.against or first]
        if not own:
            continue
        ratios = [b["step_ms"] / a["step_ms"] for a, b in zip(own, other, strict=True)]
        low, high = np.percentile(ratios, [25, 75])
        rows[name] = {
            **vars(variant),
            "against": variant.against or first,
            **{key: median(turn[key] for turn in own) for key in own[0]},
            "ratio": median(ratios),
            "ratio_quartiles": [float(low), float(high)],
            "turns": own,
        }
    return {
        "commit": git_commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "batch_size": place.batch_size,
        "seconds": place.seconds,
        "steps_per_epoch": place.steps_per_epoch,
        "teacher": place.teacher if Path(place.teacher).parent != place.folder else "random weights, HuBERT Base",
        "variants": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table and a line on how it was made."""
    parts = [name.removesuffix("_ms") for name in PARTS]
    lines = [
        f"| variant | ms per step | {' | '.join(parts)} | ratio | quartiles | against | expected |",
        f"|---|---{'|---' * len(parts)}|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        low, high = row["ratio_quartiles"]
        cells = [name, f"{row['step_ms']:.0f}", *(f"{row[part]:.0f}" for part in PARTS)]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", row["against"]]
        lines.append(f"| {' | '.join([*cells, '-' if row['expected'] is None else str(row['expected'])])} |")
    rounds = min((len(row["turns"]) for row in result["variants"].values()), default=0)
    lines.append(
        f"\n{result['hardware']}, {result['threads']} threads; {result['batch_size']} x {result['seconds']} s; "
        f"{rounds} rounds; teacher: {result['teacher']}; commit {result['commit']}"
    )
    return "\n".join(lines)


def write_targets(place: Place, dtype: str) -> None:
    """A cache for every variant that reads targets of that dtype: the paper's layers, of which some may need fewer."""
    options = place.arguments(Variant(targets=dtype))[1:]
    TargetsCLI(["cache_targets", *options, "--output", str(place.folder / f"targets_{dtype}"), "--dtype", dtype])


def write_noise(folder: Path, utterances: int, seconds: float) -> None:
    """A split ``train-clean-100`` of utterances of noise, all of one length."""
    chapter = folder / "LibriSpeech" / "train-clean-100" / "100" / "0"
    chapter.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(utterances):
        samples = generator.standard_normal(round(seconds * SAMPLE_RATE)) * 0.1
        soundfile.write(chapter / f"100-0-{number:04d}.flac", samples.clip(-1, 1), SAMPLE_RATE)
