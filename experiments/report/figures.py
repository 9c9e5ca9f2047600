"""Common parts of a report's pictures: the figure, its colours, its labels, and its two forms (PNG and SVG).

matplotlib is an optional package and is imported only when a figure is made. pyplot's global state is not used.
"""

import io
import logging
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import InputError
from experiments.report.looks import Look
from experiments.report.theme import GRID, INK, MUTED, PAPER, follow_theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: about as wide as a phone's screen, so that text of 9 points keeps its size
FONT = 9
SMALL = 8
PAPER_WIDTHS = {1: 80 / 25.4, 2: 170 / 25.4}
"""Inches of one column and of both columns of an Interspeech paper."""
NARROW_TICKS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, *(step / 2 for step in range(4, 20)))  # within a decade


class Drawing(Protocol):
    """The parts of a picture that a page needs; see `Picture`."""

    @property
    def heading(self) -> str:
        """Title of the picture."""

    @property
    def caption(self) -> str:
        """Explanation of the picture."""

    def svg(self) -> str:
        """Element for an HTML page."""


@dataclass(frozen=True)
class Picture:
    """A figure with its file stem, heading and caption, which explains the picture."""

    name: str
    heading: str
    caption: str
    figure: "Figure"

    def png(self) -> bytes:
        """Draw the figure as PNG on opaque white, which is legible on any background."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=200, facecolor=PAPER)
        return buffer.getvalue()

    def paper(self, form: str) -> bytes:
        """Draw the figure as a ``pdf`` or ``svg`` file for a paper, on white, the same bytes every time.

        A PDF embeds its fonts as TrueType (type 42), since many publishers refuse matplotlib's default, type 3. An SVG
        file cannot embed a font, so its text is drawn as outlines and looks the same everywhere.
        """
        import matplotlib

        logging.getLogger("fontTools").setLevel(logging.WARNING)  # it lists every glyph that it embeds
        buffer = io.BytesIO()
        dates = {"CreationDate": None, "ModDate": None} if form == "pdf" else {"Date": None}
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format=form, facecolor=PAPER, metadata=dates)
        return buffer.getvalue()

    def svg(self) -> str:
        """Draw an element for an HTML page: colours are CSS variables, text stays text, ids have the picture's name."""
        import matplotlib

        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
        return follow_theme(svg.replace("<svg ", f'<svg role="img" aria-label="{self.heading}" ', 1))


def require_matplotlib() -> None:
    """Fail early, with the remedy, if pictures cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("the report draws with matplotlib, which is not installed: pip install 'interstack[report]'")


def single_axes(height: float, width: float = WIDTH) -> tuple["Figure", "Axes"]:
    """Make a figure with one plot on a light grid; ``height`` in inches is that at ``WIDTH``, narrower ones shrink."""
    figure, grid = axes_grid(1, 1, size=(width, height * min(1.0, width / WIDTH)))
    light_grid(grid[0][0])
    return figure, grid[0][0]


def light_grid(axes: "Axes") -> None:
    """Give the plot a light grid and no frame."""
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def axes_grid(
    rows: int, columns: int, cell: float = 1.0, size: tuple[float, float] | None = None
) -> tuple["Figure", list[list["Axes"]]]:
    """Make a figure on the Agg canvas with ``rows`` x ``columns`` axes in the report's colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (columns * cell + 0.9, rows * cell + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=FONT, length=0)
        axes.xaxis.label.set(color=MUTED, fontsize=FONT)
        axes.yaxis.label.set(color=MUTED, fontsize=FONT)
        axes.set_facecolor("none")
    return figure, [list(line) for line in grid]


def log_scale(axes: "Axes", values: NDArray[np.float64]) -> None:
    """Set a log scale with a few round ticks in plain numbers; the scale stays linear if a value is not positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if values.min() <= 0:
        return
    axes.set_yscale("log")
    subs: tuple[float, ...]
    decades = np.log10(values.max() / values.min())
    if decades > 1.3:
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
    else:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades > 0.4 else NARROW_TICKS
        if decades < 0.01:  # a single point: matplotlib would show a decade around it, with the ticks of a narrow range
            axes.set_ylim(values.min() / 1.2, values.max() * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: "Figure", looks: Mapping[str, Look], lines: bool = True) -> None:
    """Name rows below the plot, in two columns if they fit; the figure grows by their height.

    Names stand there and not beside the curves, because a long one would leave little of the figure to the plot.

    Args:
        figure: the figure, complete but for this.
        looks: label -> look of the rows in the picture.
        lines: show lines with markers, or else markers alone.
    """
    from matplotlib.lines import Line2D

    handles = []
    for look in looks.values():
        style = look.lines() if lines else {"linestyle": "none"}
        handles.append(Line2D([], [], **style | look.marks()))
    width, height = figure.get_size_inches()
    letters = 72 * width / (0.56 * FONT)  # about this many fit in a line
    handle = 8 if lines else 4
    columns = 2 if max(map(len, looks), default=0) <= letters / 2 - handle else 1
    names = [textwrap.fill(label, max(10, int(letters / columns) - handle), break_long_words=False) for label in looks]
    height_in_lines = sum(name.count("\n") + 1.25 for name in names) / columns + 1
    figure.set_size_inches(width, height + 1.2 * FONT / 72 * height_in_lines)
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=FONT, frameon=False, labelcolor=INK,
        handlelength=3.2 if lines else 1.2, markerscale=0.9, columnspacing=1.5,
    )  # fmt: skip
