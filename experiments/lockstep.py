"""Runs that take turns in one process: one at a time, batch by batch, the one that is behind first.

Each run has a thread of its own, but only the one whose turn it is does anything: the others wait where they asked
for their next batch. So the runs do what they would do one after the other, and what is global to a process (random
numbers, gradient mode) belongs to one of them at a time. Those that stand at the same place share what is made there.
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
"""Epoch, micro-batch, and 0; or 1 + the number of a validation batch that comes after it. Later is greater."""


class Stopped(Exception):
    """All runs are to end where they wait."""


class Lockstep:
    """Whose turn it is.

    Args:
        names: of the runs, in the order in which those at the same place take their turns.
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
        """Let every run end when it next waits for its turn, or at once where it waits."""
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
    """What the first run at a place makes and the others there get.

    Attributes:
        total_seconds: that making took, all places together.
    """

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._seconds = 0.0
        self._place: Place | None = None
        self._value: Value | None = None

    def get(self, place: Place, make: Callable[[], Value]) -> tuple[Value, float]:
        """The value, and the seconds that it spared the one who asks: 0 for the one who makes it."""
        if place == self._place:
            return cast(Value, self._value), self._seconds
        started = time.perf_counter()
        self._place = self._value = None  # before the next is made: two batches of targets at a time are one too many
        value = make()
        self._place, self._value, self._seconds = place, value, time.perf_counter() - started
        self.total_seconds += self._seconds
        return value, 0.0


class Shared:
    """Micro-batches and targets of runs with equal data and an equal teacher, each made once.

    A run that resumes behind the others loads and asks the teacher alone until it has caught up.
    """

    def __init__(self) -> None:
        self.batches: Once[AudioBatch | None] = Once()
        self.targets: Once[TeacherTargets] = Once()
        self._sources: dict[str, tuple[tuple[int, int], Iterator[AudioBatch]]] = {}

    @property
    def seconds(self) -> float:
        """That loading and the teacher took so far, validation included."""
        return self.batches.total_seconds + self.targets.total_seconds

    def next_batch(self, part: str, wanted: tuple[int, int], load: Load) -> AudioBatch | None:
        """Micro-batch (epoch, number) of ``part``: from the loader that is open at that place, else from a new one."""
        at, source = self._sources.pop(part, (None, None))
        if source is None or at != wanted:
            source = load(wanted[1])
        batch = next(source, None)
        self._sources[part] = (wanted[0], wanted[1] + 1), source
        return batch

    def close(self) -> None:
        """Let go of the open loaders, and so of their workers."""
        self._sources.clear()


class Turns:
    """One run's part: it stands between the run's loaders and its teacher and what is shared.

    Args:
        name: of the run.
        lockstep: of all runs.
        shared: by all runs.
        aside: makes a context for the time in which it is another run's turn.
        charge: takes the seconds that something shared has spared this run.
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
        """For the loader of the ``train`` or of the ``val`` data."""

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
        """Of the micro-batch at which this run stands."""
        return self._once(self.shared.targets, ask)

    def _reach(self, place: Place) -> None:
        with self.aside():
            self.lockstep.reach(self.name, place)
        self.place = place

    def _once(self, shared: Once[Value], make: Callable[[], Value]) -> Value:
        value, spared = shared.get(self.place, make)
        self.charge(spared)
        return value
