"""Measure the throughput of the data path: from files, from a packed corpus, with and without workers.

::

    interstack bench data --root /data/LibriSpeech --packed /data/packed --splits "[train-clean-100]"

Every number but ``soundfile`` comes from ``LibriSpeechDataModule``'s own training loader. The variants take turns, so
that a slow minute of the machine affects all of them. A corpus that fits the page cache is read from memory after the
first turn, which is not counted: this measures the processor, not the disk. With ``--cold true`` the system is asked to
drop the files from memory before each turn, so that the disk is measured.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch

from datamodules.errors import InputError
from datamodules.files import write_json
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.loading import AudioDataset
from datamodules.shards import forget_folders
from datamodules.target_cache import TargetCache
from experiments.bench.made import made

FLOATS_PER_PAGE, BYTES_PER_PAGE = 1024, 4096


class Turn(NamedTuple):
    """One measurement of one variant."""

    audio_seconds: float
    wall_seconds: float
    cpu_seconds: float  # CPU time of this process and its workers


def bench_data(
    root: str,
    packed: str | None = None,
    splits: list[str] | None = None,
    batch_seconds: float = 160.0,
    batches: int = 200,
    workers: list[int] | None = None,
    rounds: int = 5,
    cache_dir: str | None = None,
    targets: str | None = None,
    cold: bool = False,
    output: str | None = None,
) -> None:
    """Time reading, decoding, cropping, batching and handing over; print a table and write JSON.

    Args:
        root: corpus of audio files, as ``data.root``.
        packed: the same corpus made by ``interstack pack``.
        splits: splits to read; default: train-clean-100.
        batch_seconds: seconds of audio per batch.
        batches: batches per turn; with few of them the start of the workers dominates.
        workers: values of ``data.num_workers`` to try; default: 0 and 2.
        rounds: counted turns of every variant; median and spread are over these.
        cache_dir: folder for manifests, as ``data.cache_dir``.
        targets: cache of the same corpus made by ``interstack cache-targets`` with ``data.batch_size=null`` and
            ``data.batch_seconds`` as here; it is read with the packed corpus if one is given, else with the files, or
            alone if it has features.
        cold: drop the files from the system's memory before each turn, so that they are read from the disk (Linux; it
            has no effect on a file system in memory).
        output: JSON file to write.
    """
    if min(rounds, batches) < 1 or batch_seconds <= 0:
        raise InputError(f"rounds={rounds}, batches={batches} and batch_seconds={batch_seconds} must be positive")
    result = measure(
        {"files": root} | ({"packed": packed} if packed else {}),
        splits or ["train-clean-100"],
        batch_seconds,
        batches,
        workers if workers is not None else [0, 2],
        rounds,
        cache_dir,
        targets,
        cold,
    )
    if output is not None:
        write_json(output, result)
    print(table(result))


def measure(
    roots: dict[str, str],
    splits: list[str],
    batch_seconds: float,
    batches: int,
    workers: list[int],
    rounds: int,
    cache_dir: str | None,
    targets: str | None = None,
    cold: bool = False,
) -> dict[str, Any]:
    """Measure everything that ``bench_data`` reports, in plain values."""
    variants: dict[str, Callable[[int], float]] = {}
    sources: dict[str, dict[str, Any]] = {name: {"root": root} for name, root in roots.items()}
    if targets is not None:
        name, root = list(roots.items())[-1]
        source = "features" if TargetCache(targets).has_features else f"{name}, targets"
        sources[source] = {"root": root, "crop": "fixed", "targets": targets}
    for source, settings in sources.items():
        for num_workers in workers:
            data = LibriSpeechDataModule(
                train_splits=splits,
                val_splits=[],
                batch_size=None,
                batch_seconds=batch_seconds,
                batches_per_epoch=batches,
                num_workers=num_workers,
                cache_dir=cache_dir,
                **settings,
            )
            data.prepare_data()
            data.setup()
            if targets is not None and "targets" in settings:
                data.use_targets({}, TargetCache(targets).layers, features=True)
            variants[f"{source}, {num_workers} workers"] = _loader_turn(data)
            if source == "files":
                variants["soundfile alone"] = _soundfile_turn(data, batch_seconds * batches)
    turns: dict[str, list[Turn]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            if cold:
                forget([*roots.values(), *([targets] if targets else [])])
            turn = _timed(run, number)
            if number:  # the first one fills the page cache
                turns[name].append(turn)
    return {
        **made(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "splits": splits,
        "batch_seconds": batch_seconds,
        "batches": batches,
        "rounds": rounds,
        "cold": cold,
        "variants": [_row(name, turns[name]) for name in variants],
    }


def forget(folders: list[str]) -> None:
    """Ask the system to drop all files below ``folders`` from its memory."""
    forget_folders()  # what is mapped is not dropped
    for folder in folders:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # only pages that are on the disk can be dropped
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _loader_turn(data: LibriSpeechDataModule) -> Callable[[int], float]:
    def run(epoch: int) -> float:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        samples = 0
        for batch in loader:
            if batch.waveforms is not None:
                batch.waveforms[:, ::FLOATS_PER_PAGE].sum()  # a worker's data arrives when its pages are touched
            if batch.cached is not None:
                batch.cached.data[:, ::BYTES_PER_PAGE].sum()
            samples += int(batch.num_samples.sum())
        return samples / data.sample_rate

    return run


def _soundfile_turn(data: LibriSpeechDataModule, audio_seconds: float) -> Callable[[int], float]:
    """Read whole files one after another and nothing else: an upper bound for a loader of files on one core."""
    dataset = data.train_dataloader().dataset
    assert isinstance(dataset, AudioDataset)
    manifest = dataset.manifest

    def run(epoch: int) -> float:
        samples = row = 0
        while samples < audio_seconds * data.sample_rate:
            waveform_T, _ = soundfile.read(manifest.path(row % len(manifest)), dtype="float32")
            samples += len(waveform_T)
            row += 1
        return samples / data.sample_rate

    return run


def _timed(run: Callable[[int], float], epoch: int) -> Turn:
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    audio_seconds = run(epoch)
    # The loader has waited for its workers, so their time is among the children's.
    return Turn(audio_seconds, time.perf_counter() - wall, sum(os.times()[:4]) - cpu)


def _row(name: str, turns: list[Turn]) -> dict[str, Any]:
    rates = [turn.audio_seconds / turn.wall_seconds for turn in turns]
    low, high = np.percentile(rates, [25, 75])
    return {
        "variant": name,
        "audio_s_per_s": median(rates),
        "spread": float(high - low),
        "audio_s_per_cpu_s": median(turn.audio_seconds / max(turn.cpu_seconds, 0.01) for turn in turns),
    }


def table(result: dict[str, Any]) -> str:
    """Format the result as lines of text."""
    lines = [f"{'':<28}{'audio s / s':>14}{'quartiles':>12}{'audio s / core s':>18}"]
    for row in result["variants"]:
        numbers = f"{row['audio_s_per_s']:>14.0f}{row['spread']:>12.0f}{row['audio_s_per_cpu_s']:>18.0f}"
        lines.append(f"{row['variant']:<28}{numbers}")
    settings = f"{result['rounds']} rounds of {result['batches']} batches of {result['batch_seconds']} s"
    settings += ", from the disk" if result["cold"] else ", from memory where it fits"
    lines.append(f"{result['hardware']}; {result['cores']} cores; {settings}; commit {result['commit']}")
    return "\n".join(lines)
