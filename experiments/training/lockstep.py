"""Runs that take turns in one process: one at a time, batch by batch, the one that is furthest behind first.

Each run has its own thread, but only the run whose turn it is works; the others wait for their next batch. The runs
therefore compute the same as one after another, and the global state of a process (random numbers, gradient mode)
belongs to one of them at a time. Runs at the same place share the batch and the targets made there.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from typing import Generic, TypeVar, cast

from datamodules.loading import AudioBatch, Load, Relay
from lightning_modules.teacher import TeacherTargets

Value = TypeVar("Value")

Place = tuple[int, int, int]
"""Epoch, micro-batch, and 0, or 1 + the number of a validation batch after that micro-batch. Later is greater."""


class Stopped(Exception):
    """Raised in every run that waits for its turn, to end it."""


class Lockstep:
    """Decides whose turn it is.

    Args:
        names: names of the runs; runs at the same place take their turns in this order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._places: dict[str, Place | tuple[()]] = dict.fromkeys(names, ())  # less than any place
        self._turn: str | None = names[0]
        self._changed = threading.Condition()
        self._stopped = False

    def begin(self, name: str) -> None:
        """Wait for the first turn."""
        with self._changed:
            self._wait(name)

    def reach(self, name: str, place: Place) -> None:
        """Give up the turn until no other run is behind ``place``.

        Raises:
            Stopped: see :meth:`stop`.
        """
        with self._changed:
            self._places[name] = place
            self._pass_on()
            self._wait(name)

    def leave(self, name: str) -> None:
        """Take no more turns."""
        with self._changed:
            self._places.pop(name, None)
            self._pass_on()

    def stop(self) -> None:
        """End every run when it next waits for its turn, or at once if it waits already."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _pass_on(self) -> None:
        self._turn = min(self._places, key=self._places.__getitem__, default=None)
        self._changed.notify_all()

    def _wait(self, name: str) -> None:
        self._changed.wait_for(lambda: self._stopped or self._turn == name)
        if self._stopped:
            raise Stopped(f"{name} was stopped")


class Once(Generic[Value]):
    """A value that the first run at a place computes and the others there receive.

    Attributes:
        total_seconds: seconds spent computing, over all places.
    """

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._seconds = 0.0
        self._place: Place | None = None
        self._value: Value | None = None

    def get(self, place: Place, make: Callable[[], Value]) -> tuple[Value, float]:
        """Return the value and the seconds that sharing it saved this run: 0 for the run that computes it."""
        if place == self._place:
            return cast(Value, self._value), self._seconds
        started = time.perf_counter()
        self._place = self._value = None  # free the old value first: two batches of targets take too much memory
        value = make()
        self._place, self._value, self._seconds = place, value, time.perf_counter() - started
        self.total_seconds += self._seconds
        return value, 0.0


class Shared:
    """Micro-batches and targets of runs with equal data and an equal teacher, each computed once.

    A run that resumes behind the others loads data and runs the teacher alone until it has caught up.
    """

    def __init__(self) -> None:
        self.batches: Once[AudioBatch | None] = Once()
        self.targets: Once[TeacherTargets] = Once()
        self._sources: dict[str, tuple[tuple[int, int], Iterator[AudioBatch]]] = {}

    @property
    def seconds(self) -> float:
        """Seconds that loading and the teacher took so far, validation included."""
        return self.batches.total_seconds + self.targets.total_seconds

    def next_batch(self, part: str, wanted: tuple[int, int], load: Load) -> AudioBatch | None:
        """Load micro-batch (epoch, number) of ``part`` from the loader open at that place, else from a new one."""
        at, source = self._sources.pop(part, (None, None))
        if source is None or at != wanted:
            source = load(wanted[1])
        batch = next(source, None)
        self._sources[part] = (wanted[0], wanted[1] + 1), source
        return batch

    def close(self) -> None:
        """Drop the open loaders, which ends their workers."""
        self._sources.clear()


class Turns:
    """Connect one run's loaders and teacher to the shared batches and targets.

    Args:
        name: name of the run.
        lockstep: the lockstep of all runs.
        shared: batches and targets shared by all runs.
        aside: makes a context for the time in which it is another run's turn.
        charge: called with the seconds that sharing has saved this run.
    """

    def __init__(
        self,
        name: str,
        lockstep: Lockstep,
        shared: Shared,
        aside: Callable[[], AbstractContextManager[None]],
        charge: Callable[[float], None],
    ) -> None:
        self.name, self.lockstep, self.shared, self.aside, self.charge = name, lockstep, shared, aside, charge
        self.place: Place = (-1, -1, 0)

    def relay(self, part: str) -> Relay:
        """Make the relay for the loader of the ``train`` or the ``val`` data."""

        def batches(epoch: int, start: int, load: Load) -> Iterator[AudioBatch]:
            for number in count(start):
                self._reach((epoch, number, 0) if part == "train" else (*self.place[:2], 1 + number))
                make = partial(self.shared.next_batch, part, (epoch, number), load)
                batch = self._once(self.shared.batches, make)
                if batch is None:
                    return
                yield batch

        return batches

    def targets(self, ask: Callable[[], TeacherTargets]) -> TeacherTargets:
        """Return the targets of this run's current micro-batch."""
        return self._once(self.shared.targets, ask)

    def _reach(self, place: Place) -> None:
        with self.aside():
            self.lockstep.reach(self.name, place)
        self.place = place

    def _once(self, shared: Once[Value], make: Callable[[], Value]) -> Value:
        value, spared = shared.get(self.place, make)
        self.charge(spared)
        return value
