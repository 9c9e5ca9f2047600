"""Errors name options as they are typed, below `model.`, `data.`, `trainer.`, ...: every such name is an option."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonargparse import capture_parser

from experiments.cli import COMMANDS, run
from experiments.command_line import option_names
from tests.conftest import REPOSITORY

PACKAGES = ("lightning_modules", "callbacks", "datamodules", "experiments")
# Beginnings that look like an option of `fit`; `student.` and its like lack the `model.` before them.
GROUPS = "model|data|trainer|growth|checkpoint|guard|wandb|student|objective|optimizer|cuda|recipe|slurm"
NAME = re.compile(rf"(?<![\w./`])(?:--)?((?:{GROUPS})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)")
OTHERS = {"model.safetensors", "trainer.should_stop"}
"""A file, and what a callback sets."""


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Options of all commands; `fit-together` has those of `fit`."""
    known: set[str] = set()
    for command in set(COMMANDS) - {"fit-together"}:
        parser = capture_parser(run, command.split())
        for each in parser._subcommands_action.choices.values() if parser._subcommands_action else [parser]:
            known |= set(option_names(each))
    return known


def messages(source: str) -> Iterator[str]:
    """Texts of what a file raises, warns and logs: every string of several words that is no docstring."""
    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def names(source: str) -> set[str]:
    return {match[1] for text in messages(source) if " " in text for match in NAME.finditer(text)} - OTHERS


def test_every_option_that_a_message_names_exists(options: set[str]) -> None:
    found = {
        (str(path.relative_to(REPOSITORY)), name)
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
        if Path("experiments/launch") not in path.relative_to(REPOSITORY).parents  # commands of other programs
        for name in names(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 40  # control: they are found at all
    beginnings = {name[: dot.start()] for name in options for dot in re.finditer(r"\.", name)}
    assert {(path, name) for path, name in found if name not in options | beginnings} == set()


@pytest.mark.parametrize("name", ["student.front_end_init", "objective.weight", "trainer.max_epoch", "data.rot"])
def test_control_a_name_that_is_no_option_is_noticed(name: str, options: set[str]) -> None:
    assert names(f'raise ValueError(f"{name}={{x}} is wrong: choose another")') == {name}
    assert name not in options


def test_a_docstring_and_code_are_no_messages() -> None:
    assert names('"""The student.depth of it."""\nx = model.student\n') == set()
