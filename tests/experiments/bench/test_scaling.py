"""``interstack bench scaling``: one size varies at a time, and two processes are two processes."""

import json
from pathlib import Path

import pytest

from experiments.bench.scaling import Point, bench_scaling, measure, points
from tests.ddp.launch import environment
from tests.helpers import save_teacher


def test_one_size_varies_at_a_time() -> None:
    axes = {"processes": [1, 2], "seconds": [2.5], "depth": [3, 12], "batch_size": [8]}
    assert list(points(axes)) == [
        ("processes", Point(1, 5.0, 12, 4)),
        ("processes", Point(2, 5.0, 12, 4)),
        ("seconds", Point(1, 2.5, 12, 4)),
        ("depth", Point(1, 5.0, 3, 4)),
        ("depth", Point(1, 5.0, 12, 4)),
        ("batch_size", Point(1, 5.0, 12, 8)),
    ]


def test_two_processes_have_twice_the_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    teacher = save_teacher(tmp_path / "teacher", layers=3)
    common = ["--rounds", "1", "--accelerator", "cpu", "--teacher", str(teacher)]
    result = measure(Point(2, 0.3, 3, 1), common)
    assert result["audio_s_per_s"] == pytest.approx(2 * 0.3 / result["step_ms"] * 1000)


def test_a_failed_benchmark_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no-such-teacher"):
        measure(Point(1, 0.3, 3, 1), ["--accelerator", "cpu", "--teacher", str(tmp_path / "no-such-teacher")])


def test_a_table_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(point: Point, common: list[str]) -> dict[str, float]:
        return {"threads": 1, "step_ms": 100.0 * point.depth, "spread_ms": 1.0, "audio_s_per_s": 2.0}

    monkeypatch.setattr("experiments.bench.scaling.measure", measured)
    bench_scaling([1], [5.0], [3], [4], output=str(tmp_path / "scaling.json"))
    assert "| depth | 1 | 4 x 5 | 3 | 300 |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scaling.json").read_text())["points"]) == 4
