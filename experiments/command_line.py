"""Parsers whose errors are one line with the nearest option.

Argparse prints the usage first, which for ``interstack fit`` is 116 lines. The import stays cheap: no torch here.
"""

import argparse
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

COMMON_OPTIONS = {
    "config": "shipped name or YAML file; may be repeated, later ones win",
    "name": "folder of the run below --runs_dir",
    "runs_dir": "folder of all runs",
    "ckpt_path": "`last` continues the run in its folder",
    "data": "class of another data module, my_package.MyData",
    "data.root": "the corpus, in LibriSpeech layout",
    "data.train_splits": "folders to train on",
    "data.batch_size": "utterances per step, over all devices",
    "data.batches_per_epoch": "steps per epoch; default: the corpus once",
    "data.num_workers": "processes that load audio",
    "max_batch_per_device": "utterances that a device holds at once",
    "model.teacher.init_args.model": "Hugging Face name or folder of the teacher",
    "model.student.num_layers": "full depth of the student",
    "model.student.hidden_size": "width of the student",
    "model.objective.weight": "weight of the intermediate loss",
    "model.optimizer.lr": "peak learning rate",
    "growth.policy": "how the student grows; `none`: full depth throughout",
    "growth.schedule": "equal, prop-ALPHA or explicit-E1,E2,...",
    "trainer.max_epochs": "length of the run in epochs",
    "trainer.devices": "GPUs, or processes on a CPU",
    "trainer.precision": "default: bf16-mixed if the GPU supports it, else 32-true",
    "wandb.mode": "auto, online, offline or disabled",
    "seed_everything": "seed of everything that is random",
    "print_config": "print all settings and exit",
}
"""Options at the top of ``interstack fit --help``, with their texts."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``: did you mean X?`` with the most similar known word, or an empty string if none is similar."""
    found = get_close_matches(word, list(known), n=1)
    return f": did you mean {found[0]}?" if found else ""


class OneLineErrors:
    """Mixin of an argparse parser: errors of one line, exit status 2; options are not abbreviated.

    Code that reads the arguments themselves would miss an abbreviation (``--conf full`` would name no shipped file),
    and the next option that is added could make it ambiguous.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message on one line; a nested parser, which may not exit, raises as usual."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        parser = _chosen(self)
        print(f"{parser.prog}: {describe(message, parser)}", file=sys.stderr)
        raise SystemExit(2)


class Parser(OneLineErrors, ArgumentParser):
    """The parser of the commands that are functions."""


class PlainParser(OneLineErrors, argparse.ArgumentParser):
    """Argparse's parser with one-line errors."""


def _chosen(parser: Any) -> Any:
    """The parser of the chosen subcommand, or ``parser`` itself if there is none."""
    subcommands = getattr(parser, "_subcommands_action", None)
    named = (getattr(parser, "args", None) or [""])[0]
    return subcommands.choices.get(named, parser) if subcommands else parser


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """List every option as it is typed, without the dashes, and ``x.init_args.y`` for the default class of ``x``."""
    names = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    for action in parser._actions:
        default: Any = action.default
        if hasattr(default, "class_path"):
            arguments = inspect.signature(pkgutil.resolve_name(default.class_path)).parameters
            names += [f"{action.dest}.init_args.{name}" for name in arguments]
    return [name for name in names if not name.endswith((".help", "+"))]


def describe(message: str, parser: argparse.ArgumentParser) -> str:
    """Rewrite a message of argparse or jsonargparse as one line of plain words."""
    known, more = option_names(parser), f" (`{parser.prog} --help` lists all options)"
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _unknown((match[1].split() or [""])[0].split("=")[0], known) + more
    if match := re.search(r"does not accept option '(.*)'|Option '(.*)' is not accepted$", message, re.DOTALL):
        within = re.match(r'Parser key "(.*?)"', message)
        group = re.match(r"Group '(.*?)'", message)
        prefix = f"{within[1]}.init_args." if within else f"{group[1]}." if group else ""
        where = "" if within else " (in a configuration)"  # on the command line it would be "unrecognized"
        return _unknown(f"--{prefix}{match[1] or match[2]}", known) + where + more
    if match := re.match(r"the following arguments are required: (.*)", message):
        subcommand = f"{getattr(parser, 'subcommand', '')}."
        names = [name.lstrip("-").removeprefix(subcommand) for name in match[1].split(", ")]
        return "missing: " + ", ".join(f"--{name}" if name in known else name.upper() for name in names) + more
    if match := re.match(r'Parser key "(.*?)":?\s*(.*)', message, re.DOTALL):
        return f"--{match[1]}{_wrong_value(match[2])}"
    return " ".join(message.split())


def _unknown(word: str, known: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no option"
    return f"there is no option {word}" + nearest(word, [f"--{name}" for name in known])


def _wrong_value(details: str) -> str:
    """Shorten jsonargparse's message about a value; of a union only the members, not why each refuses."""
    match = re.search(r"Subtypes: \[(?P<types>[^\n]*)\].*Given value: (?P<value>.*)", details, re.DOTALL)
    match = match or re.fullmatch(r"Expected an? (?P<types>.*)\. Got value: (?P<value>.*)", details, re.DOTALL)
    if "given class_path" in details or match is None:
        lines = [line.strip().removeprefix("- ") for line in details.splitlines()]
        dull = ("Expected a path", "Does not validate", "Subtypes", "Errors:", "Given value", "Expected a <class")
        return ": " + " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(dull)))
    choices = re.findall(r"'(.*?)'", "".join(re.findall(r"Literal\[.*?\]", match["types"])))
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match["types"]).replace("NoneType", "null")
    types = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda literal: literal[1].replace("'", ""), types)
    types = " or ".join(types.rsplit(", ", 1))
    types = types.replace("PositiveInt", "a positive int").replace("Sequence", "a list such as [a, b]")
    value = match["value"].strip()
    return f" {value}: expected {types}{nearest(value, choices)}"


def common_options(parser: argparse.ArgumentParser) -> str:
    """Format those of the common options that the parser has, one line each, with their defaults."""
    known = set(option_names(parser))
    lines = []
    for name, text in COMMON_OPTIONS.items():
        if name in known:
            default = _default(parser, name)
            lines.append(f"  --{name:<33} {text}{f' ({default})' if default else ''}")
    return "\n".join(["options that most runs set (defaults in brackets):", *lines, ""])


def _default(parser: Any, name: str) -> str:
    defaults = parser.get_defaults(skip_validation=True)
    value = defaults.get(name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None or isinstance(value, Namespace) else str(value)
