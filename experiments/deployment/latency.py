"""``interstack latency``: time encoders beside each other on this CPU, with what they cost in size and memory.

    interstack latency --models '{"teacher": "facebook/hubert-base-ls960", "student": "runs/first"}' --output latency

The output folder gets ``latency.json``, ``latency.md`` and ``latency.png``.
"""

import logging
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_bytes, write_json, write_text
from datamodules.frames import WINDOW
from experiments.bench.made import made
from experiments.deployment.macs import gmacs_per_second, superb_gmacs
from experiments.deployment.measuring import describe, measure
from experiments.deployment.rows import Row, find_rows
from experiments.deployment.scores import Scores, find_scores
from experiments.deployment.tables import markdown, picture
from experiments.report.figures import require_matplotlib
from lightning_modules.deployment.onnx_file import versions
from lightning_modules.precision import warn_if_bf16_is_slow

log = logging.getLogger(__name__)

MACS_SECONDS = 15.0
"""Length of the utterance for the MACs per second of audio."""


def latency(
    models: dict[str, str] | list[str],
    output: str,
    seconds: list[float] = [1.0, 5.0, 15.0],  # noqa: B006 (read only, and shown by --help)
    batch_size: int = 4,
    threads: list[int] | None = None,
    precisions: list[str] = ["float32"],  # noqa: B006
    rounds: int = 5,
    scores: str | None = None,
    score_names: dict[str, str] | None = None,
    metric: str | None = None,
) -> None:
    """Time encoders beside each other on this CPU; write a table, a picture and JSON.

    Every row is a process of its own. All rows of a number of threads stay loaded and run in turns, one at a time.

    Args:
        models: name and place of each encoder, {"teacher": "facebook/hubert-base-ls960", ...}, or a list of places. A
            place is a training checkpoint, a run folder, a Hugging Face folder or hub name, a folder with model.onnx,
            random:LAYERSxWIDTHxHEADS (HuBERT's layout), or random:MODEL (that model's configuration).
        output: folder to write.
        seconds: lengths of the inputs.
        batch_size: utterances of a batch, timed besides one utterance.
        threads: numbers of threads to compute with; default: one, and all that this process may use.
        precisions: float32, bfloat16 and int8 (dynamic quantisation of linear layers), for all but ONNX files.
        rounds: counted turns of every input; median and quartiles are over these.
        scores: results.json of a study, whose scores the table and the picture show.
        score_names: row of that study for each encoder; default: the encoder's own name.
        metric: score to show, such as pr_probe/per; default: the first of the study.
    """
    counts = available_threads() if threads is None else threads
    check(seconds, batch_size, counts, rounds)
    require_matplotlib()
    with tempfile.TemporaryDirectory() as folder:
        rows = find_rows(models, precisions, Path(folder))
        found = None if scores is None else find_scores(Path(scores), {row.name for row in rows}, score_names, metric)
        if "bfloat16" in precisions and any(row.format == "PyTorch" for row in rows):
            warn_if_bf16_is_slow(torch.device("cpu"), "precisions=[bfloat16]", "[float32]")
        result = measured(rows, seconds, batch_size, counts, rounds, found)
    place = Path(output)
    write_json(place / "latency.json", result)
    tables, drawn = markdown(result), picture(result)
    write_text(place / "latency.md", f"{tables}\n![{drawn.heading}](latency.png)\n\n{drawn.caption}\n")
    write_bytes(place / "latency.png", drawn.png())
    print(tables)


def available_threads() -> list[int]:
    """One thread, and all that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return sorted({1, len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1})


def check(seconds: Sequence[float], batch_size: int, threads: Sequence[int], rounds: int) -> None:
    """Refuse numbers that cannot be measured, with an InputError that names the option."""
    if not seconds or min(seconds) * SAMPLE_RATE < WINDOW:
        raise InputError(f"seconds={list(seconds)}: every length must have a frame, {WINDOW / SAMPLE_RATE} s or more")
    if not threads or min(threads) < 1:
        raise InputError(f"threads={list(threads)}: give one number or more, each at least 1")
    if min(batch_size, rounds) < 1:
        raise InputError(f"batch_size={batch_size} and rounds={rounds} must be at least 1")


def measured(
    rows: Sequence[Row],
    seconds: Sequence[float],
    batch_size: int,
    threads: Sequence[int],
    rounds: int,
    scores: Scores | None = None,
) -> dict[str, Any]:
    """Measure all rows; return the content of ``latency.json``."""
    load = os.getloadavg()[0]
    facts = describe(rows, max(threads), min(seconds))
    by_threads = {str(number): measure(rows, number, seconds, batch_size, rounds) for number in threads}
    entries: list[dict[str, Any]] = [
        {
            "name": row.name,
            "label": row.label,
            "source": row.source,
            "random_weights": row.random_weights,
            "format": row.format,
            "precision": row.precision,
            **own,
            **macs(row.config),
            "score": None if scores is None else scores.values.get(row.name),
            "threads": {number: each[place] for number, each in by_threads.items()},
        }
        for place, (row, own) in enumerate(zip(rows, facts, strict=True))
    ]
    return {
        "command": f"interstack {shlex.join(sys.argv[1:])}",
        **made(torch.device("cpu")),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",  # the rows have their own threads
        "threads": list(threads),
        "versions": versions(*filter(find_spec, ("torch", "transformers", "onnxruntime"))),
        "load_before": load,
        "seconds": sorted(seconds),
        "batch_size": batch_size,
        "rounds": rounds,
        "macs_seconds": MACS_SECONDS,
        "score": None if scores is None else scores.title,
        "better": None if scores is None else scores.better,
        "rows": entries,
    }


def macs(config: Any) -> Mapping[str, float | None]:
    """Count 1e9 MACs per second of audio and on SUPERB's measure; ``None`` where the configuration is not known."""
    if config is None:
        return {"gmacs_per_second": None, "superb_gmacs": None}
    return {"gmacs_per_second": gmacs_per_second(config, MACS_SECONDS), "superb_gmacs": sum(superb_gmacs(config))}
