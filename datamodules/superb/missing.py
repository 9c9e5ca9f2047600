"""The one error for a corpus that is not there: what to get from where, and what the folder must look like."""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import InputError
from datamodules.files import read_text


@dataclass(frozen=True)
class Published:
    """A corpus as it is published."""

    name: str
    source: str  # where to get it
    layout: str  # a drawing of the folder

    def require(self, *paths: str) -> None:
        """Raise unless all the paths exist, and those of texts can be read.

        Raises:
            InputError: one does not, or is not UTF-8 text without a byte order mark.
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
    """torchaudio reads these files; it would take a mark for a part of the first name."""
    read_text(path)
    if Path(path).read_bytes().startswith(codecs.BOM_UTF8):
        raise InputError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
