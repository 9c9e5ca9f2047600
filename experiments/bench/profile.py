"""``interstack bench profile``: time one training step kernel by kernel, and the host's submission of it.

The step is that of training (autocast, losses, backward, clipping, fused AdamW) without a Trainer, so that the profile
holds nothing else. Weights and audio are random. On a CPU the same code counts torch's operators.
"""

import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import read_json, write_json, write_text
from experiments.bench.command import matmul_peak, objective_for, step_flops
from experiments.bench.made import made, training_device
from experiments.bench.noise import Cached, noise
from experiments.bench.random_teacher import save_random_teacher
from lightning_modules.distillation import DistillationModule
from lightning_modules.precision import computing_in
from lightning_modules.stopwatch import TimePoint, milliseconds, synchronize, time_point
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher

TIMED = ("teacher_ms", "forward_ms", "backward_ms", "optimizer_ms")
WARM_UP = 3
TOP = 60
# The first pattern that matches a kernel's name decides: names of cuDNN's convolutions match matrix products, too.
KINDS = (
    ("triton", r"^triton_"),  # their names are of the operators that they fuse
    ("attention", r"flash|fmha|sdpa|softmax|attention"),
    ("layout", r"nchwToNhwc|nhwcToNchw|[tT]ranspose|permute"),
    ("fourier", r"_fft_|cufft|regular_fft|vector_fft"),
    ("conv", r"conv|wgrad|dgrad|fprop|cudnn|implicit"),
    ("gemm", r"gemm|cutlass|nvjet|cublas|splitK|matmul|ampere_|xmma|gemv|aten::(mm|addmm|bmm|baddbmm)$"),
    ("group norm", r"group_norm|GroupNorm|RowwiseMoments|ComputeInternalGradients|ComputeBackwardFusedParams"),
    ("layer norm", r"layer_norm|LayerNorm|GammaBeta|weight_norm|WeightNorm"),
    ("optimizer", r"multi_tensor|FusedAdam|foreach|[lL]p[nN]orm|_fused_adam"),
    ("gelu", r"[gG]elu|GELU"),
    ("dropout", r"dropout|philox|bernoulli"),
    ("copy/cast", r"[cC]opy|Memcpy|Memset|fill"),
    ("reduce", r"reduce|aten::(sum|mean)$"),
    ("elementwise", r"elementwise|vectorized|aten::(add|sub|mul|div)_?$"),
)


@dataclass(frozen=True)
class Row:
    """Settings of one profile; one row of the file."""

    accelerator: str
    batch_size: int
    seconds: float
    depth: int
    precision: str
    compile: bool
    front_end: str
    cached: Cached
    rounds: int
    teacher: str | None
    student: Mapping[str, Any]


def bench_profile(
    batch_size: int = 16,
    seconds: float = 15.0,
    depth: int = 12,
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed",
    compile: bool = False,
    front_end: Literal["trained", "frozen", "shared"] = "trained",
    cached: Cached = "none",
    rounds: int = 12,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    teacher: str | None = None,
    student: StudentConfig | None = None,
    output: str | None = None,
) -> None:
    """Time one step in parts, then profile one: kernels by kind, their number, the host's time, memory.

    Args:
        batch_size: utterances per step.
        seconds: length of each utterance.
        depth: depth of the student.
        precision: precision of teacher and student.
        compile: compile both teacher and student.
        front_end: front end of the student.
        cached: what the batch has as if from a cache, in bf16: none, targets (no teacher runs), or features (no
            convolution either; needs front_end frozen or shared).
        rounds: timed steps, after three that are not timed; times are medians over these.
        accelerator: cpu, gpu or auto; a GPU is timed by its own events, a CPU by the host's clock.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        student: sizes of the student, except depth, compile and front_end, which are set above; default: the paper's.
        output: JSON file with a row for each call. An existing row of the same commit, machine and settings is printed,
            not measured again. The longest kernels are written beside the file as text.
    """
    if min(batch_size, depth, rounds) < 1 or seconds <= 0:
        raise InputError(f"batch_size={batch_size}, depth={depth}, rounds={rounds}, seconds={seconds} must be positive")
    sizes = asdict(student or StudentConfig()) | {"num_layers": depth, "compile": compile, "front_end": front_end}
    row = Row(accelerator, batch_size, seconds, depth, precision, compile, front_end, cached, rounds, teacher, sizes)
    device, path = training_device(accelerator), None if output is None else Path(output)
    rows: list[dict[str, Any]] = read_json(path) if path is not None and path.is_file() else []
    wanted = json.loads(json.dumps(made(device) | asdict(row)))
    found = next((old for old in rows if all(old.get(name) == value for name, value in wanted.items())), None)
    if found is None:
        result, kernels = measure(row, device)
        found = wanted | result
        if path is not None:
            write_text(path.with_name(f"{path.stem}_{name_of(row)}.txt"), top(kernels))
            write_json(path, [*rows, found])
    print(text(found))


def name_of(row: Row) -> str:
    """Make a short name for files."""
    words = [f"{row.batch_size}x{row.seconds:g}", row.precision, f"depth{row.depth}", row.front_end]
    words += [] if row.cached == "none" else [f"cached_{row.cached}"]
    return "_".join([*words, "compiled" if row.compile else "eager"])


class _Step:
    """A training step that records time points between its parts."""

    def __init__(self, row: Row, device: torch.device) -> None:
        precision: Literal["32", "bf16"] = "bf16" if "bf16" in row.precision else "32"
        with tempfile.TemporaryDirectory() as folder:
            model = row.teacher or str(save_random_teacher(Path(folder)))
            teacher = HuggingFaceTeacher(model, precision=precision, compile=row.compile)
        config = StudentConfig(**row.student)
        module = DistillationModule(teacher, config, objective_for([row.depth]), total_steps=1000)
        self.module, self.device = module.to(device).train(), device
        teacher.prepare(device)
        self.autocast = computing_in(precision, device)
        self.parameters = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.batch = self.noise(row.batch_size, row.seconds, row.cached)

    def noise(self, batch_size: int, seconds: float, cached: Cached) -> Any:
        """Make a batch on the device."""
        return noise(batch_size, [round(seconds * SAMPLE_RATE)], False, self.module, cached)[0].to(self.device)

    def __call__(self) -> list[TimePoint]:
        points = [time_point(self.device)]
        with self.autocast:
            targets = self.module.targets(self.batch)
            points.append(time_point(self.device))
            loss = self.module.losses(self.batch, targets=targets).total
        points.append(time_point(self.device))
        loss.backward()
        points.append(time_point(self.device))
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [*points, time_point(self.device)]

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        synchronize(self.device)


def measure(row: Row, device: torch.device) -> tuple[dict[str, Any], dict[str, tuple[float, int]]]:
    """Measure the numbers of a row, and milliseconds and calls of each kernel of one step."""
    step = _Step(row, device)
    start = time.perf_counter()
    step()
    step.wait()
    first = time.perf_counter() - start
    for _ in range(WARM_UP - 1):
        step()
    step.wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    laps = [step() for _ in range(row.rounds)]
    step.wait()
    times = [milliseconds(lap[0], lap[-1]) for lap in laps]
    low, high = np.percentile(times, [25, 75])
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    submission = _submit_ms(step, row)  # before the profiler, which slows down all launches after it
    kernels = profiled(step)
    peak = matmul_peak(device, row.precision)
    flops = row.batch_size * step_flops(step.module, round(row.seconds * SAMPLE_RATE), row.cached)
    audio, middle = row.batch_size * row.seconds, median(times)
    result = {
        "step_ms": middle,
        "spread_ms": float(high - low),
        **{
            part: median(milliseconds(lap[number], lap[number + 1]) for lap in laps)
            for number, part in enumerate(TIMED)
        },
        "first_step_s": first,
        "host_submit_ms": submission,
        "teacher_precision": step.module.teacher.precision_used,
        "kernel_ms": sum(spent for spent, _ in kernels.values()),
        "kernels": sum(calls for _, calls in kernels.values()),
        "kinds": by_kind(kernels),
        "memory_gb": memory,
        "audio_s_per_s": audio / middle * 1000,
        "gflop_per_audio_s": flops / audio / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "mfu": flops / (middle / 1000) / peak,
    }
    return result, kernels


def _submit_ms(step: _Step, row: Row) -> float:
    """Time the host's submission of a step to an idle device; median of the row's rounds.

    The step has little audio and as many kernels: the device's queue holds about a thousand, and a host that outruns
    the device waits for room in it.
    """
    whole, laps = step.batch, []
    step.batch = step.noise(min(2, row.batch_size), min(1.0, row.seconds), row.cached)
    for _ in range(row.rounds + 1):
        step.wait()
        start = time.perf_counter()
        step()
        laps.append((time.perf_counter() - start) * 1000)
    step.wait()
    step.batch = whole
    return median(laps[1:])  # the first one may compile


def profiled(step: _Step) -> dict[str, tuple[float, int]]:
    """Profile one step: milliseconds and calls by name, of kernels on a GPU, else of operators without nested calls."""
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        step.wait()
    kernels: dict[str, tuple[float, int]] = {}
    for event in recorded.events() or []:
        # Named ranges such as the optimizer's step contain kernels that are separate events.
        if event.is_user_annotation or (cuda and event.device_type != DeviceType.CUDA):
            continue
        own = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        spent, calls = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = (spent + own / 1000, calls + 1)
    return kernels


def by_kind(kernels: Mapping[str, tuple[float, int]]) -> dict[str, dict[str, float]]:
    """Sum milliseconds and calls of each kind, the longest first."""
    kinds: dict[str, dict[str, float]] = {}
    for name, (spent, calls) in kernels.items():
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
        sums = kinds.setdefault(kind, {"ms": 0.0, "calls": 0})
        sums["ms"] += spent
        sums["calls"] += calls
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))


def top(kernels: Mapping[str, tuple[float, int]]) -> str:
    """Format the longest kernels as lines of text."""
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    return "".join(f"{spent:10.3f} ms {calls:6d} x {name[:200]}\n" for name, (spent, calls) in longest)


def host_bound_below(row: Mapping[str, Any]) -> float | None:
    """Audio seconds per step above which the device takes longer than the host; ``None`` on a CPU, which is both.

    The host's time hardly depends on the size of a step, while the kernels' time grows with it.
    """
    if "CPU" in row["hardware"]:
        return None
    return float(row["batch_size"] * row["seconds"] * row["host_submit_ms"] / row["kernel_ms"])


def name_in_words(row: Mapping[str, Any]) -> str:
    """Describe the profiled step."""
    compiled = "compiled" if row["compile"] else "eager"
    size = f"{row['batch_size']} x {row['seconds']:g} s, {row['precision']}, depth {row['depth']}"
    cached = "" if row["cached"] == "none" else f", cached {row['cached']}"
    return f"{size}, {row['front_end']} front end{cached}, {compiled}"


def text(row: Mapping[str, Any]) -> str:
    """Describe a row of the file in words."""
    parts = ", ".join(f"{part.removesuffix('_ms')} {row[part]:.1f}" for part in TIMED)
    kinds = "\n".join(f"  {kind:<12}{sums['ms']:>10.2f} ms {sums['calls']:>6}" for kind, sums in row["kinds"].items())
    memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f} GB"
    lines = [
        f"{name_in_words(row)}: {row['step_ms']:.1f} ms a step ({parts}; quartiles "
        f"{row['spread_ms']:.1f} apart), the first one {row['first_step_s']:.1f} s",
        f"{row['audio_s_per_s']:.1f} audio seconds per second, {row['gflop_per_audio_s']:.1f} GFLOP per audio second, "
        f"{100 * row['mfu']:.1f} % of the matmul peak ({row['matmul_peak_gflops']:.0f} GFLOP/s), memory {memory}",
        f"{row['kernels']} kernels in {row['kernel_ms']:.1f} ms, given to the device in {row['host_submit_ms']:.1f} ms",
        kinds,
    ]
    if (bound := host_bound_below(row)) is not None:
        lines.append(f"the host is the bound below {bound:.0f} audio seconds per step")
    lines.append(f"{row['hardware']}; torch {row['torch']}, float32 {row['float32']}; commit {row['commit']}")
    return "\n".join(lines)
