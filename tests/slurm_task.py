"""The environment of one task under ``srun``, without SLURM, for tests that run in this process."""

import os
from pathlib import Path

import pytest

from callbacks import requeue


def pretend_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set SLURM's variables, and put a ``scontrol`` on the path that adds what it is asked for to the file returned."""
    variables = {"JOB_ID": 123, "JOB_NAME": "train", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    script, record = folder / "bin" / "scontrol", folder / "requests"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {record}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "_announced", [])
    monkeypatch.setattr(requeue, "_before", [])
    return record
