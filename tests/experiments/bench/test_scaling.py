"""``interstack bench scaling``: one size varies at a time, and two processes are two processes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from datamodules.errors import InputError
from experiments.bench import scaling
from experiments.bench.scaling import Point, bench_scaling, default_processes, measure, points
from lightning_modules.student_config import StudentConfig
from tests.ddp.launch import environment
from tests.helpers import save_teacher


def test_one_size_varies_at_a_time() -> None:
    axes = {"processes": [1, 2], "seconds": [2.5], "depth": [3, 12], "batch_size": [8]}
    assert list(points(axes, Point())) == [
        ("processes", Point(1, 5.0, 12, 4)),
        ("processes", Point(2, 5.0, 12, 4)),
        ("seconds", Point(1, 2.5, 12, 4)),
        ("depth", Point(1, 5.0, 3, 4)),
        ("depth", Point(1, 5.0, 12, 4)),
        ("batch_size", Point(1, 5.0, 12, 8)),
    ]


@pytest.mark.slow
def test_two_processes_have_twice_the_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    teacher = save_teacher(tmp_path / "teacher", layers=3)
    common = ["--rounds", "1", "--accelerator", "cpu", "--teacher", str(teacher)]
    common += ["--student", json.dumps(asdict(StudentConfig(16, 24, 2, front_end="shared")))]
    common += ["--teacher_precision", "bf16", "--teacher_compile", "false"]
    result = measure(Point(2, 0.3, 3, 1), common)
    assert result["audio_s_per_s"] == pytest.approx(2 * 0.3 / result["step_ms"] * 1000)
    assert (result["student"]["front_end"], result["student"]["num_layers"]) == ("shared", [3])
    assert (result["teacher"]["precision"], result["teacher"]["compile"]) == ("bf16", False)


@pytest.mark.slow  # 8 s, most of them to start a process
def test_a_failed_benchmark_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no-such-teacher"):
        measure(Point(1, 0.3, 3, 1), ["--accelerator", "cpu", "--teacher", str(tmp_path / "no-such-teacher")])


def test_a_table_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(point: Point, common: list[str]) -> dict[str, Any]:
        options = dict(zip(common[::2], common[1::2], strict=True))
        student = json.loads(options["--student"])
        teacher = {"model": "one", "precision": options["--teacher_precision"], "precision_used": "32"}
        teacher["compile"] = options["--teacher_compile"]
        made = {"hardware": "one CPU", "threads": 1, "student": student, "teacher": teacher, "intermediate_loss": "l2l"}
        return {**made, "step_ms": 100.0 * point.depth, "spread_ms": 1.0, "audio_s_per_s": 2.0}

    monkeypatch.setattr("experiments.bench.scaling.measure", measured)
    student = StudentConfig(front_end="frozen")
    bench_scaling(*([1], [5.0], [3], [4]), student=student, teacher_compile=True, output=str(tmp_path / "scaling.json"))
    said = capsys.readouterr().out
    assert "| depth | 1 | 4 x 5 | 3 | 300 |" in said
    assert said.count("one CPU; teacher: one, precision 32 (set: auto), compile true; student: front end frozen") == 1
    assert len(json.loads((tmp_path / "scaling.json").read_text())["points"]) == 4


def test_a_point_that_fails_loses_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked, broken = tmp_path / "scaling.json", [], [True]
    teacher = {"model": "one", "precision": "auto", "precision_used": "32", "compile": False}
    made = {"hardware": "one CPU", "student": asdict(StudentConfig()), "teacher": teacher, "intermediate_loss": "l2l"}

    def measured(point: Point, common: list[str]) -> dict[str, Any]:
        asked.append(point)
        if point.batch_size == 8 and broken[0]:
            raise InputError("out of memory")
        return {**made, "step_ms": 1.0, "spread_ms": 1.0, "audio_s_per_s": 2.0}

    monkeypatch.setattr("experiments.bench.scaling.measure", measured)
    sizes = ([1], [5.0], [12], [8, 2])
    with pytest.raises(InputError, match="1 of 3 points failed"):
        bench_scaling(*sizes, output=str(path))
    points_then = json.loads(path.read_text())["points"]
    assert [point.get("error") for point in points_then] == [None, None, None, "out of memory", None]
    assert "out of memory" in capsys.readouterr().out
    asked.clear()
    broken[0] = False
    bench_scaling(*sizes, output=str(path))
    assert asked == [Point(batch_size=8)]
    assert all("error" not in point for point in json.loads(path.read_text())["points"])
    bench_scaling(*sizes, rounds=2, output=str(path))  # other settings: nothing is kept
    assert len(asked) == 4


@pytest.mark.parametrize(("gpus", "tried"), [(0, [1, 2]), (1, [1]), (4, [1, 2])])
def test_two_processes_need_two_gpus(gpus: int, tried: list[int]) -> None:
    assert default_processes(gpus) == tried


@pytest.mark.parametrize(("accelerator", "usual"), [("cpu", Point()), ("gpu", Point(seconds=15.0, batch_size=16))])
def test_a_gpu_has_larger_steps(
    accelerator: Literal["cpu", "gpu"], usual: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Point] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(scaling, "measure_or_error", lambda point, common: asked.append(point) or {"error": "none"})
    with pytest.raises(InputError, match="points failed"):
        bench_scaling(depths=[12], accelerator=accelerator)
    assert usual in asked
    assert {point.processes for point in asked} == ({1} if accelerator == "gpu" else {1, 2})
