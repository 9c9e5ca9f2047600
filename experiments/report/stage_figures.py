"""Pictures of ``interstack similarity``: layer similarity by stage, copies against other pairs, depth use."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report.figures import (
    FONT,
    MARKERS,
    MOST_MARGIN_LABELS,
    WIDTH,
    Picture,
    axes_grid,
    label_ends,
    require_matplotlib,
    series_colour,
    single_axes,
)
from experiments.report.heat_maps import colour_bar, heat_map
from experiments.report.theme import GRID, INK, MUTED, SERIES

Run = dict[str, Any]  # {"name": ..., "stages": [fields of experiments.analysis.similarity.Stage]}
STAGES_TO_A_LINE = 2  # so that numbers stay legible on a phone


def stages_picture(runs: Sequence[Run]) -> Picture:
    """Draw CKA between the student's layers at the end of every stage."""
    require_matplotlib()
    panels = [(run, stage) for run in runs for stage in run["stages"]]
    columns = min(STAGES_TO_A_LINE, len(panels))
    figure, grid = axes_grid(-(-len(panels) // columns), columns, cell=WIDTH / 2 - 0.45)
    image: Any = None
    low = min(float(np.nanmin(np.array(stage["cka"], dtype=float))) for _, stage in panels)
    low = min(low, 0.99)  # a narrower scale would make noise look like a pattern
    for place, axes in enumerate(axes for line in grid for axes in line):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        run, stage = panels[place]
        first = range(len({ancestor for ancestor in stage["ancestry"] if ancestor is not None}))
        grown = stage["ancestry"] if stage["depth"] > len(first) else ()
        image = heat_map(axes, np.array(stage["cka"], dtype=float), low, grown)
        title = f"{stage['depth']} layers" if len(runs) == 1 else f"{_short(run['name'])}: {stage['depth']}"
        axes.set_title(title, fontsize=FONT - 1, color=INK, pad=4)
    colour_bar(figure, image, grid)
    caption = (
        "Linear CKA between the student's layers at the end of each stage, layer 1 at the lower left. The strip on the "
        "left colours each layer by the layer of the first stage that it descends from. "
        "The colour scale starts at the lowest value seen, not at 0."
    )
    return Picture("stages", "Layer similarity, stage by stage", caption, figure)


def copies_picture(runs: Sequence[Run]) -> Picture | None:
    """Draw mean CKA of copies and of other pairs against depth."""
    # Colours go by the place among all runs, as in the other pictures.
    shown = {n: run for n, run in enumerate(runs) if any(stage["copies"] is not None for stage in run["stages"])}
    if not shown:
        return None
    figure, axes = single_axes(max(3.0, 0.5 * len(shown)))
    ends: dict[int, tuple[float, float]] = {}
    for index, run in shown.items():
        style: Any = {"marker": MARKERS[index % len(MARKERS)], "color": series_colour(index)}
        for key, dash in (("copies", "-"), ("others", ":")):
            points = [(stage["depth"], stage[key]) for stage in run["stages"] if stage[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), dash, **style)
            if points and key == "copies":
                ends[index] = points[-1]
    axes.set_xticks(sorted({stage["depth"] for run in shown.values() for stage in run["stages"]}))
    axes.set_xlabel("depth at the end of the stage")
    axes.set_title("mean CKA", loc="left", fontsize=FONT, color=MUTED)
    label_ends(
        figure, axes, ends, [run["name"] if len(shown) > MOST_MARGIN_LABELS else _short(run["name"]) for run in runs]
    )
    caption = (
        "Mean linear CKA over pairs of layers that descend from one first-stage layer (solid) and over all other pairs "
        "(dotted). Copies that stay near their originals keep the solid line at the top."
    )
    return Picture("copies", "Do copies stay near their originals?", caption, figure)


def _short(name: str, longest: int = 16) -> str:
    return name if len(name) <= longest else name[: longest - 3] + "..."


def depth_use_picture(runs: Sequence[Run]) -> Picture | None:
    """Draw the relative change of the output loss at the last stage with a layer skipped, or swapped with the next."""
    shown = [run for run in runs if run["stages"][-1]["depth_use"]]
    if not shown:
        return None
    figure, grid = axes_grid(len(shown), 1, size=(WIDTH, 0.4 + 2.1 * len(shown)))
    for run, (axes,) in zip(shown, grid, strict=True):
        use = run["stages"][-1]["depth_use"]
        for key, offset, colour in (("skipped", 0.0, SERIES[0]), ("swapped", 0.5, SERIES[1])):
            places = np.arange(1, len(use[key]) + 1) + offset
            change = 100 * (np.array(use[key], dtype=float) / use["loss"] - 1)
            axes.bar(places, change, width=0.42, color=colour, label=f"layer {key}" if not offset else "pair swapped")
        axes.margins(y=0.25)  # room for the legend
        axes.axhline(0, color=GRID, linewidth=1)
        axes.spines[:].set_visible(False)
        axes.set_xticks(range(1, len(use["skipped"]) + 1))
        axes.set_title(f"{run['name']}: output loss, change in %", loc="left", fontsize=FONT, color=MUTED)
    grid[-1][0].set_xlabel("layer (a swapped pair stands between its two)")
    grid[0][0].legend(fontsize=FONT - 1, frameon=False, labelcolor=MUTED, ncols=2, loc="upper left")
    caption = "Change of the output loss without a layer, and with two neighbours swapped; near 0: it does not matter."
    return Picture("depth_use", "What each layer contributes", caption, figure)
