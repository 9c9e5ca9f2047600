"""Loaders for the device of the run, not for those of the machine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.placement import trains_on_cuda, workers_for


def trainer_on(device: str, num_devices: int = 1) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), num_devices=num_devices)


def test_batches_are_pinned_where_the_run_is_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a CPU run on a machine with a GPU
    assert [trains_on_cuda(trainer) for trainer in (None, trainer_on("cpu"), trainer_on("cuda"))] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("cores", "devices", "expected"), [(2, 1, 2), (6, 1, 5), (64, 1, 8), (32, 8, 3), (8, 8, 2)])
def test_workers_follow_the_cores_on_a_gpu(
    cores: int, devices: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert workers_for(None, trainer_on("cuda", devices)) == expected
    assert workers_for(None, trainer_on("cpu", devices)) == workers_for(None, None) == 2
    assert workers_for(0, trainer_on("cuda", devices)) == 0


@pytest.mark.parametrize(
    ("task", "bound", "expected"), [("123", 8, 7), ("123", 32, 7), (None, 8, 2)], ids=["bound", "free", "no SLURM"]
)
def test_a_task_that_slurm_binds_to_its_cores_has_them_for_itself(
    task: str | None, bound: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tasks on a node of 32 cores; without SLURM the 8 cores of a container are for all four."""
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(bound)))
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if task is not None:
        monkeypatch.setenv("SLURM_NTASKS", task)
    assert workers_for(None, trainer_on("cuda", 4)) == expected
