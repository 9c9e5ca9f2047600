"""Common parts of a report's pictures: the figure, its colours, its labels, and its two forms (PNG and SVG).

matplotlib is an optional package and is imported only when a figure is made. pyplot's global state is not used.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.report.labels import Box, place_beside, spread
from experiments.report.theme import GRID, INK, MUTED, PAPER, SERIES, follow_theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: about as wide as a phone's screen, so that text of 9 points keeps its size
FONT = 9
MARKERS = "osD^vPX<"
DASHES = ("-", "--", ":")
NARROW_TICKS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, *(step / 2 for step in range(4, 20)))  # within a decade
MOST_MARGIN_LABELS = 6  # more names do not fit beside the curves


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
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the report draws with matplotlib, which is not installed: pip install 'interstack[report]'"
        ) from None


def single_axes(height: float) -> tuple["Figure", "Axes"]:
    """Make a figure of the report's width and ``height`` inches with one plot on a light grid."""
    figure, grid = axes_grid(1, 1, size=(WIDTH, height))
    axes = grid[0][0]
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    return figure, axes


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


def label_ends(figure: "Figure", axes: "Axes", ends: dict[int, tuple[float, float]], labels: Sequence[str]) -> None:
    """Draw a marker at each curve's end and its name: in the right margin, or below the plot if there are many."""
    axes.set_xmargin(0.02)
    axes.autoscale_view()
    for index, (x, y) in ends.items():
        mark = MARKERS[index % len(MARKERS)]
        axes.plot([x], [y], mark, color=series_colour(index), markersize=5.5, clip_on=False, zorder=4)
    if len(ends) > MOST_MARGIN_LABELS:
        _legend_below(figure, list(ends), labels)
    else:
        _margin_labels(figure, axes, ends, labels)


def _margin_labels(figure: "Figure", axes: "Axes", ends: dict[int, tuple[float, float]], labels: Sequence[str]) -> None:
    """Write names in the right margin, joined with the ends by thin lines."""
    height = figure.get_size_inches()[1] * 72 * 0.78  # points from bottom to top of the axes, roughly
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform(end)[1]) for end in ends.values()]
    for (index, end), place in zip(ends.items(), spread(wanted, gap=1.45 * FONT / height), strict=True):
        colour = series_colour(index)
        axes.annotate(
            labels[index], end, (1.04, place), xycoords="data", textcoords="axes fraction", color=colour,
            fontsize=FONT, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _legend_below(figure: "Figure", shown: Sequence[int], labels: Sequence[str], lines: bool = True) -> None:
    """Write names in two columns below the plot; the figure grows by their height, so the plot keeps its size."""
    from matplotlib.lines import Line2D

    handles = []
    for index in shown:
        dash: Any = series_dash(index) if lines else "none"
        handles.append(Line2D([], [], color=series_colour(index), linestyle=dash, marker=MARKERS[index % len(MARKERS)]))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 1.6 * FONT / 72 * -(-len(shown) // 2))
    figure.legend(
        handles, [labels[index] for index in shown], loc="outside lower center", ncols=2, fontsize=FONT,
        frameon=False, labelcolor=INK, handlelength=3 if lines else 1, markerscale=0.8,
    )  # fmt: skip


def label_points(figure: "Figure", axes: "Axes", points: dict[int, tuple[float, float]], labels: Sequence[str]) -> None:
    """Write each point's name beside it without covering others, or all names below the plot if there are many."""
    if len(points) > MOST_MARGIN_LABELS:
        _legend_below(figure, list(points), labels, lines=False)
        return
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    pixels = [tuple(axes.transData.transform(point) / scale) for point in points.values()]
    texts = [figure.text(0, 0, labels[index], fontsize=FONT) for index in points]
    extents = [text.get_window_extent() for text in texts]
    window = axes.get_window_extent()
    area = Box(window.x0 / scale, window.y0 / scale, window.x1 / scale, window.y1 / scale)
    sizes = [(extent.width / scale, extent.height / scale) for extent in extents]
    for text in texts:
        text.remove()
    for index, (x, y), box in zip(points, pixels, place_beside(pixels, sizes, area), strict=True):
        axes.annotate(
            labels[index], points[index], (box.left - x, box.bottom - y), textcoords="offset points",
            color=series_colour(index), fontsize=FONT, va="bottom", ha="left",
        )  # fmt: skip


def series_colour(index: int) -> str:
    """Colour of the run at place ``index`` of the report."""
    return SERIES[index % len(SERIES)]


def series_dash(index: int) -> str:
    """Line style of the run at place ``index``; it changes each time the colours are used up."""
    return DASHES[index // len(SERIES) % len(DASHES)]
