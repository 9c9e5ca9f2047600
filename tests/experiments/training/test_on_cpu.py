"""What a process on a CPU sets at its start: the C library's memory, and a warning of slow bf16."""

import ctypes
import logging
import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.training.on_cpu import MALLOPT, keep_freed_memory, prepare_cpu
from lightning_modules import precision
from tests.patience import PATIENCE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Calls of a stand-in of glibc's ``mallopt``, which accepts all; the user has set nothing."""
    made: list[tuple[int, int]] = []

    def mallopt(number: int, value: int) -> int:
        made.append((number, value))
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    return made


def test_glibc_is_set_by_values_that_fit_an_int(calls: list[tuple[int, int]]) -> None:
    assert keep_freed_memory()
    assert calls == list(MALLOPT.values())
    assert all(ctypes.c_int(value).value == value for _, value in calls)


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TOP_PAD_", "1"), ("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=1")]
)
def test_what_the_user_has_set_stays(
    name: str, value: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert calls == []


@pytest.mark.parametrize("libc", [("", ""), ("musl", "1.2")])
def test_another_c_library_is_left_alone(
    libc: tuple[str, str], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert not keep_freed_memory()
    assert calls == []


def test_what_is_refused_is_said(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda number, value: int(number != -2)))
    assert not keep_freed_memory()
    assert "the C library refuses M_TOP_PAD, so" in caplog.text


def trainer(device: str, asked: str) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), precision=asked)


def test_only_a_process_on_a_cpu_is_set(calls: list[tuple[int, int]]) -> None:
    prepare_cpu(trainer("cuda", "bf16-mixed"))
    assert calls == []
    prepare_cpu(trainer("cpu", "32-true"))
    assert calls != []


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "32-true"])
def test_bf16_is_warned_of(
    asked: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: ("avx2",))
    precision.warn_if_bf16_is_slow.__wrapped__.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        prepare_cpu(trainer("cpu", asked))
    warned = [
        f"trainer.precision={asked}" in message and "set trainer.precision=32-true" in message
        for message in caplog.messages
    ]
    assert warned == [True] * asked.startswith("bf16")


FAULTS = """
import resource, sys

if sys.argv[1] == "keep":
    from experiments.training.on_cpu import keep_freed_memory
    assert keep_freed_memory()
heap = bytearray(16 * 2**20)  # the heap grows for a buffer of at most 32 MB only
del heap
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = bytearray(200 * 2**20)
    for place in range(0, len(buffer), 4096):
        buffer[place] = 1
    del buffer
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.ci
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_second_buffer_of_a_size_faults_no_page_in() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], env=clean, timeout=PATIENCE, text=True))
        for how in ("keep", "plain")
    ]
    assert found[0] < 32 < 100 <= found[1]  # 200 MB are 51,200 pages, or 100 huge ones; the control is a plain process
