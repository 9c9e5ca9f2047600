"""The one error for a corpus that is not there: what to get from where, and what the folder must look like."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A corpus as it is published."""

    name: str
    source: str  # where to get it
    layout: str  # a drawing of the folder

    def require(self, *paths: str) -> None:
        """Raise unless all the paths exist.

        Raises:
            ValueError: one does not.
        """
        for path in paths:
            if not os.path.exists(path):
                raise ValueError(self.missing(f"{path} does not exist"))

    def missing(self, problem: str) -> str:
        return (
            f"{self.name} is not there: {problem}. Get it from {self.source}; the folder must look like\n"
            f"{self.layout}\nAny other corpus: give a .tsv file as the root (docs/superb.md)."
        )
