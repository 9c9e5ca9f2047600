"""``interstack bench``: time the parts of a training step at several depths of the student.

Every number comes from ``Trainer.fit`` on the ``DistillationModule``. The depths take turns, so that a slow minute
of the machine affects all of them. The weights are random, because time does not depend on them.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from callbacks.ddp import leave_inputs
from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import write_json
from experiments.bench.laps import PARTS, StepLaps
from experiments.bench.made import made, training_device
from experiments.bench.memory import resident_megabytes, start_memory_peak
from experiments.bench.noise import Cached, cropped_widths, noise
from experiments.bench.random_teacher import save_random_teacher
from experiments.records.accounting import step_cost
from experiments.training.on_cpu import prepare_cpu
from lightning_modules.distillation import DistillationModule
from lightning_modules.growth.schedules import mean_depth, stage_lengths
from lightning_modules.kernels import Kernels
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.precision import CudaSettings
from lightning_modules.stopwatch import synchronize
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher

SCHEDULES = ("equal", "prop-1")
# Steps per turn, and the number of first steps that are not counted. A GPU gets more of both: its clock and its work
# queue take longer to settle, and its steps are short.
TURN = {"cuda": (12, 3)}
OTHER_TURN = (2, 1)


@dataclass
class Setting:
    """Settings of a measurement besides the depth; part of the result."""

    batch_size: int
    seconds: float
    precision: str
    accelerator: str
    processes: int = 1
    steps: int = OTHER_TURN[0]
    lengths: str = "one"
    length_grid: int = 1
    cached: Cached = "none"

    def widths(self, turn: int) -> list[int]:
        """Samples per utterance of each step of a turn."""
        if self.lengths == "one":
            return [round(self.seconds * SAMPLE_RATE)] * self.steps
        return cropped_widths(self.batch_size, self.steps, turn, self.length_grid)


def bench(
    depths: list[int] | None = None,
    batch_size: int = 4,
    seconds: float = 5.0,
    rounds: int = 5,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    student: StudentConfig | None = None,
    teacher: str | None = None,
    teacher_precision: Literal["auto", "32", "bf16"] = "auto",
    teacher_compile: bool = False,
    teacher_kernels: Kernels = "auto",
    cuda: CudaSettings = CudaSettings(),  # noqa: B008 (frozen)
    steps: int | None = None,
    lengths: Literal["one", "librispeech"] = "one",
    length_grid: int = 1,
    cached: Cached = "none",
    output: str | None = None,
) -> None:
    """Time the training step at several depths; print a table and write JSON.

    Under torch.distributed.run every process has its own batch.

    Args:
        depths: depths of the student; default: 3, 6, 9 and 12. If one is not a multiple of 3, all depths run without
            L2L's intermediate loss.
        batch_size: utterances per step and process.
        seconds: length of each utterance, if all have one length.
        rounds: counted turns of every depth, after one that is not counted.
        accelerator: cpu, gpu or auto.
        precision: precision of the trainer; MFU refers to the matmul peak in this precision, whatever the teacher's is.
        student: sizes and switches (front_end, compile, ...) of the student; default: the paper's.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        teacher_precision: as model.teacher.init_args.precision; auto is bf16 on a GPU that has it, 32 elsewhere.
        teacher_compile: compile the teacher too.
        teacher_kernels: as model.teacher.init_args.kernels; the student's are student.kernels.
        cuda: settings of computation on a GPU, as model.cuda.
        steps: steps per turn; default: 12 on a GPU, of which the first 3 are not counted, elsewhere 2, of which the
            first is not. Median and spread are over the counted steps of all rounds.
        lengths: one gives every utterance the same seconds; librispeech draws lengths like those of its training parts,
            at most 15.6 s, batched and cropped as the data module does it. Rates are then all audio by all time.
        length_grid: grid in samples; with lengths librispeech the length of a batch is rounded down to a multiple, as
            data.length_grid does it.
        cached: what every batch has as if from a cache, in bf16: none, targets (no teacher runs), or features (no
            convolution either; needs student.front_end frozen or shared). Reading a cache is not part of the step:
            interstack bench data measures it.
        output: JSON file to write after every round, so that an interrupted benchmark keeps its finished rounds.
    """
    depths = sorted(depths or [3, 6, 9, 12])
    if depths[0] < 1 or rounds < 1 or batch_size < 1 or seconds <= 0:
        raise InputError(
            f"depths={depths}, rounds={rounds}, batch_size={batch_size} and seconds={seconds} must be positive"
        )
    if length_grid < 1 or (length_grid > 1 and lengths == "one"):
        raise InputError(f"length_grid={length_grid} must be positive, and needs lengths=librispeech where it is not 1")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    usual, warm_up = TURN.get(training_device(accelerator, processes).type, OTHER_TURN)
    if steps is not None and steps <= warm_up:
        raise InputError(f"steps={steps} must be more than the {warm_up} that are not counted")
    used = processes, steps or usual, lengths, length_grid, cached
    setting = Setting(batch_size, seconds, precision, accelerator, *used)
    first_rank = int(os.environ.get("RANK", "0")) == 0
    teacher_args = {"model": teacher, "precision": teacher_precision, "compile": teacher_compile}
    teacher_args["kernels"] = teacher_kernels
    for result in measure(depths, setting, rounds, student or StudentConfig(), teacher_args, cuda):
        if first_rank and output is not None:
            write_json(output, result, indent=2)
    if first_rank:
        print(table(result))


def measure(
    depths: list[int],
    setting: Setting,
    rounds: int,
    student: StudentConfig,
    teacher: dict[str, Any],
    cuda: CudaSettings = CudaSettings(),  # noqa: B008 (frozen)
) -> Iterator[dict[str, Any]]:
    """Yield everything that ``bench`` reports, in plain values, after each counted round.

    ``teacher`` holds arguments of ``HuggingFaceTeacher``; without a ``model`` it gets random weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = teacher["model"] or str(save_random_teacher(Path(folder)))
        encoder = HuggingFaceTeacher(**(teacher | {"model": model}))
    objective = objective_for(depths)
    modules = {
        depth: DistillationModule(encoder, replace(student, num_layers=depth), objective, total_steps=1000, cuda=cuda)
        for depth in depths
    }
    steps: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
    memory: dict[int, float | None] = {}
    peak = 0.0
    for turn in range(rounds + 1):
        for depth in depths:
            laps, memory[depth], device = _fit(modules[depth], setting, setting.widths(turn))
            if turn:  # the first turn compiles, allocates and chooses kernels
                steps[depth] += laps
        peak = max(peak, matmul_peak(device, setting.precision))
        if not turn:
            continue
        rows = [_row(modules[depth], steps[depth], peak, memory[depth], setting) for depth in depths]
        yield {
            **made(device, setting.processes),
            "setting": vars(setting) | ({} if setting.lengths == "one" else {"seconds": None}),
            "cuda": vars(cuda),
            "student": {**vars(student), "num_layers": depths},
            "teacher": {
                **encoder.spec()["init_args"],
                "model": teacher["model"] or "random weights, HuBERT Base",
                "precision_used": encoder.precision_used,
            },
            "intermediate_loss": objective.intermediate,
            "matmul_peak_gflops": peak / 1e9,
            "depths": rows,
            "growth": growth_speedup({row["depth"]: row["step_ms"] for row in rows}),
        }


def objective_for(depths: list[int]) -> ObjectiveConfig:
    """Choose L2L if all depths are multiples of 3: others have no layer at a third and at two thirds.

    All depths have one objective, because they share the teacher and its targets.
    """
    return ObjectiveConfig(intermediate="l2l" if all(depth % 3 == 0 for depth in depths) else "none")


def growth_speedup(step_ms: dict[int, float]) -> dict[str, Any]:
    """Compute f, the share of the deepest step that scales with depth, and the speed-up that growth gives.

    ``predicted`` is 1 / (1 - f (1 - mean depth / full depth)) with f from the first and the last depth alone;
    ``from_stages`` weighs the measured time of each depth. They differ where time is not linear in depth.
    """
    stages = sorted(step_ms)
    if len(stages) < 2:
        return {}
    first, full = stages[0], stages[-1]
    share = (step_ms[full] - step_ms[first]) / (full - first) * full / step_ms[full]
    speedups: dict[str, Any] = {"f": share}
    for schedule in SCHEDULES:
        lengths = stage_lengths(schedule, len(stages), 1000)
        grown = sum(step_ms[depth] * length for depth, length in zip(stages, lengths, strict=True)) / sum(lengths)
        speedups[schedule] = {
            "predicted": 1 / (1 - share * (1 - mean_depth(stages, lengths) / full)),
            "from_stages": step_ms[full] / grown,
        }
    return speedups


def matmul_peak(device: torch.device, precision: str) -> float:
    """Measure FLOP per second of the best of ten large matrix products in the precision of training."""
    size, dtype = (8192 if device.type == "cuda" else 1024), torch.bfloat16 if "bf16" in precision else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def table(result: dict[str, Any]) -> str:
    """Format the result as lines of text."""
    names = ["depth", "step_ms", "spread_ms", *PARTS, "audio_s_per_s", "mfu", "memory_gb"]
    lines = ["  ".join(f"{name:>13}" for name in names)]
    for row in result["depths"]:
        lines.append("  ".join(f"{_text(row[name]):>13}" for name in names))
    growth = result["growth"]
    if growth:
        lines.append(f"share of a step that scales with depth: f = {growth['f']:.3f}")
        for schedule in SCHEDULES:
            speedup = growth[schedule]
            lines.append(
                f"{schedule}: {speedup['predicted']:.3f}x predicted by f, {speedup['from_stages']:.3f}x from the stages"
            )
    lines.append(
        f"{result['hardware']}; {result['threads']} threads; {result['setting']}; {switches(result)}; "
        f"commit {result['commit']}; matmul peak {result['matmul_peak_gflops']:.0f} GFLOP/s"
    )
    return "\n".join(lines)


def switches(result: dict[str, Any]) -> str:
    """Describe teacher, student and objective in words."""
    teacher, student = result["teacher"], result["student"]
    return (
        f"teacher: {teacher['model']}, precision {teacher['precision_used']} (set: {teacher['precision']}), "
        f"compile {teacher['compile']}; student: front end {student['front_end']}, compile {student['compile']}; "
        f"intermediate loss: {result['intermediate_loss']}"
    )


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _fit(
    module: DistillationModule, setting: Setting, widths: list[int]
) -> tuple[list[dict[str, float]], float | None, torch.device]:
    """Run a few steps; return the counted laps with their ``width``, the peak memory in GB and the device.

    Memory is a GPU's, or the growth of the process (Linux). The device comes from the trainer, because Lightning moves
    the module to the CPU when ``fit`` ends.
    """
    laps = StepLaps()
    trainer = L.Trainer(
        accelerator=setting.accelerator,
        devices=setting.processes,
        strategy="ddp" if setting.processes > 1 else "auto",
        precision=setting.precision,  # type: ignore[arg-type]
        max_epochs=1,
        gradient_clip_val=5.0,
        limit_val_batches=0,
        callbacks=[laps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    prepare_cpu(trainer)
    leave_inputs(trainer)  # as in a run
    device = trainer.strategy.root_device
    batches: Any = noise(setting.batch_size, widths, device.type == "cuda", module, setting.cached)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        before = start_memory_peak()
    loader = DataLoader(batches, batch_size=None, num_workers=0)
    trainer.fit(module, loader, loader)  # validation is off, but Lightning warns without validation data
    _, warm_up = TURN.get(device.type, OTHER_TURN)
    steps = [lap | {"width": width} for lap, width in zip(laps.steps, widths[1:], strict=True)][warm_up - 1 :]
    if device.type == "cuda":
        return steps, torch.cuda.max_memory_allocated(device) / 1e9, device
    return steps, None if before is None else (resident_megabytes("VmHWM") - before) / 1000, device


def step_flops(module: DistillationModule, num_samples: int, cached: Cached = "none") -> float:
    """Compute the FLOP of the matrix products and convolutions of one utterance's step."""
    teacher: Any = module.teacher
    sizes = teacher.model.config, module.student.config, module.objective.config, num_samples
    return step_cost(*sizes, cached=cached != "none", features=cached == "features").at(module.student.depth)


def _row(
    module: DistillationModule,
    steps: list[dict[str, float]],
    peak: float,
    memory_gb: float | None,
    setting: Setting,
) -> dict[str, Any]:
    times, widths = [step["step_ms"] for step in steps], [int(step["width"]) for step in steps]
    middle = median(times)
    low, high = np.percentile(times, [25, 75])
    # Steps of one length differ by noise only, which the median leaves out; steps of several lengths must differ.
    seconds = (middle * len(times) if setting.lengths == "one" else sum(times)) / 1000
    flops = setting.batch_size * sum(step_flops(module, width, setting.cached) for width in widths)
    return {
        "depth": module.student.depth,
        "steps": len(steps),
        "lengths": len(set(widths)),
        "step_ms": middle,
        "spread_ms": float(high - low),
        **{part: median(step[part] for step in steps) for part in PARTS},
        "audio_s_per_s": setting.processes * setting.batch_size * sum(widths) / SAMPLE_RATE / seconds,
        "tflop": flops / len(steps) / 1e12,
        "mfu": flops / seconds / peak,
        "memory_gb": memory_gb,
    }
