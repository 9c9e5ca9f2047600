"""StepStopwatch: measures the time of named parts of a training step, without waiting for the device.

A module wraps a part in ``with self.stopwatch.section("teacher"):``. A caller that needs the times calls ``start``
before the step and ``stop`` after it. Between the two a section records two time points, at all other times nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Host clock in seconds, or a CUDA event, which marks a place in the stream of work and can be read once the work before
# it is done.
TimePoint = float | torch.cuda.Event


class Section(NamedTuple):
    """One named part of a step."""

    name: str
    start: TimePoint
    end: TimePoint


def time_point(device: torch.device) -> TimePoint:
    """The present time in the order of the work on ``device``: work submitted later is later. Devices without CUDA
    events use the host's clock, which is exact where work is done when it is submitted, as on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait until all work that was submitted to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(start: TimePoint, end: TimePoint) -> float:
    """Time from ``start`` to ``end``, two points of the same device; the work before ``end`` must be done."""
    if isinstance(start, float):
        assert isinstance(end, float)
        return (end - start) * 1000
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)


class StepStopwatch:
    """Records the sections of one step at a time, between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._sections: list[Section] = []

    def start(self, device: torch.device) -> None:
        """Start recording; sections of an unfinished step are dropped."""
        self._device, self._sections = device, []

    def stop(self) -> list[Section]:
        """Stop recording and return the sections since ``start`` in the order in which they ended."""
        sections, self._device, self._sections = self._sections, None, []
        return sections

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the block under ``name``; does nothing outside ``start`` and ``stop``."""
        if self._device is None:
            yield
            return
        device, start = self._device, time_point(self._device)
        yield
        self._sections.append(Section(name, start, time_point(device)))
