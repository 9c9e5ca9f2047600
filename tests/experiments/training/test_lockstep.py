"""Whose turn it is, and what is made once."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from experiments.training.lockstep import Lockstep, Once, Shared, Stopped, Turns
from tests.patience import PATIENCE


def run_all(lockstep: Lockstep, bodies: dict[str, Callable[[], None]]) -> None:
    def run(name: str) -> None:
        try:
            lockstep.begin(name)
            bodies[name]()
        except Stopped:
            pass
        finally:
            lockstep.leave(name)

    threads = [threading.Thread(target=run, args=[name], daemon=True) for name in bodies]
    for thread in reversed(threads):  # the order in which they come up does not matter
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
        assert not thread.is_alive()


def test_one_at_a_time_and_the_one_behind_first() -> None:
    lockstep, order = Lockstep(["a", "b", "c"]), []

    def body(name: str, places: list[int]) -> Callable[[], None]:
        def run() -> None:
            order.append((name, "begins"))
            for place in places:
                lockstep.reach(name, (0, place, 0))
                order.append((name, place))

        return run

    # c resumes later in the epoch than the others and ends before them.
    run_all(lockstep, {"a": body("a", [0, 1, 2, 3]), "b": body("b", [0, 1, 2, 3]), "c": body("c", [2])})
    beginnings = [("a", "begins"), ("b", "begins"), ("c", "begins")]
    assert order == [
        *beginnings,
        *[("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("c", 2), ("a", 3), ("b", 3)],
    ]


def test_a_run_that_fails_leaves_the_others_their_turns() -> None:
    lockstep, reached = Lockstep(["a", "b"]), []

    def fails() -> None:
        lockstep.reach("a", (0, 0, 0))
        raise Stopped

    def goes_on() -> None:
        for place in range(3):
            lockstep.reach("b", (0, place, 0))
            reached.append(place)

    run_all(lockstep, {"a": fails, "b": goes_on})
    assert reached == [0, 1, 2]


def test_stop_ends_those_who_wait() -> None:
    lockstep, after = Lockstep(["a", "b"]), []

    def stops() -> None:
        lockstep.reach("a", (0, 0, 0))
        lockstep.stop()
        lockstep.reach("a", (0, 1, 0))
        after.append("a")

    def waits() -> None:
        lockstep.reach("b", (0, 0, 0))
        after.append("b")

    run_all(lockstep, {"a": stops, "b": waits})
    assert after == []


def test_what_is_shared_is_made_once_per_place() -> None:
    once: Once[list[int]] = Once()
    first, spared = once.get((0, 0, 0), lambda: [1])
    again, spared_again = once.get((0, 0, 0), lambda: [2])
    assert again is first
    assert spared == 0
    assert spared_again == once.total_seconds > 0
    assert once.get((0, 1, 0), lambda: [3])[0] == [3]

    def broken() -> list[int]:
        raise ValueError

    with pytest.raises(ValueError):
        once.get((0, 2, 0), broken)
    assert once.get((0, 2, 0), lambda: [4])[0] == [4]  # the next one tries for itself


def test_the_old_value_is_gone_before_the_next_is_made() -> None:
    class Targets:
        pass

    once: Once[Targets] = Once()
    first = weakref.ref(once.get((0, 0, 0), Targets)[0])
    assert first() is not None

    def make() -> Targets:
        assert first() is None
        return Targets()

    once.get((0, 1, 0), make)


def test_runs_that_lie_apart_load_alone_until_they_meet() -> None:
    lockstep, shared, loads = Lockstep(["a", "b"]), Shared(), []
    seen: dict[str, list[object]] = {"a": [], "b": []}

    def load(name: str) -> Callable[[int], Iterator[str]]:
        def source(start: int) -> Iterator[str]:
            loads.append((name, start))
            return (f"batch {number}" for number in range(start, 5))

        return source

    def body(name: str, start: int) -> Callable[[], None]:
        turns = Turns(name, lockstep, shared, nullcontext, lambda seconds: None)

        def run() -> None:
            seen[name] = list(turns.relay("train")(0, start, load(name)))  # type: ignore[arg-type]

        return run

    run_all(lockstep, {"a": body("a", 3), "b": body("b", 1)})
    assert seen == {"a": [f"batch {n}" for n in (3, 4)], "b": [f"batch {n}" for n in (1, 2, 3, 4)]}
    assert loads == [("b", 1)]
