"""Pictures of ``interstack similarity``: layer similarity by stage, copies against other pairs, depth use, exits."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis.depth_use import change
from experiments.report.figures import (
    FONT,
    SMALL,
    WIDTH,
    Picture,
    axes_grid,
    legend_below,
    require_matplotlib,
    single_axes,
)
from experiments.report.heat_maps import SCALE_NOTE, colour_bar, colour_scale, heat_map, map_grid, wrapped
from experiments.report.looks import Look, looks_of
from experiments.report.theme import GRID, INK, MUTED

Run = dict[str, Any]  # {"name": ..., "stages": [fields of experiments.analysis.similarity.Stage]}


def stages_picture(runs: Sequence[Run]) -> Picture:
    """Draw CKA between the student's layers at the end of every stage."""
    require_matplotlib()
    panels = [(run, stage, np.array(stage["cka"], dtype=float)) for run in runs for stage in run["stages"]]
    titles = [
        wrapped(f"{stage['depth']} layers" if len(runs) == 1 else f"{run['name']}: {stage['depth']} layers", WIDTH)
        for run, stage, _ in panels
    ]
    figure, cells = map_grid([matrix.shape for _, _, matrix in panels], WIDTH, titles)
    scale = colour_scale([matrix for _, _, matrix in panels])
    image: Any = None
    for (_, stage, matrix), title, axes in zip(panels, titles, cells, strict=True):
        first = range(len({ancestor for ancestor in stage["ancestry"] if ancestor is not None}))
        image = heat_map(axes, matrix, scale, stage["ancestry"] if stage["depth"] > len(first) else ())
        axes.set_title(title, fontsize=SMALL, color=INK, pad=4)
    colour_bar(figure, image, cells, scale)
    caption = (
        f"Linear CKA between the student's layers at the end of each stage. {SCALE_NOTE} The strip on the left colours "
        "each layer by the layer of the first stage that it descends from."
    )
    return Picture("stages", "Layer similarity, stage by stage", caption, figure)


def copies_picture(
    runs: Sequence[Run], looks: Mapping[str, Look] | None = None, width: float = WIDTH
) -> Picture | None:
    """Draw mean CKA of copies and of other pairs against depth; ``looks`` by name, default: those that names give."""
    shown = [run for run in runs if any(stage["copies"] is not None for stage in run["stages"])]
    if not shown:
        return None
    looks = looks or looks_of(runs)
    figure, axes = single_axes(3.0, width)
    for run in shown:
        look = looks[run["name"]]
        for key, style in (("copies", {"linestyle": "-"}), ("others", {"linestyle": ":"})):
            points = [(stage["depth"], stage[key]) for stage in run["stages"] if stage[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **look.lines() | look.marks() | style)
    axes.set_xticks(sorted({stage["depth"] for run in shown for stage in run["stages"]}))
    axes.set_xlabel("depth at the end of the stage")
    axes.set_title("mean CKA", loc="left", fontsize=FONT, color=MUTED)
    legend_below(figure, {run["name"]: looks[run["name"]] for run in shown}, lines=False)
    caption = (
        "Mean linear CKA over pairs of layers that descend from one first-stage layer (solid) and over all other pairs "
        "(dotted). Copies that stay near their originals keep the solid line at the top. Layers near each other are "
        "alike without being copies, and an interleaving policy puts copies side by side, so solid lines of different "
        "policies do not compare; experiments.analysis.copies compares layers at equal distance."
    )
    return Picture("copies", "Do copies stay near their originals?", caption, figure)


def depth_use_picture(runs: Sequence[Run], width: float = WIDTH) -> Picture | None:
    """Draw the relative change of the output loss at the last stage with a layer skipped, or swapped with the next."""
    shown = [run for run in runs if run["stages"][-1]["depth_use"]]
    if not shown:
        return None
    figure, grid = axes_grid(len(shown), 1, size=(width, 0.4 + 1.6 * len(shown)))
    for run, (axes,) in zip(shown, grid, strict=True):
        use = run["stages"][-1]["depth_use"]
        # Greys, because the colours stand for systems.
        for key, offset, colour in (("skipped", 0.0, INK), ("swapped", 0.5, GRID)):
            places = np.arange(1, len(use[key]) + 1) + offset
            axes.bar(places, change(use[key], use), width=0.42, color=colour, edgecolor=INK, linewidth=0.6,
                     label=f"layer {key}" if not offset else "pair swapped")  # fmt: skip
        axes.margins(y=0.25)  # room for the legend
        axes.axhline(0, color=GRID, linewidth=1)
        axes.spines[:].set_visible(False)
        axes.set_xticks(range(1, len(use["skipped"]) + 1))
        axes.ticklabel_format(axis="y", useOffset=False)
        title = textwrap.fill(run["name"], int(72 * width / (0.6 * FONT)), break_long_words=False)
        axes.set_title(title, loc="left", fontsize=FONT, color=MUTED)
    figure.supylabel("change of the output loss (%)", fontsize=FONT, color=MUTED)
    grid[-1][0].set_xlabel("layer")
    grid[0][0].legend(fontsize=SMALL, frameon=False, labelcolor=MUTED, ncols=2, loc="upper left")
    caption = (
        "Change of the output loss without a layer, and with two neighbours swapped, whose bar stands between theirs; "
        "near 0: it does not matter."
    )
    return Picture("depth_use", "What each layer contributes", caption, figure)


def exits_picture(runs: Sequence[Run], looks: Mapping[str, Look] | None = None, width: float = WIDTH) -> Picture | None:
    """Draw the relative change of the output loss at the last stage after the first N layers, against N.

    Results of earlier versions have no such losses. ``looks`` by name, default: those that names give.
    """
    shown = [run for run in runs if (run["stages"][-1]["depth_use"] or {}).get("exits")]
    if not shown:
        return None
    looks = looks or looks_of(runs)
    figure, axes = single_axes(3.0, width)
    for run in shown:
        use, look = run["stages"][-1]["depth_use"], looks[run["name"]]
        axes.plot(range(1, len(use["exits"]) + 1), change(use["exits"], use), **look.lines() | look.marks())
    axes.set_xticks(range(1, max(len(run["stages"][-1]["depth_use"]["exits"]) for run in shown) + 1))
    axes.set_xlabel("layers kept")
    axes.set_title("change of the output loss (%)", loc="left", fontsize=FONT, color=MUTED)
    legend_below(figure, {run["name"]: looks[run["name"]] for run in shown})
    caption = (
        "Change of the output loss when the student ends after its first N layers, through the projection that was "
        "trained on the last one's output."
    )
    return Picture("exits", "Which layers does the output need?", caption, figure)
