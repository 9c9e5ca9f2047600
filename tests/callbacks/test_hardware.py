"""The hardware that a summary names."""

import os
import platform

import pytest
import torch

from callbacks.hardware import hardware, machine


def test_hardware_is_what_computed_and_not_what_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()} CPU ({vectors}), {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert machine() == cpu
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"some GPU (asked for {device})")
    assert hardware(torch.device("cpu"), 2) == cpu
    assert hardware(torch.device("cuda", 1), 2) == "2 x some GPU (asked for cuda:1)"
    assert machine() == "4 x some GPU (asked for cuda)"
