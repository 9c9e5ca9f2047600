"""``RUN/metrics.csv``: one column per metric and one row per logging call.

A step may have several rows (training and validation, steps repeated after a resume); for each column the last value of
a step counts.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from datamodules.errors import InputError
from datamodules.files import write_text


class MetricsFile:
    """A CSV file that only grows: rows are appended, a new column rewrites the file atomically.

    A process that is killed while it writes can leave an incomplete last line, which is dropped when the file is next
    opened.

    Args:
        path: path of the file; existing rows are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.columns = self._repair()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is in the file when this returns, even if the process is killed afterwards."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._add_columns(new)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_line([row.get(name, "") for name in self.columns]))

    def _repair(self) -> list[str]:
        if not self.path.is_file():
            return []
        with self.path.open("r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        with self.path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _add_columns(self, names: list[str]) -> None:
        rows: list[list[str]] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))[1:]
        self.columns = [*self.columns, *names]
        filled = ([*row, *[""] * (len(self.columns) - len(row))] for row in [self.columns, *rows])
        write_text(self.path, "".join(map(_line, filled)))


def _line(values: list[Any]) -> str:
    # One string, so that a row reaches the file in one write.
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


class AppendingCSVLogger(CSVLogger):
    """``RUN/metrics.csv``, continued by a resumed run; Lightning's own logger would delete it.

    Hyper-parameters are not written here: every attempt keeps its resolved configuration.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(save_dir=run_dir, name="", version="")
        self._metrics: MetricsFile | None = None

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The file, opened at the first access, on rank zero."""
        if self._metrics is None:
            self._metrics = MetricsFile(Path(self.log_dir) / "metrics.csv")
        return self._metrics

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: numbers, or tensors of one element.
            step: optimizer steps done; required, since a row without one cannot be placed.
        """
        if step is None:
            raise InputError(f"metrics {', '.join(metrics)} were logged without a step")
        values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.experiment.append({"step": step, **values})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Do nothing: see the class."""

    @rank_zero_only
    def save(self) -> None:
        """Do nothing: rows are in the file already."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing: rows are in the file already."""
