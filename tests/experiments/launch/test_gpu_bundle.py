"""The bundle for an offline GPU machine: wheels of the tested versions, and commands that are accepted there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import COMMANDS, run
from experiments.launch.gpu_bundle import MISSING, REPOSITORY, gpu_bundle, in_words, pinned, pip_command
from experiments.launch.gpu_commands import FIT, KEEP, MOST_CHARACTERS, MOST_SECONDS, Command, commands
from tests.conftest import NEEDS_CLONE
from tests.patience import PATIENCE

EACH = pytest.mark.parametrize("command", commands(), ids=lambda command: command.title[:20])


@EACH
def test_a_command_is_short_and_parses(command: Command) -> None:
    assert len(command.text) < MOST_CHARACTERS
    assert command.limit <= MOST_SECONDS
    subprocess.run(["bash", "-n", "-c", command.text], check=True)


STAND_INS = {
    "python3": 'echo "$*" >> calls; mkdir -p gpu_results/suite; echo a > gpu_results/suite/a; exit "$STATUS"',
    "nvidia-smi": "echo a GPU",
    "hostname": "echo localhost",
    "sleep": "exec /bin/sleep 0.1",
}


@EACH
@pytest.mark.parametrize("status", [0, 1])
def test_the_shell_brings_results_back_and_ends(command: Command, status: int, tmp_path: Path) -> None:
    """With stand-ins for the programs; a part that fails costs the others nothing, but the first step is a gate."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in (".bundle/wheels", "site/interstack/site", "back"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".bundle" / "commit").write_text("abc\n")
    places = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "site"), "OUT": "back"}
    settings = {"cwd": tmp_path, "env": os.environ | places | {"STATUS": str(status)}, "timeout": PATIENCE}
    done = subprocess.run(["bash", "-c", command.text], capture_output=True, text=True, **settings)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "syntax" not in done.stderr
    if status and "|| exit 1; [" in command.body:
        assert len(calls) == 1
        return
    started = command.body.count("python3 -m") + command.body.count("python3 -c")
    repeated = 2 if "torch.distributed.run" in command.body else 0  # over NCCL twice, over gloo in two processes
    assert len(calls) == started + repeated
    brought = {path.name for path in (tmp_path / "back").iterdir()}
    assert "part" not in brought
    if " bench suite " in command.body:
        assert "suite.tgz" in brought
    if "pytest" in command.body:
        assert any(name.startswith("tests_") for name in brought)


@pytest.mark.parametrize("warm", [False, True])
def test_a_fresh_machine_goes_on_from_the_results_in_the_bundle(warm: bool, tmp_path: Path) -> None:
    for name in (".bundle", "suite", "gpu_results", *(["gpu_results/suite"] if warm else [])):
        (tmp_path / name).mkdir()
    (tmp_path / "suite" / "a").touch()
    subprocess.run(["tar", "czf", ".bundle/suite.tgz", "suite"], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", KEEP + "kill $K"], cwd=tmp_path, env=os.environ | {"OUT": "."}, check=True)
    assert (tmp_path / "gpu_results" / "suite" / "a").exists() is not warm


def test_control_a_command_that_does_not_parse_is_seen() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["bash", "-n", "-c", commands()[0].text + "; do"], check=True, capture_output=True)


def inner_limits(command: Command) -> list[int]:
    """Seconds of each ``timeout``; ``$L`` is the limit that the command has unless told otherwise."""
    (most,) = re.findall(r'L="\$\{L:-(\d+)\}"', command.text)
    found = re.findall(r"(?<!-)timeout (?:-s INT )?(?:-k 15 )?(\d+|\$L) ", command.body)
    return [int(most if seconds == "$L" else seconds) for seconds in found]


@EACH
def test_what_takes_long_has_a_limit_below_that_of_the_command(command: Command) -> None:
    assert inner_limits(command)
    assert all(seconds < command.limit for seconds in inner_limits(command))
    assert len(re.findall("(?<!-)timeout ", command.body)) == len(inner_limits(command))


@EACH
def test_the_parts_of_a_command_fit_into_its_limit_together(command: Command) -> None:
    budgets = [eval(text, {"L": 560}) for text in re.findall(r"--budget \$\(\((.*?)\)\)", command.body)]
    others = [int(seconds) for seconds in re.findall(r"(?<!-)timeout (?:-s INT )?(?:-k 15 )?(\d+) ", command.body)]
    if budgets:
        assert sum(budgets) + sum(others) < command.limit


@EACH
def test_paths_of_the_repository_exist(command: Command) -> None:
    paths = re.findall(r"(?<![\w/.])(?:tests|experiments)/[\w/.]+", command.body)
    assert all((REPOSITORY / path).exists() for path in paths)
    modules = [name for name in re.findall(r"(?:-m|-p|from) ((?:experiments|tests)\.[\w.]+)", command.body)]
    assert all((REPOSITORY / f"{name.replace('.', '/')}.py").is_file() for name in modules)


def interstack_calls(command: Command) -> list[list[str]]:
    """Arguments of each call of the program, without what the shell does with its output."""
    found = re.findall(r"-m experiments\.cli (.*?)(?= 2>&1| > | \|\| |;|$)", command.body)
    values = {"$F": FIT, "$M": "--trainer.max_time 00:00:00:03", "$D": "gpu_results/ddp"}
    calls = [re.sub(r"\$\(\(.*?\)\)", "200", call) for call in found]
    for name, value in values.items():
        calls = [call.replace(name, value) for call in calls]
    return [shlex.split(call) for call in calls]


@pytest.mark.parametrize("arguments", [call for command in commands() for call in interstack_calls(command)])
def test_calls_of_the_program_resolve(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {arguments[0], " ".join(arguments[:2])} & set(COMMANDS)
    if arguments[0] == "reproduce":
        run([*arguments, "--dry-run"])
        assert "what is left to do" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        run([*arguments, "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_there_are_calls_to_resolve() -> None:
    kinds = {call[0] for command in commands() for call in interstack_calls(command)}
    assert kinds == {"bench", "fit", "reproduce"}


def test_versions_are_those_of_the_constraints() -> None:
    assert pinned(["Typeshed.Client"], "a==1\ntypeshed_client==2.14.0\n") == ["typeshed_client==2.14.0"]
    with pytest.raises(ValueError, match="no version of unheard-of"):
        pinned(["unheard-of"], "a==1\n")
    assert len(pinned(list(MISSING), (REPOSITORY / "constraints.txt").read_text())) == len(MISSING)


def test_wheels_are_for_the_other_machine() -> None:
    words = pip_command(Path("wheels"), "3.13", ["a==1"])
    assert {"--no-deps", "--only-binary=:all:", "cp313", "abi3", "none", "manylinux_2_28_x86_64"} <= set(words)
    assert words[-3:] == ["--dest", "wheels", "a==1"]
    with pytest.raises(ValueError, match="python=three"):
        pip_command(Path("wheels"), "three", [])


def test_the_bundle_has_wheels_and_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def ran(words: list[str], **settings: Any) -> Any:
        called.append(words)
        return subprocess.CompletedProcess(words, 0, stdout="abc\n")

    monkeypatch.setattr(subprocess, "run", ran)
    gpu_bundle(str(tmp_path), packages=["soxr"])
    assert called[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert called[0][-1].startswith("soxr==")
    assert (tmp_path / "commit").read_text() == "abc\n"
    said = capsys.readouterr().out
    assert said == in_words() + "\n"
    assert all(command.text in said for command in commands())


@NEEDS_CLONE
def test_results_and_bundle_are_ignored() -> None:
    ignored = ["git", "check-ignore", ".bundle/wheels", "gpu_results/suite"]
    done = subprocess.run(ignored, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ignored[2:]
