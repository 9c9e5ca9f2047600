"""Heat maps of a report: similarity of layers, and a probe's weights over layers."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.report.figures import FONT, SMALL, WIDTH, Picture, axes_grid
from experiments.report.runs import Pair
from experiments.report.theme import ANCESTORS, GRID, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISONS = {
    "cka": "student layers (linear CKA)",
    "cosine": "student layers (cosine)",
    "cka_teacher": "student and teacher (linear CKA)",
}
SCALE_NOTE = (
    "Layer 1 is at the lower left. All maps have the scale of the colour bar, which goes from the lowest value of the "
    "trained students to the highest."
)


def similarity(pairs: Sequence[Pair], key: str, width: float = WIDTH) -> Picture | None:
    """Draw two heat maps per line on one scale; a coloured strip shows each layer's ancestor.

    Args:
        pairs: the runs.
        key: a key of ``COMPARISONS``.
        width: of the figure, in inches.
    """
    name = COMPARISONS[key]
    shown = [(run, log, np.array(run.similarity[name], dtype=float)) for run, log in pairs if name in run.similarity]
    if not shown:
        return None
    titles = [wrapped(run.label, width) for run, _, _ in shown]
    figure, cells = map_grid([matrix.shape for _, _, matrix in shown], width, titles)
    trained = [matrix for _, log, matrix in shown if (log.steps or 0) > 1]
    scale = colour_scale(trained or [matrix for _, _, matrix in shown])
    for (_, log, matrix), title, axes in zip(shown, titles, cells, strict=True):
        image = heat_map(axes, matrix, scale, log.growth[-1].ancestry if log.growth else ())
        axes.set_title(title, fontsize=SMALL, color=INK, pad=4)
    colour_bar(figure, image, cells, scale)
    figure.supylabel("student layer", fontsize=FONT, color=MUTED)
    figure.supxlabel("teacher layer" if key == "cka_teacher" else "student layer", fontsize=FONT, color=MUTED)
    caption = (
        f"Similarity of layers, mean over seeds. {SCALE_NOTE} The strip on the left colours each student layer by the "
        "layer of the first stage that it descends from (grey: a fresh layer)."
    )
    return Picture(f"similarity_{key}", f"Layer similarity: {name}", caption, figure)


def wrapped(label: str, width: float) -> str:
    """Break a title of a map into lines that fit above half of a figure of ``width`` inches."""
    return textwrap.fill(label, int(72 * (width - 1.4) / 2 / (0.56 * SMALL)), break_long_words=False)


def map_grid(shapes: Sequence[tuple[int, ...]], width: float, titles: Sequence[str]) -> tuple["Figure", list["Axes"]]:
    """Make a figure of two maps a line, of which each is as high as its matrix needs."""
    columns = min(len(shapes), 2)
    lines = -(-len(shapes) // columns)
    cell = min((width - 1.6) / columns, 2.4)  # beside it are tick labels, strips and the colour bar
    tallest = min(max(rows / across for rows, across in shapes), 1.4) * cell
    longest = max(title.count("\n") + 1 for title in titles)
    figure, grid = axes_grid(lines, columns, size=(width, lines * (tallest + 0.32 + 0.14 * longest) + 0.3))
    cells = [axes for line in grid for axes in line]
    for axes in cells[len(shapes) :]:
        axes.set_axis_off()
    return figure, cells[: len(shapes)]


def colour_scale(matrices: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Find the lowest and highest value of all maps of a figure, which are at least 0.01 apart.

    The scale of a figure has these ends, because layers of a trained student are so alike that all of them have one
    colour on a scale from 0 to 1. A narrower scale than 0.01 would make noise look like a pattern.
    """
    values = np.concatenate([np.ravel(matrix) for matrix in matrices])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return min(low, high - 0.01), high


def layer_weights(pairs: Sequence[Pair], width: float = WIDTH) -> Picture | None:
    """Draw the weights of the probe over the hidden states, one row per run."""
    shown = [(run.label, run.layer_weights) for run, _ in pairs if run.layer_weights]
    if not shown:
        return None
    longest = max(len(weights) for _, weights in shown)
    matrix = np.full((len(shown), longest), np.nan)
    for row, (_, weights) in enumerate(shown):
        matrix[row, : len(weights)] = weights
    labels = [textwrap.fill(label, int(72 * width / 3 / (0.56 * SMALL)), break_long_words=False) for label, _ in shown]
    height = 0.9 + sum(0.14 + 0.16 * (label.count("\n") + 1) for label in labels)
    figure, ((axes,),) = axes_grid(1, 1, size=(width, height))
    axes.spines[:].set_visible(False)
    image = axes.imshow(matrix, cmap="cividis", vmin=0, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(shown)), labels)
    axes.set_xticks(range(0, longest, 2 if longest > 8 else 1))
    axes.set_xlabel("hidden state (0 = input of layer 1)")
    axes.tick_params(length=0, labelsize=SMALL)
    colour_bar(figure, image, [axes], (0.0, float(np.nanmax(matrix))))
    caption = "Weights of the head over the hidden states of each frozen student; every row sums to 1."
    return Picture("layer_weights", "Which layers are read", caption, figure)


def colour_bar(figure: "Figure", image: Any, cells: Sequence["Axes"], scale: tuple[float, float]) -> None:
    """Draw one colour bar for all maps of a figure, with its ends and plain numbers between them."""
    low, high = scale
    bar = figure.colorbar(image, ax=list(cells), shrink=0.7 if len(cells) > 1 else 1.0, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    ticks = np.linspace(low, high, 6)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.{2 if high - low > 0.05 else 3}f}" for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL, colors=MUTED, length=0)


def heat_map(
    axes: "Axes", matrix: NDArray[np.float64], scale: tuple[float, float], ancestry: Sequence[int | None] = ()
) -> Any:
    """Draw one matrix, first layer at the bottom; the strip needs an ancestry with one entry per row."""
    image = axes.imshow(
        matrix, cmap="cividis", vmin=scale[0], vmax=scale[1], origin="lower", interpolation="none", aspect="auto"
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    rows, columns = matrix.shape
    axes.set_box_aspect(rows / columns)
    axes.set_xticks(_layer_ticks(columns), [str(tick + 1) for tick in _layer_ticks(columns)])
    axes.set_yticks(_layer_ticks(rows), [str(tick + 1) for tick in _layer_ticks(rows)])
    axes.tick_params(labelsize=SMALL, length=0)
    if len(ancestry) == rows:
        for layer, ancestor in enumerate(ancestry):
            colour = GRID if ancestor is None else ANCESTORS[ancestor % len(ANCESTORS)]
            axes.add_patch(_rectangle((-0.5 - 0.08 * columns, layer - 0.5), 0.05 * columns, 1, colour))
        axes.tick_params(axis="y", pad=14)
    return image


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor=PAPER, linewidth=0.4, clip_on=False)


def _layer_ticks(layers: int) -> list[int]:
    """Choose the 0-based layers to label: every fourth, or all of up to six."""
    return list(range(layers)) if layers <= 6 else list(range(3, layers, 4))
