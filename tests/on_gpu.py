"""A plugin of pytest: runs that ask for one process on a CPU train on the GPU.

::

    python -m pytest -p tests.on_gpu --device cuda tests/callbacks/test_guards.py

Only trainers that name ``accelerator="cpu"`` are moved. A test that compares with a number of the CPU may then fail and
be right.
"""

import functools
import os
from typing import Any

import lightning as L
import pytest
import torch

# torch wants it for products that are the same every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script.*:DeprecationWarning")  # in torch's compiler
    if torch.cuda.is_available():
        L.Trainer.__init__ = moved(L.Trainer.__init__)  # type: ignore[method-assign]


def moved(original: Any) -> Any:
    """A Trainer's constructor that takes one GPU where one process on a CPU is asked for."""

    @functools.wraps(original)
    def init(self: L.Trainer, *args: Any, **settings: Any) -> None:
        if settings.get("accelerator") == "cpu" and settings.get("devices", 1) in (1, "auto"):
            settings["accelerator"] = "gpu"
            settings.setdefault("deterministic", True)
        original(self, *args, **settings)

    return init
