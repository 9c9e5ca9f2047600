"""Heat maps of a report: similarity of layers, and a probe's weights over layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.report.figures import FONT, WIDTH, Picture, axes_grid, single_axes
from experiments.report.runs import Pair
from experiments.report.theme import ANCESTORS, GRID, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def similarity(pairs: Sequence[Pair]) -> Picture | None:
    """Draw two heat maps per line, comparison by comparison; a coloured strip shows each layer's ancestor."""
    shown = [pair for pair in pairs if pair[0].similarity]
    if not shown:
        return None
    names = list(dict.fromkeys(name for run, _ in shown for name in run.similarity))
    columns = min(len(shown), 2)  # so that numbers stay legible on a phone
    bands = -(-len(shown) // columns)
    figure, grid = axes_grid(len(names) * bands, columns, cell=WIDTH / 2 - 0.45)
    values = [np.ravel(matrix) for run, _ in shown for matrix in run.similarity.values()]
    low = float(np.fmin.reduce(np.concatenate(values), initial=0.0))
    image: Any = None
    for row in range(len(names) * bands):
        for column in range(columns):
            place = row % bands * columns + column
            axes = grid[row][column]
            matrix = shown[place][0].similarity.get(names[row // bands]) if place < len(shown) else None
            if matrix is None:
                axes.set_axis_off()
                continue
            growth = shown[place][1].growth
            image = heat_map(axes, np.array(matrix, dtype=float), low, growth[-1].ancestry if growth else ())
            axes.set_title(shown[place][0].label, fontsize=FONT - 1, color=INK, pad=4)
            if column == 0:
                axes.set_ylabel(names[row // bands], fontsize=FONT - 1, color=INK)
    colour_bar(figure, image, grid)
    caption = (
        "Similarity of layers, layer 1 at the lower left; rows are the student's layers. "
        "The strip on the left colours each student layer by the layer of the first stage that it descends "
        "from (grey: a fresh layer)."
    )
    return Picture("similarity", "Layer similarity", caption, figure)


def layer_weights(pairs: Sequence[Pair]) -> Picture | None:
    """Draw the weights of the probe over the hidden states, one row per run."""
    shown = [(run.label, run.layer_weights) for run, _ in pairs if run.layer_weights]
    if not shown:
        return None
    longest = max(len(weights) for _, weights in shown)
    matrix = np.full((len(shown), longest), np.nan)
    for row, (_, weights) in enumerate(shown):
        matrix[row, : len(weights)] = weights
    figure, axes = single_axes(0.9 + 0.32 * len(shown))
    axes.grid(False)
    image = axes.imshow(matrix, cmap="cividis", vmin=0, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(shown)), [label for label, _ in shown])
    axes.set_xticks(range(longest))
    axes.set_xlabel("hidden state (0 = input of the first layer)")
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, aspect=10, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT - 2, colors=MUTED, length=0)
    caption = "Weights of the head over the hidden states of each frozen student; every row sums to 1."
    return Picture("layer_weights", "Which layers are read", caption, figure)


def colour_bar(figure: "Figure", image: Any, grid: Sequence[Sequence["Axes"]]) -> None:
    """Draw one colour bar for all axes of a grid of heat maps."""
    bar = figure.colorbar(image, ax=[axes for line in grid for axes in line], shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT - 2, colors=MUTED, length=0)


def heat_map(axes: "Axes", matrix: NDArray[np.float64], low: float, ancestry: Sequence[int | None] = ()) -> Any:
    """Draw one matrix, first layer at the bottom; the strip needs an ancestry with one entry per row."""
    image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=1, origin="lower", interpolation="none", aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    rows, columns = matrix.shape
    axes.set_box_aspect(rows / columns)
    axes.set_xticks(_layer_ticks(columns), [str(tick + 1) for tick in _layer_ticks(columns)])
    axes.set_yticks(_layer_ticks(rows), [str(tick + 1) for tick in _layer_ticks(rows)])
    axes.tick_params(labelsize=FONT - 2, length=0)
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
    """Choose the 0-based layers to label: every fourth, or all of up to four."""
    return list(range(layers)) if layers <= 4 else list(range(3, layers, 4))
