"""Tables of a report: rows are dataclasses, and columns define how a field is shown. Both together render as
Markdown, HTML and a terminal table. A missing or non-finite value is a dash everywhere.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

DASH = "-"


@dataclass(frozen=True)
class ResultRow:
    """One system of this report. ``per`` in percent, losses as logged, ``speed_up`` relative to the Full row,
    ``mean_depth`` in layers averaged over optimizer steps; None = no such value."""

    system: str
    policy: str | None = None
    schedule: str | None = None
    parameters: int | None = None
    per: float | None = None
    train_loss: float | None = None
    val_output: float | None = None
    train_seconds: float | None = None
    speed_up: float | None = None
    mean_depth: float | None = None


@dataclass(frozen=True)
class PublishedRow:
    """One published system on SUPERB: PER, WER in percent, slot F1 and speaker accuracy in percent."""

    system: str
    schedule: str | None
    speed_up: float | None
    per: float
    wer: float
    f1: float
    accuracy: float


@dataclass(frozen=True)
class Column:
    """Field ``key`` of a row under the heading ``title``; ``show`` turns a present value into text."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    numeric: bool = True


# Kim and Lee, Interspeech 2026, arXiv 2606.11766; HuBERT Base: the SUPERB leaderboard.
PUBLISHED = (
    PublishedRow("HuBERT Base (teacher)", None, None, 5.41, 6.42, 88.53, 81.42),
    PublishedRow("Full L2L (no stacking)", None, 1.00, 9.12, 9.92, 86.47, 72.99),
    PublishedRow("GradStack", "equal", 1.25, 11.50, 11.04, 84.34, 70.89),
    PublishedRow("MIDAS", "equal", 1.25, 10.75, 10.74, 83.43, 69.94),
    PublishedRow("InterleaveStack", "equal", 1.24, 9.08, 10.22, 86.36, 72.26),
    PublishedRow("InterleaveStack", "prop-1", 1.16, 8.88, 9.99, 85.70, 73.60),
)


def show_count(number: int) -> str:
    """Format a number of parameters: ``2.62M``, ``412k``."""
    if number >= 999_500:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.0f}k" if number >= 1000 else str(number)


def show_seconds(seconds: float) -> str:
    """Format seconds with one decimal below ten and none above: ``4.2``, ``1,204``."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"


def show_loss(loss: float) -> str:
    """Format a loss with three significant digits, without an exponent in the usual range: ``0.0413``, ``1.27``."""
    return f"{loss:#.3g}" if 1e-3 <= abs(loss) < 1000 else f"{loss:.2e}"


def _fixed(decimals: int) -> Callable[[float], str]:
    return lambda number: f"{number:.{decimals}f}"


RESULT_COLUMNS = (
    Column("system", "System", numeric=False),
    Column("policy", "Policy", numeric=False),
    Column("schedule", "Schedule", numeric=False),
    Column("parameters", "Parameters", show_count),
    Column("per", "PER, %", _fixed(1)),
    Column("train_loss", "Train loss", show_loss),
    Column("val_output", "Dev output loss", show_loss),
    Column("train_seconds", "Training, s", show_seconds),
    Column("speed_up", "Speed-up", _fixed(2)),
    Column("mean_depth", "Mean depth", _fixed(1)),
)
PUBLISHED_COLUMNS = (
    Column("system", "System", numeric=False),
    Column("schedule", "Schedule", numeric=False),
    Column("speed_up", "Speed-up", _fixed(2)),
    Column("per", "PR PER, %", _fixed(2)),
    Column("wer", "ASR WER, %", _fixed(2)),
    Column("f1", "SF F1, %", _fixed(2)),
    Column("accuracy", "SID accuracy, %", _fixed(2)),
)


def cell(column: Column, row: Any) -> str:
    """Format one cell; a dash for None, NaN and infinity."""
    value = getattr(row, column.key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    return column.show(value)


def markdown_table(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """Render a GitHub-flavoured table that ends in a line break, with numbers aligned to the right."""
    lines = [
        [column.title for column in columns],
        ["---:" if column.numeric else ":---" for column in columns],
        *([cell(column, row).replace("|", "\\|") for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html_table(columns: Sequence[Column], rows: Sequence[Any], caption: str) -> str:
    """Render an HTML table; every cell has its heading in ``data-label``, which narrow screens show beside it."""
    head = "".join(f"<th scope='col'{_class(column)}>{html.escape(column.title)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_html_cell(column, row) for column in columns)}</tr>\n" for row in rows)
    return (
        f"<table><caption>{html.escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    )


def _html_cell(column: Column, row: Any) -> str:
    text = html.escape(cell(column, row))
    if column.key == "system":
        return f"<th scope='row'>{text}</th>"
    return f"<td data-label='{html.escape(column.title)}'{_class(column, text == DASH)}>{text}</td>"


def _class(column: Column, missing: bool = False) -> str:
    names = ["number"] * column.numeric + ["missing"] * missing
    return f" class='{' '.join(names)}'" if names else ""


def _whole(column: Column, rows: Sequence[Any]) -> int:
    """Compute the width at which no cell and no word of the title is cut."""
    return max(map(len, [*column.title.split(), *(cell(column, row) for row in rows)]))


def rich_table(columns: Sequence[Column], rows: Sequence[Any], title: str, caption: str) -> Table:
    """Render the table for the terminal."""
    # Narrow borders, names whole: the ten columns of a report then fit into 104 characters.
    table = Table(title=Text(title), caption=Text(caption), caption_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding, table.show_edge = False, True, False
    for column in columns:
        table.add_column(column.title, justify="right" if column.numeric else "left", width=_whole(column, rows))
    for row in rows:
        table.add_row(*(Text(cell(column, row)) for column in columns))
    return table
