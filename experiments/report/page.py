"""Render a report as one HTML page without scripts or other files, for light and dark, wide and narrow screens."""

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from experiments.report.figures import Drawing
from experiments.report.theme import DARK, LIGHT, css_variables


def document(title: str, caveats: Sequence[str], body: Sequence[str]) -> str:
    """Render a whole page around parts of HTML; without caveats their box is left out."""
    template = Template(files("experiments.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        caveats=f'<div class="caveat" role="note">{_each("p", caveats)}</div>' if caveats else "",
        body="\n".join(body),
    )


def bullets(lines: Sequence[str]) -> str:
    """Render notes below a table."""
    return f'<ul class="small">{_each("li", lines)}</ul>'


def figures(pictures: Sequence[Drawing]) -> str:
    """Render all pictures, in two columns if the page is wide enough."""
    shown = "\n".join(_figure(picture) for picture in pictures)
    return f'<div class="pictures">\n{shown}\n</div>'


def made(lines: Sequence[tuple[str, str]]) -> str:
    """Render the section on how the report was made."""
    items = "".join(
        f"<dt>{name}</dt><dd>{_code(value) if name == 'Command' else html.escape(value)}</dd>" for name, value in lines
    )
    return f"<h2>How this was made</h2>\n<dl>{items}</dl>"


def _figure(picture: Drawing) -> str:
    return (
        f"<figure><h2>{html.escape(picture.heading)}</h2>\n{picture.svg()}\n"
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _each(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"
