"""``interstack bench``: parts add up to the step, growth arithmetic, one small measurement through the Trainer."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from experiments.bench import command
from experiments.bench.command import Setting, bench, growth_speedup
from experiments.bench.laps import PARTS
from experiments.bench.noise import BenchBatch
from experiments.cli import run
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_teacher


def test_growth_of_linear_times_is_what_f_predicts() -> None:
    linear = growth_speedup({3: 13.0, 6: 16.0, 9: 19.0, 12: 22.0})
    assert linear["f"] == pytest.approx(12 / 22)
    for schedule in ("equal", "prop-1"):
        assert linear[schedule]["predicted"] == pytest.approx(linear[schedule]["from_stages"])
    assert linear["equal"]["predicted"] == pytest.approx(22 / 17.5)
    bent = growth_speedup({3: 13.0, 6: 13.0, 9: 13.0, 12: 22.0})
    assert bent["equal"]["from_stages"] > bent["equal"]["predicted"] + 0.1
    assert growth_speedup({12: 5.0}) == {}


def test_all_cost_in_depth_gives_the_papers_bound() -> None:
    bound = growth_speedup({3: 3.0, 6: 6.0, 9: 9.0, 12: 12.0})
    assert bound["equal"]["predicted"] == pytest.approx(1.6)
    assert bound["prop-1"]["predicted"] == pytest.approx(4 / 3)


@pytest.mark.ci
def test_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "HuggingFaceTeacher", partial(HuggingFaceTeacher, compile_backend="aot_eager"))
    teacher, output = save_teacher(tmp_path / "teacher", layers=6), tmp_path / "bench.json"
    student = StudentConfig(16, 24, 2, front_end="frozen")
    more = ["--student", json.dumps(asdict(student)), "--teacher", str(teacher), "--output", str(output)]
    more += ["--batch_size", "2", "--seconds", "0.3", "--rounds", "1", "--accelerator", "cpu"]
    run(["bench", "--depths", "[6, 3]", *more, "--teacher_precision", "bf16", "--teacher_compile"])
    result = json.loads(output.read_text())
    assert [row["depth"] for row in result["depths"]] == [3, 6]
    for row in result["depths"]:
        assert row["steps"] == 1
        assert all(row[part] > 0 for part in PARTS)
        assert sum(row[part] for part in PARTS) == pytest.approx(row["step_ms"])  # exact for a single step
    shallow, deep = result["depths"]
    assert shallow["tflop"] < deep["tflop"]
    assert result["student"] == asdict(student) | {"num_layers": [3, 6]}
    assert (result["teacher"]["model"], result["teacher"]["compile"]) == (str(teacher), True)
    said = capsys.readouterr().out
    assert "share of a step that scales with depth" in said
    used = result["teacher"]["precision_used"]  # float32 where bf16 changes its targets too much
    assert f"precision {used} (set: bf16), compile True; student: front end frozen, compile False" in said


def test_the_peak_is_that_of_the_device_that_trained_and_every_round_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lap, asked, written = {"step_ms": 5.0, "width": 4800, **dict.fromkeys(PARTS, 1.0)}, [], []

    def peak(device: torch.device, precision: str) -> float:
        asked.append((device.type, precision))
        return 1e12 * len(asked)

    # As after a run on a GPU: the module is back on the CPU, the trainer's device is another.
    monkeypatch.setattr(command, "_fit", lambda module, setting, widths: ([lap], 0.1, torch.device("meta")))
    monkeypatch.setattr(command, "matmul_peak", peak)
    monkeypatch.setattr(command, "write_json", lambda path, value, indent: written.append(value))
    teacher = save_teacher(tmp_path / "teacher", layers=3)
    bench([3], 1, 0.3, 2, student=StudentConfig(16, 24, 2), teacher=str(teacher), output="bench.json")
    assert asked == [("meta", "32-true")] * 3
    assert [result["depths"][0]["steps"] for result in written] == [1, 2]
    assert [result["matmul_peak_gflops"] for result in written] == [2000, 3000]


@pytest.mark.ci
def test_a_step_from_a_cache_runs_neither_teacher_nor_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = save_teacher(tmp_path / "teacher", layers=6), StudentConfig(16, 24, 2, front_end="frozen")
    monkeypatch.setattr(HuggingFaceTeacher, "forward", None)
    more = ["--student", json.dumps(asdict(student)), "--teacher", str(teacher), "--accelerator", "cpu"]
    more += ["--depths", "[3, 6]", "--batch_size", "2", "--seconds", "0.3", "--rounds", "1"]
    results = {}
    for cached in ("targets", "features"):
        if cached == "features":
            monkeypatch.setattr(Student, "features", None)
        output = tmp_path / f"{cached}.json"
        run(["bench", *more, "--cached", cached, "--output", str(output)])
        results[cached] = json.loads(output.read_text())
        assert results[cached]["setting"]["cached"] == cached
        assert results[cached]["growth"].keys() == {"f", "equal", "prop-1"}  # their values are times
    flops = {cached: result["depths"][0]["tflop"] for cached, result in results.items()}
    assert flops["features"] < flops["targets"]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("depths", "intermediate"),
    [([3, 4], "none"), pytest.param([6, 8], "none", marks=pytest.mark.slow), ([3, 6], "l2l")],
)
def test_all_depths_have_one_objective(depths: list[int], intermediate: str, tmp_path: Path) -> None:
    teacher, output = save_teacher(tmp_path / "teacher", layers=6), tmp_path / "bench.json"
    student = StudentConfig(16, 24, 2)
    bench(depths, 1, 0.3, 1, "cpu", student=student, teacher=str(teacher), output=str(output))
    result = json.loads(output.read_text())
    assert [row["depth"] for row in result["depths"]] == depths
    assert result["intermediate_loss"] == intermediate


def test_lengths_stay_on_the_host_when_lightning_moves_a_batch() -> None:
    lengths_B = torch.tensor([4, 4])
    moved = move_data_to_device(BenchBatch(torch.zeros(2, 4), lengths_B, lengths_B), torch.device("meta"))
    assert [value.device.type for value in moved[:3]] == ["meta", "cpu", "cpu"]


@pytest.mark.ci
def test_lengths_like_librispeech_differ_between_steps_and_lie_on_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.bench.noise.MAX_SECONDS", 0.4)
    monkeypatch.setattr("experiments.bench.noise.like_librispeech", lambda: np.arange(3300, 4700, 7))
    teacher, rows = save_teacher(tmp_path / "teacher", layers=3), {}
    for grid in (1, 1600):
        output = tmp_path / f"{grid}.json"
        more = ["--teacher", str(teacher), "--student", json.dumps(asdict(StudentConfig(16, 24, 2)))]
        more += ["--lengths", "librispeech", "--length_grid", str(grid), "--output", str(output)]
        run(["bench", "--depths", "[3]", "--rounds", "2", "--steps", "4", "--accelerator", "cpu", *more])
        result = json.loads(output.read_text())
        setting = result["setting"]
        assert (setting["length_grid"], setting["steps"], setting["seconds"]) == (grid, 4, None)
        (rows[grid],) = result["depths"]
    assert (rows[1]["steps"], rows[1]["lengths"]) == (6, 6)
    assert rows[1600]["lengths"] == 1
    assert rows[1600]["tflop"] < rows[1]["tflop"]


def test_one_length_is_one_length() -> None:
    setting = Setting(2, 0.5, "32-true", "cpu", steps=3)
    assert setting.widths(1) == setting.widths(2) == [8000] * 3


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        bench([0])
    with pytest.raises(ValueError, match="steps=1 must be more than the 1 that"):
        bench(steps=1, accelerator="cpu")
    with pytest.raises(ValueError, match="needs lengths=librispeech"):
        bench(length_grid=1600)
