"""Find files that ship with the package by name: configs, studies, variants of a benchmark."""

from pathlib import Path

from datamodules.errors import InputError
from experiments.command_line import nearest


def shipped_names(folder: Path) -> list[str]:
    """List the names in ``folder`` without ``.yaml``; files that begin with an underscore are only bases of others."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def find_shipped(value: str, folder: Path, option: str) -> Path:
    """Find the user's file ``value``, or the shipped file of that bare name in ``folder``.

    A path with a folder in it is always the user's, so that a misspelt folder does not select a shipped file. A file of
    the working directory wins over a shipped one only by its full name, ``full.yaml``.

    Args:
        value: path or name, as typed.
        folder: folder of the shipped files.
        option: name of the option, for the error message.

    Raises:
        InputError: there is neither.
    """
    if Path(value).is_file():
        return Path(value)
    name = value.removesuffix(".yaml")
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    names = shipped_names(folder)
    raise InputError(
        f"{option} {value}: there is no such file, and the shipped names are {', '.join(names)}"
        f"{nearest(Path(value).stem, names)}"
    )
