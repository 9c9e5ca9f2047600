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
