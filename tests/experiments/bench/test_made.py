"""How a benchmark was made is in its result, and decides whether an earlier result is gone on with."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import made as module
from experiments.bench.made import earlier, made, training_device
from experiments.records import runs
from lightning_modules.precision import CudaSettings, cpu_features
from tests.conftest import NEEDS_CLONE


def test_a_cpu_is_described() -> None:
    result = made(training_device("cpu"))
    assert result["torch"] == torch.__version__
    assert (result["cudnn"], result["float32"]) == (None, "ieee")
    assert "CPU" in result["hardware"]
    assert result["cpu_features"] == list(cpu_features())


def test_a_file_is_gone_on_with_on_a_processor_of_the_same_features_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, device = tmp_path / "result.json", torch.device("cpu")
    monkeypatch.setattr(module, "cpu_features", lambda: ("avx2", "avx512_bf16"))
    path.write_text(json.dumps({**made(device), "rows": [1]}))
    assert earlier(path, made(device)) is not None
    monkeypatch.setattr(module, "cpu_features", lambda: ("avx2",))
    assert earlier(path, made(device)) is None
    assert "its cpu_features was ['avx2', 'avx512_bf16'], is ['avx2']" in caplog.text


def test_a_gpu_is_set_as_a_run_sets_it_before_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[torch.device] = []
    monkeypatch.setattr(CudaSettings, "apply", lambda self, device: applied.append(device))
    monkeypatch.setattr(module, "float32_mode", lambda: "tf32")
    monkeypatch.setattr(module, "hardware", lambda device, processes: "1 x GPU")
    assert [training_device("cpu")] == applied
    assert made(torch.device("cuda"))["float32"] == "tf32"


def test_an_earlier_file_is_taken_where_all_settings_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "result.json"
    assert earlier(None, {}) is None
    assert earlier(path, {}) is None
    path.write_text(json.dumps({"commit": "a", "sizes": [1, 2], "rows": [3]}))
    assert earlier(path, {"commit": "a", "sizes": (1, 2)}) == {"commit": "a", "sizes": [1, 2], "rows": [3]}
    with caplog.at_level(logging.WARNING):
        assert earlier(path, {"commit": "b", "sizes": (1, 2)}) is None
    assert "begins anew: its commit was a, is b" in caplog.text


@NEEDS_CLONE
def test_a_copy_outside_a_clone_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERSTACK_COMMIT", "told")
    assert runs.git_commit() != "told"  # this is a clone, which knows better

    def fails(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fails)
    assert runs.git_commit() == "told"
    monkeypatch.delenv("INTERSTACK_COMMIT")
    assert runs.git_commit() is None
