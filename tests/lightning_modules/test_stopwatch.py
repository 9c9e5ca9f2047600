import time

import pytest
import torch

from lightning_modules.stopwatch import StepStopwatch, milliseconds, time_point

CPU = torch.device("cpu")


def test_sections_are_recorded_between_start_and_stop_only() -> None:
    stopwatch = StepStopwatch()
    with stopwatch.section("before"):
        pass
    stopwatch.start(CPU)
    with stopwatch.section("teacher"):
        time.sleep(0.01)
    with stopwatch.section("teacher"), stopwatch.section("inner"):
        pass
    sections = stopwatch.stop()
    with stopwatch.section("after"):
        pass
    assert [section.name for section in sections] == ["teacher", "inner", "teacher"]
    assert milliseconds(sections[0].start, sections[0].end) >= 10
    assert stopwatch.stop() == []


def test_a_new_step_drops_what_a_failed_one_left() -> None:
    stopwatch = StepStopwatch()
    stopwatch.start(CPU)
    with stopwatch.section("old"):
        pass
    stopwatch.start(CPU)
    with pytest.raises(RuntimeError), stopwatch.section("failed"):
        raise RuntimeError
    assert stopwatch.stop() == []


def test_points_on_the_host_are_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert milliseconds(1.0, 1.25) == 250
    monkeypatch.setattr(time, "perf_counter", lambda: 1.5)
    assert time_point(CPU) == 1.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_points_on_a_gpu_are_read_later() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stopwatch = StepStopwatch()
    stopwatch.start(device)
    matrix = torch.ones(4096, 4096, device=device)
    with stopwatch.section("teacher"):
        for _ in range(50):
            matrix = matrix @ matrix
    (section,) = stopwatch.stop()
    assert isinstance(section.end, torch.cuda.Event)
    section.end.synchronize()
    assert milliseconds(section.start, section.end) > 1
