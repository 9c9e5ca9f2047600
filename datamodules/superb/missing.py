"""The error for a missing corpus, which names its source and the layout of its folder."""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import InputError
from datamodules.files import read_text


@dataclass(frozen=True)
class Published:
    """A corpus in its published form."""

    name: str
    source: str  # its address
    layout: str  # layout of the folder, as text for the message

    def require(self, *paths: str) -> None:
        """Check that all paths exist and that text files can be read.

        Raises:
            InputError: a path does not exist, or a text file is not UTF-8 without a byte order mark.
        """
        for path in paths:
            if not os.path.exists(path):
                raise InputError(self.missing(f"{path} does not exist"))
            if path.endswith((".txt", ".csv")):
                _require_plain_text(path)

    def missing(self, problem: str) -> str:
        return (
            f"{self.name} is not there: {problem}. Get it from {self.source}; the folder must look like\n"
            f"{self.layout}\nAny other corpus: give a .tsv file as the root (docs/superb.md)."
        )


def _require_plain_text(path: str) -> None:
    """Refuse a byte order mark, which torchaudio would read as a part of the first name."""
    read_text(path)
    if Path(path).read_bytes().startswith(codecs.BOM_UTF8):
        raise InputError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
