"""Write a report in all its forms from finished (or unfinished) run folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from datamodules.files import write_bytes, write_text
from experiments.report.document import (
    ReferenceRow,
    Report,
    ReportNotes,
    ReportRun,
    assemble,
    read_runs,
)
from experiments.report.markdown import markdown
from experiments.report.page import page
from experiments.report.plots import draw_all
from experiments.report.tables import RESULT_COLUMNS, rich_table


@dataclass(frozen=True)
class ReportPaths:
    """Files of a report; ``plots`` by name (``loss_vs_time``, ...); ``table`` is for the terminal."""

    markdown: Path
    json: Path
    html: Path
    plots: dict[str, Path]
    table: Table

    @property
    def main(self) -> Path:
        """The file to open first."""
        return self.html


def build_report(
    output: Path, runs: Sequence[ReportRun], references: Sequence[ReferenceRow], notes: ReportNotes
) -> ReportPaths:
    """Write ``report.md``, ``report.json``, ``report.html`` and one PNG per picture into ``output``.

    Files are replaced one by one, each atomically. Rows, colours and markers follow the order of ``runs``; the first
    run with policy ``none`` is the Full row of the speed-ups. Pictures without data are left out.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        InputError: two runs share a label, or a run folder does not exist or cannot be read.
    """
    pairs = read_runs(runs)
    report = assemble(pairs, references, notes)
    pictures = draw_all(pairs, references)
    plots = {picture.name: write_bytes(output / f"{picture.name}.png", picture.png()) for picture in pictures}
    shown = [(plots[picture.name].name, picture.heading, picture.caption) for picture in pictures]
    return ReportPaths(
        markdown=write_text(output / "report.md", markdown(report, shown)),
        json=write_text(output / "report.json", report.to_json()),
        html=write_text(output / "report.html", page(report, pictures)),
        plots=plots,
        table=terminal_table(report),
    )


def terminal_table(report: Report) -> Table:
    """Make a terminal table of the results, with footnotes and caveats below them."""
    caption = "\n".join([*report.footnotes, *report.notes.caveats])
    return rich_table(RESULT_COLUMNS, report.rows, report.notes.title, caption)
