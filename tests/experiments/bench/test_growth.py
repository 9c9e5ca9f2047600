"""The cost of a growth on tiny sizes, alone and in two processes."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench.growth import bench_growth
from experiments.bench.memory import resident_megabytes, start_memory_peak
from tests.ddp.launch import REPOSITORY, environment
from tests.patience import PATIENCE

TINY = ["--student_size", "[12, 16]", "--teacher_size", "[3, 16]", "--steps_per_stage", "1", "--seconds", "0.2"]


def check(path: Path, processes: int) -> None:
    result = json.loads(path.read_text())
    assert result["processes"] == processes
    assert (result["steps_per_stage"], result["seconds"]) == (1, 0.2)
    assert result["threads"] > 0
    assert "CPU" in result["hardware"]
    assert "commit" in result
    growths = result["growths"]
    assert [(g["depth_before"], g["depth"]) for g in growths] == [(3, 6), (6, 9), (9, 12)]
    added = {later["parameters"] - earlier["parameters"] for earlier, later in itertools.pairwise(growths)}
    assert added == {3 * (12 * 16**2 + 13 * 16)}  # three layers of width 16 with their biases and norms
    for growth in growths:
        assert growth["seconds"] > 0
        assert growth["megabytes_peak"] > growth["megabytes_after"] - 1 > 0


@pytest.mark.ci
def test_every_growth_of_one_process_is_measured(tmp_path: Path) -> None:
    bench_growth(
        str(tmp_path / "one.json"), student_size=(12, 16), teacher_size=(3, 16), steps_per_stage=1, seconds=0.2
    )
    check(tmp_path / "one.json", processes=1)


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "experiments.cli", "bench", "growth", "--output", str(tmp_path / "two.json"), *TINY]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    check(tmp_path / "two.json", processes=2)


def test_memory_that_is_touched_is_resident() -> None:
    before = resident_megabytes("VmRSS")
    kept = torch.ones(100_000_000)
    # Linux may take pages from the process that have not been used for a while, here 25 MB.
    assert resident_megabytes("VmRSS") - before == pytest.approx(kept.nbytes / 1e6, abs=100)


def test_a_system_that_does_not_tell_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: "Name:\tpython\nVmRSS:\t  1000 kB\n")
    assert resident_megabytes("VmRSS") == 1.024
    assert math.isnan(resident_megabytes("VmHWM"))


def test_a_peak_is_that_since_it_was_started() -> None:
    torch.ones(50_000_000).add_(1)  # a peak of before
    before = start_memory_peak()
    assert before is not None
    assert resident_megabytes("VmHWM") - before < 20
    freed = torch.ones(100_000_000)
    size = freed.nbytes / 1e6
    del freed
    assert resident_megabytes("VmHWM") - before == pytest.approx(size, abs=100)


def test_what_was_freed_before_does_not_hide_what_is_taken_next() -> None:
    def take() -> list[torch.Tensor]:
        return [torch.ones(10_000) for _ in range(10_000)]  # small enough to come from the heap

    last = take()[-1]  # in use above the others, so that the C library keeps their memory
    before = start_memory_peak()
    assert before is not None
    taken = take()
    size = sum(block.nbytes for block in [*taken, last]) / 1e6
    assert resident_megabytes("VmHWM") - before == pytest.approx(size, abs=100)
