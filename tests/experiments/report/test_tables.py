"""Cells, and the three forms of a table."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from experiments.report.tables import (
    PUBLISHED,
    PUBLISHED_COLUMNS,
    RESULT_COLUMNS,
    Column,
    ResultRow,
    cell,
    html_table,
    markdown_table,
    rich_table,
    show_count,
    show_loss,
    show_seconds,
)

ROW = ResultRow("A | <b> [bold]", "gradual", "equal", 873_472, 21.34, 0.04129, 1.2, 143.4, 1.2449, 7.5)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (show_count, 26_873_344, "26.87M"),
        (show_count, 873_472, "873k"),
        (show_count, 999_600, "1.00M"),
        (show_count, 12, "12"),
        (show_seconds, 4.23, "4.2"),
        (show_seconds, 9.96, "10"),
        (show_seconds, 1203.6, "1,204"),
        (show_loss, 0.04129, "0.0413"),
        (show_loss, 1.2, "1.20"),
        (show_loss, 123.4, "123."),
        (show_loss, 1.2e-5, "1.20e-05"),
    ],
)
def test_digits(show, value, text) -> None:  # type: ignore[no-untyped-def]
    assert show(value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_no_value_is_a_dash(value: float | None) -> None:
    assert cell(Column("per", "PER"), ResultRow("x", per=value)) == "-"
    assert cell(Column("per", "PER"), ResultRow("x", per=0.0)) == "0.0"


def test_markdown() -> None:
    lines = markdown_table(RESULT_COLUMNS, [ROW]).splitlines()
    assert len(lines) == 3
    assert lines[2] == ("| A \\| <b> [bold] | gradual | equal | 873k | 21.3 | 0.0413 | 1.20 | 143 | 1.24 | 7.5 |")


def test_html_is_escaped_and_every_cell_has_its_heading() -> None:
    text = html_table(RESULT_COLUMNS, [ROW, ResultRow("b")], "caption")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert text.count("data-label='PER, %'") == 2
    assert "class='number missing'>-<" in text


def test_terminal_shows_labels_as_they_are() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(RESULT_COLUMNS, [ROW], "title", "caption"))
    text = console.export_text()
    assert "A | <b> [bold]" in text
    assert "1.24" in text


def test_nothing_is_cut_at_the_width_of_the_quick_start() -> None:
    rows = [replace(ROW, system="InterleaveStack", policy="interleaved"), ResultRow("Untrained teacher", per=88.1)]
    console = Console(width=104, record=True, file=io.StringIO())
    console.print(rich_table(RESULT_COLUMNS, rows, "title", "caption"))
    text = console.export_text()
    for word in ("InterleaveStack", "Untrained teacher", "interleaved", "Parameters", "Speed-up"):
        assert text.count(word) == 1
    assert "\u2026" not in text


def test_published_rows() -> None:
    text = markdown_table(PUBLISHED_COLUMNS, PUBLISHED)
    assert "| InterleaveStack | equal | 1.24 | 9.08 | 10.22 | 86.36 | 72.26 |" in text
    assert "| HuBERT Base (teacher) | - | - | 5.41 | 6.42 | 88.53 | 81.42 |" in text
