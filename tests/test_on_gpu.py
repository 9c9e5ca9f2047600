"""The plugin that moves runs to a GPU moves those of one process on a CPU, and no others."""

from typing import Any

import pytest

from tests.on_gpu import moved


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({"accelerator": "cpu"}, {"accelerator": "gpu", "deterministic": True}),
        ({"accelerator": "cpu", "devices": 1, "deterministic": False}, {"accelerator": "gpu", "deterministic": False}),
        ({"accelerator": "cpu", "devices": 2}, {"accelerator": "cpu"}),
        ({"accelerator": "auto"}, {"accelerator": "auto"}),
    ],
)
def test_runs_of_one_process_on_a_cpu_are_moved(asked: dict[str, Any], got: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}
    moved(lambda self, **settings: seen.update(settings))(None, **asked)  # type: ignore[arg-type]
    assert {name: seen.get(name) for name in got} == got
    assert "deterministic" in seen or got["accelerator"] != "gpu"
