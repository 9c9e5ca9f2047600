"""The teacher's check of bf16, what compilation makes anew, and what a new length costs."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters

from experiments.bench.noise import BenchBatch
from experiments.bench.random_teacher import save_random_teacher
from lightning_modules import precision
from lightning_modules.distillation import DistillationModule
from lightning_modules.precision import CudaSettings
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.gpu.fits import Place
from tests.lightning_modules.graphs import TORCH_WARNINGS


def test_the_teachers_check_of_bf16_passes_and_falls_back(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def used() -> str:
        teacher = HuggingFaceTeacher(str(place.folder / "teacher"), precision="bf16")
        teacher.select_layers([2, 4])
        teacher.prepare(torch.device(place.device))
        return teacher.precision_used

    assert used() == "bf16"
    monkeypatch.setattr(precision, "BF16_TOLERANCE", 0.0)
    assert used() == "32"
    assert "bf16 has relative errors" in caplog.text


class GraphsByEpoch(Callback):
    """How many graphs there are after each epoch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings(*[mark.args[0] for mark in TORCH_WARNINGS])
def test_a_growth_adds_no_graph(place: Place) -> None:
    torch.compiler.reset()
    counters.clear()
    graphs = GraphsByEpoch()
    backend = "inductor" if place.device == "cuda" else "aot_eager"
    settings = {"compile": True, "compile_backend": backend}
    teacher = {"precision": "32", **settings}
    run = place.fit("graphs", [graphs], module={**settings, "teacher_settings": teacher})
    assert run.module.student.depth == 4
    assert graphs.counts[0] > 0
    assert len(set(graphs.counts)) == 1  # neither the growths nor the loss that is measured at them
    waveforms_BT = torch.randn(2, 8000, device=place.device)
    run.module.to(place.device).eval()
    run.module.student(waveforms_BT, torch.tensor([8000, 5000]))  # a kind of input that the fit did not have
    assert counters["stats"]["unique_graphs"] > graphs.counts[-1]


@pytest.fixture
def wide(cuda: torch.device, tmp_path: Path) -> Iterator[DistillationModule]:
    """The paper's widths, four layers each."""
    teacher = HuggingFaceTeacher(str(save_random_teacher(tmp_path / "wide", layers=4)), precision="bf16")
    objective = {"layers": [2], "intermediate": "prediction"}
    module = DistillationModule(teacher, StudentConfig(num_layers=4), objective, total_steps=1).to(cuda).train()
    teacher.prepare(cuda)
    yield module
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_new_length_costs_less_than_twice_a_seen_one(wide: DistillationModule) -> None:
    on_grid = _cost_of_a_new_length(wide, CudaSettings(attention="flash"), first=160_000, grid=1600)
    off_grid = _cost_of_a_new_length(wide, CudaSettings(attention="cudnn"), first=100_003, grid=337)
    assert on_grid < 2
    if torch.cuda.get_device_capability() >= (9, 0):  # older ones do not prefer cuDNN's attention
        assert off_grid > on_grid


def _cost_of_a_new_length(module: DistillationModule, settings: CudaSettings, first: int, grid: int) -> float:
    """Host time of a step at a length not seen before, as a multiple of one that was; medians."""
    settings.apply(module.device)
    # Longest first: a longer step than any before would wait for the allocator as well.
    lengths = [first + grid * number for number in reversed(range(8))]
    for _ in range(3):
        _timed_step(module, lengths[0])
    new = median([_timed_step(module, length) for length in lengths[1:]])
    seen = median([_timed_step(module, length) for length in lengths[1:]])
    return new / seen


def _timed_step(module: DistillationModule, samples: int) -> float:
    lengths_B = torch.full((8,), samples)
    batch = BenchBatch(torch.randn(8, samples, device=module.device), lengths_B, lengths_B)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = module.losses(batch).total
    loss.backward()
    module.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - started
