"""The bundle for an offline GPU machine: wheels of the tested versions, and commands that are accepted there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import COMMANDS, run
from experiments.launch.gpu_bundle import MISSING, REPOSITORY, gpu_bundle, in_words, pinned, pip_command
from experiments.launch.gpu_commands import FIT, MOST_CHARACTERS, MOST_SECONDS, Command, commands

EACH = pytest.mark.parametrize("command", commands(), ids=lambda command: command.title[:20])


@EACH
def test_a_command_is_short_and_parses(command: Command) -> None:
    assert len(command.text) < MOST_CHARACTERS
    assert command.limit <= MOST_SECONDS
    subprocess.run(["bash", "-n", "-c", command.text], check=True)


def test_control_a_command_that_does_not_parse_is_seen() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["bash", "-n", "-c", commands()[0].text + "; do"], check=True, capture_output=True)


def inner_limits(command: Command) -> list[int]:
    return [int(seconds) for seconds in re.findall(r"timeout (\d+) ", command.body)]


@EACH
def test_what_takes_long_has_a_limit_below_that_of_the_command(command: Command) -> None:
    assert inner_limits(command)
    assert all(seconds < command.limit for seconds in inner_limits(command))


@EACH
def test_paths_of_the_repository_exist(command: Command) -> None:
    paths = re.findall(r"(?<![\w/.])(?:tests|experiments)/[\w/.]+", command.body)
    assert all((REPOSITORY / path).exists() for path in paths)
    modules = [name for name in re.findall(r"(?:-m|-p|from) ((?:experiments|tests)\.[\w.]+)", command.body)]
    assert all((REPOSITORY / f"{name.replace('.', '/')}.py").is_file() for name in modules)


def interstack_calls(command: Command) -> list[list[str]]:
    """Arguments of each call of the program, without what the shell does with its output."""
    found = re.findall(r"-m experiments\.cli (.*?)(?= 2>&1| > |;|$)", command.body)
    return [shlex.split(call.replace("$F", FIT)) for call in found]


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


def test_results_and_bundle_are_ignored() -> None:
    ignored = ["git", "check-ignore", ".bundle/wheels", "gpu_results/suite"]
    done = subprocess.run(ignored, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ignored[2:]
