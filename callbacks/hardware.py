"""Description of the hardware in one line, for summaries and reports."""

import os
import platform

import torch


def hardware(device: torch.device, world_size: int = 1) -> str:
    """Describe the hardware of a run: ``world_size`` GPUs like ``device``, or the CPU with its threads.

    The CPU is described by the widest vector instructions that PyTorch uses, on which its speed depends most.
    """
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({vectors}), {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def machine() -> str:
    """Describe the machine: all visible GPUs, or the CPU."""
    gpus = torch.cuda.device_count()
    return hardware(torch.device("cuda" if gpus else "cpu"), gpus)
