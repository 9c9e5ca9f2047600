"""``--data CLASS``: a run's data module by its class path.

    interstack fit --data my_package.MyData --data.init_args.root /data ...

The class decides which options there are, so it is found in the arguments before there is a parser. Configurations of
the default class have its settings in ``data`` directly; those of another class have ``class_path`` and ``init_args``.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import InputError
from datamodules.files import read_text
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.speech_data import SpeechDataModule
from experiments.records.settings_yaml import dump_settings, load_settings
from lightning_modules.lookup import find_named

CONFIG = ("--config", "-c")
CLASS = ("--data", "--data.class_path")
SETTING = "--data.init_args."


def choose_data(args: list[str]) -> tuple[type[SpeechDataModule], list[str]]:
    """Find the data module's class, and rewrite the arguments for a parser with the options of that class.

    Args:
        args: arguments of a command, whose ``--config`` values are files or settings; the last class named wins.

    Raises:
        InputError: the class cannot be imported, or is no complete :class:`SpeechDataModule`.
    """
    words = [part for word in args for part in _split(word)]
    data_class: type[SpeechDataModule] = LibriSpeechDataModule
    rest: list[str] = []
    pairs = iter(words)
    for word in pairs:
        if word not in (*CONFIG, *CLASS):
            rest.append(word.replace(SETTING, "--data.", 1) if word.startswith(SETTING) else word)
            continue
        value = next(pairs, None)
        if value is None:
            rest.append(word)
        elif word in CLASS and _is_dotted(value):
            data_class = find_data_class(value)
        else:
            name, value = _without_class(value) if word in CONFIG else (None, value)
            data_class = data_class if name is None else find_data_class(name)
            rest += [word, value]
    return data_class, rest


def find_data_class(name: str) -> type[SpeechDataModule]:
    """Import the class at a dotted path."""
    own = f"a subclass of {SpeechDataModule.__module__}.SpeechDataModule, my_package.MyData"
    found = find_named(name, {"LibriSpeechDataModule": LibriSpeechDataModule}, "--data", own)
    if not (isinstance(found, type) and issubclass(found, SpeechDataModule)):
        raise InputError(f"--data {name} is not {own}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise InputError(f"--data {name} does not define {', '.join(missing)}")
    return found


def name_data_class(settings: dict[str, Any], data_class: type[SpeechDataModule]) -> dict[str, Any]:
    """Add the class to the ``data`` of a whole configuration, unless it is the default."""
    if data_class is LibriSpeechDataModule:
        return settings
    path = f"{data_class.__module__}.{data_class.__qualname__}"
    return settings | {"data": {"class_path": path, "init_args": settings["data"]}}


def accepts(data_class: type[SpeechDataModule], name: str) -> bool:
    """Whether the class has a setting of this name."""
    return name in inspect.signature(data_class).parameters


def _split(word: str) -> list[str]:
    """Split ``--name=value`` of the options that are rewritten here."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and name in (*CONFIG, *CLASS) else [word]


def _is_dotted(value: str) -> bool:
    """Whether a value is the path of a class, and not a file of settings or the settings themselves."""
    file = Path(value).is_file() or value.endswith((".yaml", ".yml", ".json"))
    return not file and re.fullmatch(r"\w+(\.\w+)*", value) is not None


def _without_class(config: str) -> tuple[str | None, str]:
    """The class that a configuration names, and the configuration as the parser of that class reads it."""
    try:
        settings = load_settings(config if ":" in config else read_text(config))
    except yaml.YAMLError:
        return None, config  # the parser reports it
    data = settings.get("data") if isinstance(settings, dict) else None
    if not isinstance(data, dict) or "class_path" not in data:
        return None, config
    return data["class_path"], dump_settings(settings | {"data": data.get("init_args") or {}})
