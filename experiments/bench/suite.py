"""``interstack bench suite``: run all benchmarks of one GPU into one folder, most valuable first.

Every part is a benchmark in its own process, with a time limit and a log. A part that fails or runs out of time does
not stop the others. The same call continues an interrupted suite; finished parts are not repeated.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import InputError
from datamodules.files import write_json, write_text
from experiments.bench.made import earlier, made, training_device
from experiments.bench.noise import write_noise
from experiments.bench.random_teacher import save_random_teacher
from experiments.bench.suite_table import table
from lightning_modules.student_config import StudentConfig

WORKERS = (0, 4, 8, 12)
GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL
TINY_STUDENT = json.dumps(asdict(StudentConfig(16, 32, 2)))


@dataclass(frozen=True)
class Part:
    """One benchmark: the words after ``interstack``, the name of its result file, its time limit in seconds, and the
    words of a command that must run before it."""

    name: str
    words: tuple[str, ...]
    output: str
    limit: float
    before: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The subcommand of ``bench``; empty for ``bench`` itself, the step by depth."""
        return "" if self.words[1].startswith("--") else self.words[1]


def bench_suite(
    output: str,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    budget: float | None = None,
    tiny: bool = False,
    only: list[str] | None = None,
) -> None:
    """Run profiles, the step by depth, whole runs, lengths, the loader, growth and scaling, one after another.

    Args:
        output: folder of the results, with a JSON file per benchmark, logs/, and a summary in table.md. Finished parts
            with the same commit, machine and command are kept.
        accelerator: gpu or cpu; a CPU gets smaller steps and compiles nothing.
        budget: seconds for all parts together; parts that are not reached are left for the next call. Default: only
            the limits of the parts.
        tiny: use tiny models and steps, to check that everything works.
        only: names of the parts to run; default: all.

    Raises:
        InputError: a part does not exist, the budget is not positive, or, at the end, a part failed or ran out of time.
    """
    if budget is not None and budget <= 0:
        raise InputError(f"budget={budget} must be positive")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the running part is ended too
    folder, end = Path(output), time.monotonic() + (budget or float("inf"))
    settings = {**made(training_device(accelerator)), "accelerator": accelerator, "tiny": tiny}
    with inputs(tiny) as (corpus, teacher):
        parts = choose(suite_parts(accelerator, corpus, teacher if tiny else None), only)
        state = earlier(folder / "suite.json", settings) or {**settings, "parts": {}}
        for part in parts:
            words = [word.replace(str(corpus.parent), "INPUTS") for word in part.words]
            old = state["parts"].get(part.name)
            if old and old["status"] == "done" and old["command"] == words:
                continue
            if part.kind == "data" and not corpus.exists():
                write_noise(corpus.parent, *((8, 1.0) if tiny else (200, 15.0)))
            if part.before and not teacher.exists():
                save_random_teacher(teacher)
            print(f"{part.name} ...", flush=True)
            state["parts"][part.name] = run_part(part, folder, end) | {"command": words, "output": part.output}
            if state["parts"][part.name]["status"] in ("failed", "out of time"):
                print(last_lines(folder / "logs" / f"{part.name}.log"), flush=True)
            write_json(folder / "suite.json", state)
            write_text(folder / "table.md", table(folder, state))
    print(table(folder, state))
    left = [part.name for part in parts if state["parts"][part.name]["status"] != "done"]
    if left:
        raise InputError(f"not finished: {', '.join(left)}; see {folder / 'logs'}, and call again to go on")


@contextmanager
def inputs(tiny: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the folders of a corpus and of a teacher; both are written on demand, except a tiny teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if tiny:
            save_random_teacher(folder / "teacher", layers=12, width=64, channels=16)
        yield folder / "LibriSpeech", folder / "teacher"


def choose(parts: list[Part], only: list[str] | None) -> list[Part]:
    """Select the named parts, or all if none is named."""
    names = [part.name for part in parts]
    if unknown := sorted(set(only or ()) - set(names)):
        raise InputError(f"unknown part {unknown[0]!r}: choose from {', '.join(names)}")
    return [part for part in parts if not only or part.name in only]


def run_part(part: Part, folder: Path, end: float) -> dict[str, Any]:
    """Run a part; its status is done, failed, out of time, or not reached before ``end`` (of ``time.monotonic``)."""
    limit = min(part.limit, end - time.monotonic())
    if limit <= 0:
        return {"status": "not reached", "seconds": 0.0}
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    commands = [part.before] if part.before else []
    commands.append((*part.words, "--output", str(folder / part.output)))
    start, status = time.monotonic(), "done"
    with (logs / f"{part.name}.log").open("w", encoding="utf-8") as log:
        for words in commands:
            command = [sys.executable, "-m", "experiments.cli", *words]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status = "failed" if process.wait(start + limit - time.monotonic()) else "done"
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:
                stop(process)
            if status != "done":
                break
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}


def last_lines(log: Path, number: int = 3, width: int = 300) -> str:
    """Return the end of a log, where an error says what it is; a part that was not started has none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(line[:width] for line in lines[-number:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started; on SIGTERM torch.distributed.run ends its own."""
    for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def suite_parts(accelerator: str, corpus: Path, tiny_teacher: Path | None) -> list[Part]:
    """List every part, most valuable first. With a tiny teacher all parts are tiny."""
    gpu, tiny = accelerator == "gpu", tiny_teacher is not None
    where: tuple[str, ...] = ("--accelerator", accelerator)
    model: tuple[str, ...] = ()
    if tiny:
        model = ("--teacher", str(tiny_teacher), "--student", TINY_STUDENT)
    fast = json.dumps(gpu and not tiny)
    seconds = "0.5" if tiny else "15" if gpu else "5"
    rounds = "1" if tiny else "12" if gpu else "3"

    def size(batch: int) -> tuple[str, ...]:
        return ("--batch_size", str(batch if gpu and not tiny else max(1, batch // 16)), "--seconds", seconds)

    def profile(name: str, batch: int, *more: str) -> Part:
        words = ("bench", "profile", *where, *size(batch), "--rounds", rounds, *model, *more)
        return Part(f"profile_{name}", words, "profile.json", 240 if "--compile" in more else 120)  # a cold compiler

    def step(name: str, limit: float, *more: str) -> Part:
        return Part(name, ("bench", *where, "--rounds", rounds, *model, *more), f"{name}.json", limit)

    compiled = ("--teacher_compile", fast, "--student.compile", fast)
    channels_last = ("--teacher_kernels", "channels_last", "--student.kernels", "channels_last")
    bf16 = ("--precision", "bf16-mixed", "--teacher_precision", "bf16")
    features = ("--cached", "features", "--student.front_end", "frozen")
    librispeech = ("--lengths", "librispeech", "--batch_size", "32" if gpu and not tiny else "2", "--depths", "[12]")
    # The second variant is compared with the first.
    runs: tuple[str, ...] = (
        "--steps_per_epoch",
        "15",
        "--rounds",
        "1",
        "--only",
        '["full, bf16"]',
        "--teacher",
        str(tiny_teacher),
    )
    runs = runs if tiny else ("--steps_per_epoch", "30" if gpu else "7", "--rounds", "2")
    workers = sorted({min(number, len(os.sched_getaffinity(0))) for number in WORKERS})
    data: tuple[str, ...] = (
        ("--batch_seconds", "2", "--batches", "3") if tiny else ("--batch_seconds", "480", "--batches", "60")
    )
    data += ("--cache_dir", str(corpus.parent / "cache"))
    growth = ("--student_size", "[12,16]", "--teacher_size", "[3,16]", "--seconds", "0.2") if tiny else ()
    points = ("--processes", "[1]", "--seconds", "[5.0]", "--depths", "[12]", "--batch_sizes", "[4]") if tiny else ()
    variants = "variants_gpu_short" if gpu or tiny else "variants"
    return [
        profile("eager", 16),
        profile("compiled", 32, "--compile", fast),
        step("step_compiled", 300, *size(32), *bf16, *compiled),
        Part(
            "compare",
            (
                "bench",
                "compare",
                "--variants",
                variants,
                *where,
                *size(32),
                "--num_workers",
                str(workers[-1] // 2),
                *runs,
            ),
            "compare.json",
            580,
        ),
        step("step_features", 200, *size(32), *bf16, *compiled, *features),
        step("lengths", 200, *librispeech, *bf16),
        step("lengths_grid", 200, *librispeech, *bf16, "--length_grid", "1600"),
        step("lengths_cudnn", 200, *librispeech, *bf16, "--cuda.attention", "cudnn"),
        step("step_channels_last", 200, *size(32), *bf16, *compiled, *channels_last),
        Part(
            "kernels",
            ("bench", "kernels", *where, *size(16), "--precision", "bf16", "--compile", fast, "--rounds", rounds),
            "kernels.json",
            300,
        ),
        Part(
            "data",
            ("bench", "data", "--root", str(corpus), "--workers", json.dumps(workers), "--rounds", "1", *data),
            "data.json",
            120,
        ),
        _reading_features(corpus, accelerator, tiny, ("--workers", json.dumps(workers), "--rounds", "1", *data)),
        step("step_eager", 200, *size(32), *bf16),
        *([] if tiny else _more_profiles(profile, fast)),
        Part("growth", ("bench", "growth", *where, *growth), "growth.json", 90),
        Part(
            "scaling",
            (
                "bench",
                "scaling",
                *where,
                "--precision",
                "bf16-mixed",
                "--rounds",
                "1" if tiny else "3",
                *model,
                *points,
            ),
            "scaling.json",
            400,
        ),
    ]


def _reading_features(corpus: Path, accelerator: str, tiny: bool, options: tuple[str, ...]) -> Part:
    """Read cached targets and features, which are written beside the corpus before that."""
    cache = str(corpus.parent / "features")
    before = ["cache-targets", "--config", "full_l2l", "--features", "true", "--output", cache]
    before += ["--data.root", str(corpus), "--data.train_splits", "[train-clean-100]", "--data.val_splits", "[]"]
    before += ["--data.crop", "fixed", "--data.batch_size", "null", "--data.batch_seconds", "2" if tiny else "480"]
    before += ["--data.cache_dir", str(corpus.parent / "cache"), "--model.student.front_end", "frozen"]
    before += ["--model.teacher.init_args.model", str(corpus.parent / "teacher"), "--trainer.accelerator", accelerator]
    words = ("bench", "data", "--root", str(corpus), "--targets", cache, *options)
    return Part("data_features", words, "data_features.json", 400, tuple(before))


def _more_profiles(profile: Callable[..., Part], fast: str) -> list[Part]:
    """List profiles of other sizes and switches, which matter less."""
    return [
        profile("small", 8),
        profile("large", 64, "--compile", fast),
        profile("shared", 32, "--compile", fast, "--front_end", "shared"),
        profile("features", 32, "--compile", fast, "--front_end", "frozen", "--cached", "features"),
        profile("shallow", 32, "--compile", fast, "--depth", "3"),
        profile("float32", 16, "--precision", "32-true"),
    ]
