"""Files that come with the package and are chosen by name: configs, studies, variants of a benchmark."""

from pathlib import Path

from datamodules.errors import InputError
from experiments.command_line import nearest


def shipped_names(folder: Path) -> list[str]:
    """Names in ``folder``, without ``.yaml``; a file that begins with an underscore is only a base of others."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def find_shipped(value: str, folder: Path, option: str) -> Path:
    """The user's file ``value``; or, where there is none, the one that ships in ``folder`` under that bare name.

    A path with a folder in it is the user's own, so that a misspelt folder does not end at a shipped file. A file of
    the working directory wins over a shipped one only by its whole name, ``full.yaml``.

    Args:
        value: as typed.
        folder: of the shipped files.
        option: how to name the value in an error.

    Raises:
        ValueError: there is neither.
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
