"""Render tables of finished cell texts as Markdown, HTML, LaTeX or a terminal table."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

LATEX = {"\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "\u00b1": r"$\pm$"}
LATEX |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
MANY_COLUMNS = 8  # more get smaller text on a page
NO_BREAK_SPACE, NO_BREAK_HYPHEN = "\u00a0", "\u2011"


@dataclass(frozen=True)
class Cell:
    """Text, whether it is the best of its column, and whether there is nothing to show."""

    text: str
    bold: bool = False
    missing: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; the first column names the row, the others are numbers. ``breaks``: rows that start a new group."""

    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    breaks: tuple[int, ...] = ()


def markdown_grid(grid: Grid) -> str:
    """Render a GitHub-flavoured table that ends in a line break."""
    lines = [list(grid.titles), [":---", *["---:"] * (len(grid.titles) - 1)]]
    lines += [[f"**{_pipe(cell)}**" if cell.bold else _pipe(cell) for cell in row] for row in grid.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _pipe(cell: Cell) -> str:
    return cell.text.replace("|", "\\|")


def html_grid(grid: Grid, caption: str) -> str:
    """Render an HTML table; every cell has its heading in ``data-label``, which narrow screens show beside it."""
    head = "".join(
        f"<th scope='col'{' class=number' * (place > 0)}>{_unbroken(title.replace('-', NO_BREAK_HYPHEN))}</th>"
        for place, title in enumerate(grid.titles)
    )
    body = "".join(
        f"<tr{' class=group' * (place in grid.breaks)}><th scope='row'>{html.escape(row[0].text)}</th>"
        + "".join(_html_cell(title, cell) for title, cell in zip(grid.titles[1:], row[1:], strict=True))
        + "</tr>\n"
        for place, row in enumerate(grid.rows)
    )
    names = "table wide" if len(grid.titles) > MANY_COLUMNS else "table"
    return (
        f"<div class='{names}'><table><caption>{html.escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _html_cell(title: str, cell: Cell) -> str:
    text = _unbroken(cell.text)
    text = f"<strong>{text}</strong>" if cell.bold else text
    names = "number missing" if cell.missing else "number"
    return f"<td data-label='{_unbroken(title)}' class='{names}'>{text}</td>"


def _unbroken(text: str) -> str:
    """Escape a text of which numbers, intervals, and names with their units stay on one line each."""
    inside = r"(?<=,) | (?=\u00b1)|(?<=\u00b1) |(?<=\(\d) (?=of)|(?<=\d of) "
    return re.sub(inside, NO_BREAK_SPACE, html.escape(text))


def latex_grid(grid: Grid) -> str:
    """Render a ``tabular`` with booktabs' rules, to be \\input into a paper."""
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(grid.titles) - 1)}}}", r"\toprule"]
    lines += [_latex_row(map(latex, grid.titles)), r"\midrule"]
    for place, row in enumerate(grid.rows):
        lines += [r"\midrule"] * (place in grid.breaks)
        lines.append(_latex_row(rf"\textbf{{{latex(c.text)}}}" if c.bold else latex(c.text) for c in row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    """Escape the characters that are special in LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def rich_grid(grid: Grid, title: str, caption: str) -> Table:
    """Render the table for the terminal."""
    table = Table(title=Text(title), caption=Text(caption), caption_justify="left")
    longest = max((len(word) for row in grid.rows for word in row[0].text.split()), default=0)
    for place, heading in enumerate(grid.titles):
        # A fixed width: rich shrinks a column with a least width, and then prints a table wider than the terminal.
        table.add_column(heading, justify="right" if place else "left", width=None if place else longest)
    for row in grid.rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in row))
    return table
