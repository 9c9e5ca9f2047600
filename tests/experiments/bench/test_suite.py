"""``interstack bench suite``: parts end by themselves or by their limit, and what is done is not done again."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import InputError
from experiments.bench import suite
from experiments.bench.suite import Part, bench_suite, choose, last_lines, run_part, suite_parts
from experiments.bench.suite_table import table
from experiments.cli import COMMANDS, run

FOREVER = float("inf")


def names(accelerator: str = "gpu", tiny: bool = False) -> list[str]:
    return [part.name for part in suite_parts(accelerator, Path("in/corpus"), Path("in/teacher") if tiny else None)]


@pytest.mark.parametrize(("accelerator", "tiny"), [("gpu", False), ("cpu", False), ("gpu", True), ("cpu", True)])
def test_the_parts_are_commands_that_resolve(accelerator: str, tiny: bool, capsys: pytest.CaptureFixture[str]) -> None:
    parts = suite_parts(accelerator, Path("in/corpus"), Path("in/teacher") if tiny else None)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert part.kind == "" or f"bench {part.kind}" in COMMANDS
        with pytest.raises(SystemExit) as stop:
            run([*part.words, "--output", part.output, "--print_config"])
        assert stop.value.code in (0, None), capsys.readouterr().err


def test_a_cpu_compiles_nothing_and_a_gpu_does() -> None:
    def compiles(accelerator: str) -> bool:
        parts = suite_parts(accelerator, Path("in/corpus"), None)
        return any(
            "--compile" in part.words and part.words[part.words.index("--compile") + 1] == "true" for part in parts
        )

    assert (compiles("gpu"), compiles("cpu")) == (True, False)


def part_of(*words: str, limit: float = 60) -> Part:
    return Part("one", words, "one.json", limit)


def test_a_part_that_fails_leaves_its_log(tmp_path: Path) -> None:
    assert run_part(part_of("no-such-command"), tmp_path, FOREVER)["status"] == "failed"
    log = tmp_path / "logs" / "one.log"
    assert "unknown command 'no-such-command'" in log.read_text()
    assert "unknown command 'no-such-command'" in last_lines(log)
    log.write_text("".join(f"{number} {'x' * 400}\n" for number in range(9)))
    assert [line.split()[0] for line in last_lines(log).splitlines()] == ["6", "7", "8"]
    assert max(map(len, last_lines(log).splitlines())) == 300


@pytest.mark.ci
def test_a_command_before_a_part_runs_first_and_its_failure_is_the_parts(tmp_path: Path) -> None:
    good, bad = ("synthesize", "--help"), ("no-such-command",)
    for before, words, status in ((good, bad, "failed"), (bad, good, "failed")):
        part = Part("one", words, "one.json", 60, before)
        assert run_part(part, tmp_path, FOREVER)["status"] == status
        log = (tmp_path / "logs" / "one.log").read_text()
        assert "unknown command 'no-such-command'" in log
        assert ("usage" in log) == (before == good), "what comes after a failure is not run"


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/bash\nexec sleep 1000\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(tmp_path / "python"))
    assert run_part(part_of("x", limit=0.3), tmp_path, FOREVER)["status"] == "out of time"
    assert run_part(part_of("x"), tmp_path, time.monotonic() + 0.3)["status"] == "out of time"
    assert run_part(part_of("x"), tmp_path, time.monotonic() - 1) == {"status": "not reached", "seconds": 0.0}


def test_a_suite_that_is_asked_to_end_ends_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text(
        f"#!/bin/bash\necho $$ > {tmp_path}/pid\nsleep 1\nkill -TERM $PPID\nexec sleep 1000\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(tmp_path / "python"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_suite(str(tmp_path / "out"), accelerator="cpu", tiny=True, only=["growth"])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []

    def one_part(part: Part, folder: Path, end: float) -> dict[str, Any]:
        ran.append(part.name)
        broken = part.name == "data" and ran.count("data") == 1
        return {"status": "failed" if broken else "done", "seconds": 1.0}

    monkeypatch.setattr(suite, "run_part", one_part)
    monkeypatch.setattr(suite, "write_noise", lambda *args: None)
    monkeypatch.setattr(suite, "save_random_teacher", lambda *args, **sizes: None)
    with pytest.raises(InputError, match="not finished: data; see"):
        bench_suite(str(tmp_path), accelerator="cpu", tiny=True)
    assert ran == names("cpu", tiny=True)
    assert "| data | failed | 1 |" in (tmp_path / "table.md").read_text()
    ran.clear()
    ran.append("data")  # its first time is over
    bench_suite(str(tmp_path), accelerator="cpu", tiny=True)
    assert ran == ["data", "data"]
    ran.clear()
    monkeypatch.setattr("experiments.bench.made.git_commit", lambda: "other")
    bench_suite(str(tmp_path), accelerator="cpu", tiny=True, only=["growth"])
    assert ran == ["growth"]
    assert "begins anew: its commit was" in caplog.text


def test_the_table_reads_every_file(tmp_path: Path) -> None:
    made = {"commit": "abc", "hardware": "1 x GPU", "torch": "2", "cudnn": 9, "float32": "ieee"}
    numbers = {"step_ms": 100.0, "audio_s_per_s": 2400.0, "mfu": 0.25, "memory_gb": 12.5}
    profile = {"batch_size": 16, "seconds": 15.0, "depth": 12, "front_end": "trained", "compile": False}
    profile |= {"cached": "features", "kernels": 9}
    profile |= {"precision": "bf16-mixed", "host_submit_ms": 50.0, "kernel_ms": 100.0, "kinds": {"conv": {"ms": 60.0}}}
    setting = {"batch_size": 32, "seconds": None, "lengths": "librispeech", "length_grid": 1600, "precision": "32-true"}
    against = {"median": 2.0}
    grown = {
        "step_ms": 50.0,
        "ratios": {"full": against},
        "growth": {"equal": {"predicted": 1.2}},
        "against_full": {"equal": against},
    }
    point = {"axis": "depth", "processes": 1, "batch_size": 4, "seconds": 5.0, "depth": 3}
    files: dict[str, Any] = {
        "profile": [made | profile | numbers, made | profile | numbers | {"commit": "old"}],
        "lengths": {"setting": setting, "depths": [{"depth": 12, "lengths": 9, **numbers}], "growth": {}},
        "compare": {"batch_size": 2, "seconds": 5.0, "variants": {"grown": grown}},
        "data": {"variants": [{"variant": "files, 4 workers", "audio_s_per_s": 7200.0, "audio_s_per_cpu_s": 1800.0}]},
        "growth": {"growths": [{"depth_before": 3, "depth": 6, "seconds": 0.25}]},
        "scaling": {"points": [point | numbers, point | {"error": "out of memory"}]},
    }
    parts = {}
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        parts[name] = {"status": "done", "seconds": 9.0, "output": f"{name}.json"}
    text = table(tmp_path, {**made, "parts": parts})
    for line in (
        "| profile | 16 x 15 s, bf16-mixed, depth 12, trained front end, cached features, eager | 100 | "
        "2,400 | 25 | 12.5 | 9 kernels; ms: conv 60.0; host-bound below 120 audio s |",
        "| lengths | 32 x librispeech, grid 1600, 32-true, depth 12 | 100 | 2,400 | 25 | 12.5 | 9 lengths |",
        "| compare | grown | 50 | 200 | - | - | 2.00 x full; growth predicted 1.20, measured 2.00 |",
        "| data | files, 4 workers | - | 7,200 | - | - | 1800 per core second |",
        "| growth | 3 to 6 layers | - | - | - | - | 0.250 s |",
        "| scaling | 1 process, 4 x 5 s, depth 3 | - | - | - | - | failed |",
    ):
        assert line in text
    assert text.count("| profile | 16") == 1  # that of another commit is left out


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget=0"):
        bench_suite(str(tmp_path), budget=0)
    with pytest.raises(ValueError, match="unknown part 'x': choose from one"):
        choose([part_of()], ["x"])


@pytest.mark.slow
def test_the_whole_suite_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(["bench", "suite", "--output", str(tmp_path), "--accelerator", "cpu", "--tiny"])
    state = json.loads((tmp_path / "suite.json").read_text())
    assert {name: part["status"] for name, part in state["parts"].items()} == dict.fromkeys(names("cpu", True), "done")
    rows = (tmp_path / "table.md").read_text()
    assert all(f"| {part['output'].removesuffix('.json')} |" in rows for part in state["parts"].values())
