"""Commit, machine and settings that every benchmark's JSON records, and the check for continuing an earlier file."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.hardware import hardware
from datamodules.files import read_json
from experiments.records.runs import git_commit
from lightning_modules.precision import CudaSettings, cpu_features, float32_mode

log = logging.getLogger(__name__)


def made(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Collect commit, hardware, threads, versions and the mode of float32 products on ``device``, in plain values.

    ``cpu_features`` are the processor's vector and bf16 units, which decide what bf16 and convolutions cost on a CPU.
    """
    return {
        "commit": git_commit(),
        "hardware": hardware(device, processes),
        "cpu_features": list(cpu_features()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        # TF32 exists on CUDA devices only.
        "float32": float32_mode() if device.type == "cuda" else "ieee",
    }


def training_device(accelerator: str, processes: int = 1) -> torch.device:
    """Find the device of a Trainer in this process, and set CUDA as a run does, so that ``made`` agrees with it."""
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
    )
    CudaSettings().apply(trainer.strategy.root_device)
    return trainer.strategy.root_device


def earlier(path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the JSON of ``path`` if its settings equal ``settings``, else return None and log the first difference."""
    if path is None or not path.is_file():
        return None
    found: dict[str, Any] = read_json(path)
    wanted = json.loads(json.dumps(settings))
    for name, value in wanted.items():
        if found.get(name) != value:
            log.warning("%s begins anew: its %s was %s, is %s", path, name, found.get(name), value)
            return None
    return found
