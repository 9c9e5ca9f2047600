"""One self-contained HTML page of a report: no script, no file beside it, light and dark, wide and narrow."""

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from experiments.report.document import COLUMN_NOTES, PUBLISHED_NOTE, REAL_THING, Report, provenance
from experiments.report.figures import Picture
from experiments.report.tables import PUBLISHED_COLUMNS, RESULT_COLUMNS, html_table
from experiments.report.theme import DARK, LIGHT, css_variables


def page(report: Report, pictures: Sequence[Picture]) -> str:
    """The page as text; pictures are inline SVG whose colours follow the reader's theme."""
    template = Template(files("experiments.report").joinpath("page.html").read_text(encoding="utf-8"))
    notes = report.notes
    return template.substitute(
        title=html.escape(notes.title),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        caveats=_each("p", notes.caveats),
        results=html_table(RESULT_COLUMNS, report.rows, "PER and losses: lower is better. Speed-up: higher is better."),
        footnotes=_each("li", [*report.footnotes, *COLUMN_NOTES]),
        pictures="\n".join(_figure(picture) for picture in pictures),
        published=html_table(PUBLISHED_COLUMNS, report.published, PUBLISHED_NOTE),
        real_thing=html.escape(REAL_THING),
        real_command=html.escape(notes.real_command),
        provenance="".join(
            f"<dt>{name}</dt><dd>{_code(value) if name == 'Command' else html.escape(value)}</dd>"
            for name, value in provenance(notes)
        ),
    )


def _figure(picture: Picture) -> str:
    return (
        f"<figure><h2>{html.escape(picture.heading)}</h2>\n{picture.svg()}\n"
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _each(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"
