"""The benchmark of kernels measures the same computation in several ways."""

import json
from pathlib import Path

import pytest
import torch

from experiments.bench.kernels import bench_kernels, error, make_candidates

POSITIONS = ["plain", "windows", "transforms"]
NAMES = ["plain", "channels last", *POSITIONS, *POSITIONS]


def test_every_way_computes_the_same() -> None:
    candidates = make_candidates(1, 0.5, torch.device("cpu"))
    assert [candidate.name for candidate in candidates] == NAMES
    assert max(error(candidate, candidates, "32") for candidate in candidates) < 1e-5
    assert error(candidates[0], candidates, "32") == 0
    assert error(candidates[1], candidates, "bf16") > 1e-4  # the error that is printed is of the precision asked for
    candidates[1].inputs = candidates[1].inputs * 1.1  # control: another input
    with torch.no_grad():
        candidates[1].module.conv_layers[2].conv.weight *= 1.1
    assert error(candidates[1], candidates, "32") > 1e-3


def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_kernels(1, 0.2, rounds=2, accelerator="cpu", output=str(tmp_path / "kernels.json"))
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["name"] for row in result["rows"]] == NAMES
    assert all(row["forward_ratio"] == row["both_ratio"] == 1 for row in result["rows"] if row["name"] == "plain")
    assert len(result["rows"][1]["turns"]) == 2
    assert "| front end | channels last |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rounds=0"):
        bench_kernels(rounds=0)
