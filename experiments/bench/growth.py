"""Measure seconds and memory of a growth, in one process or several, by default at the paper's size.

::

    interstack bench growth --output one.json
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m experiments.cli bench growth --output two.json

Student and teacher have random weights and the audio is noise: the cost depends on neither. Every stage makes real
optimizer steps, so that gradients, optimizer state and DDP's buckets exist at each growth. This works on Linux only,
because memory is read from ``/proc``.
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from callbacks.stacking import StackingCallback
from datamodules.files import write_json
from datamodules.speech_data import SpeechDataModule
from experiments.bench.made import made
from experiments.bench.memory import resident_megabytes, start_memory_peak
from experiments.bench.noise import BenchBatch
from experiments.bench.random_teacher import save_random_teacher
from experiments.training.on_cpu import prepare_cpu
from lightning_modules.distillation import DistillationModule
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher


@dataclass
class GrowthCost:
    """Cost of one growth on one rank. Memory is resident, in MB; ``peak`` is its maximum during the growth."""

    depth_before: int
    depth: int
    parameters: int
    seconds: float
    megabytes_before: float
    megabytes_after: float
    megabytes_peak: float


class MeasuredStacking(StackingCallback):
    """The usual growth, with the memory measured before, during and after it."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy, measure_loss=False)
        self.costs: list[GrowthCost] = []

    def _grow(self, trainer: L.Trainer, module: DistillationModule, target: int) -> None:
        before = start_memory_peak() or 0.0
        super()._grow(trainer, module, target)
        event = self.events[-1]
        after, peak = resident_megabytes("VmRSS"), resident_megabytes("VmHWM")
        values = (event.depth_before, target, event.parameters, event.seconds)
        self.costs.append(GrowthCost(*values, before, after, peak))


class Noise(SpeechDataModule):
    """The same utterance of noise for every step and rank."""

    def __init__(self, steps_per_epoch: int, seconds: float) -> None:
        super().__init__()
        self._steps_per_epoch = steps_per_epoch
        samples = int(16_000 * seconds)
        lengths, generator = torch.tensor([samples]), torch.Generator().manual_seed(0)
        waveforms_BT = torch.randn(1, samples, generator=generator)
        self.batch = BenchBatch(waveforms_BT, lengths, lengths)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def train_dataloader(self) -> DataLoader[BenchBatch]:
        batches: Any = [self.batch] * self.steps_per_epoch
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[BenchBatch]:
        return self.train_dataloader()  # not used, but Lightning warns without one


def make_trainer(folder: str, processes: int, stacking: MeasuredStacking, accelerator: str) -> L.Trainer:
    """Build a Trainer with one epoch for each of the paper's four stages."""
    return L.Trainer(
        default_root_dir=folder,
        callbacks=[stacking],
        max_epochs=4,
        accelerator=accelerator,
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def bench_growth(
    output: str,
    policy: str = "interleaved",
    student_size: tuple[int, int] = (12, 384),
    teacher_size: tuple[int, int] = (12, 768),
    steps_per_stage: int = 2,
    seconds: float = 2.0,
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu",
) -> None:
    """Measure every growth of a short run and write rank 0's numbers to a JSON file.

    Args:
        output: JSON file to write.
        policy: growth policy that reaches full depth in four stages of three layers.
        student_size: layers and width of the student.
        teacher_size: layers and width of the teacher.
        steps_per_stage: optimizer steps before each growth.
        seconds: length of the one utterance of noise per step and process.
        accelerator: cpu, gpu or auto; memory is the process's host memory, on a GPU too.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layers, width = student_size
    stacking = MeasuredStacking(policy)
    torch.manual_seed(0)  # the same weights on every rank
    with tempfile.TemporaryDirectory() as folder:
        student = StudentConfig(width, 4 * width, num_heads=8, num_layers=layers)
        teacher = save_random_teacher(Path(folder) / "teacher", *teacher_size)
        module = DistillationModule(HuggingFaceTeacher(str(teacher)), student)
        trainer = make_trainer(folder, processes, stacking, accelerator)
        prepare_cpu(trainer)
        trainer.fit(module, datamodule=Noise(steps_per_stage, seconds))
    if int(os.environ.get("RANK", "0")) != 0:
        return
    result = {
        **made(trainer.strategy.root_device, processes),
        "policy": policy,
        "student": list(student_size),
        "teacher": list(teacher_size),
        "processes": processes,
        "steps_per_stage": steps_per_stage,
        "seconds": seconds,
        "growths": [asdict(cost) for cost in stacking.costs],
    }
    write_json(output, result)
