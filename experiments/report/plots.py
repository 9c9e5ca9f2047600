"""Pictures of a report: curves and points of runs.

Every function takes runs and returns a `Picture`, or None if there is nothing to draw.
Colour and marker follow a run's place in the report, so a system looks the same in every picture.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.records.reading import RunLog
from experiments.report.figures import (
    FONT,
    Picture,
    label_ends,
    log_scale,
    series_colour,
    series_dash,
    single_axes,
)
from experiments.report.runs import Pair
from experiments.report.theme import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cost = Callable[[Sequence[int] | NDArray[np.int64]], NDArray[np.float64]]
Stages = list[tuple[NDArray[np.float64], NDArray[np.float64]]]


AXES = {
    "time": ("training time (s)", "training time without validation and checkpoints"),
    "steps": ("optimizer step", "optimizer steps"),
    "flops": ("training FLOPs", "training FLOPs (teacher and student), by formula"),
}


def loss_curves(pairs: Sequence[Pair], axis: str, seeds: Sequence[Sequence[Pair]] = ()) -> Picture | None:
    """Draw the smoothed output loss of training batches against a cost on a log scale, with a line at each growth.

    Args:
        pairs: the runs.
        axis: a key of ``AXES``.
        seeds: for each of ``pairs``, runs of other seeds, which are drawn thin.
    """
    curves = {index: stages for index, pair in enumerate(pairs) if (stages := loss_stages(pair[1], _cost(pair, axis)))}
    if not curves:
        return None
    figure, axes = single_axes(3.5)
    for index, stages in curves.items():
        for pair in seeds[index] if seeds else ():
            _draw_stages(axes, index, loss_stages(pair[1], _cost(pair, axis)), linewidth=0.7, alpha=0.5)
        _draw_stages(axes, index, stages, linewidth=1.5)
    log_scale(axes, np.concatenate([loss for stages in curves.values() for _, loss in stages]))
    label, words = AXES[axis]
    axes.set_xlabel(label)
    axes.set_title("output loss", loc="left", fontsize=FONT, color=MUTED)
    ends = {index: (stages[-1][0][-1], stages[-1][1][-1]) for index, stages in curves.items()}
    label_ends(figure, axes, ends, [run.label for run, _ in pairs])
    caption = (
        f"Output loss on the training batches (running mean, log scale) against {words}. "
        "A vertical line marks a growth of the student."
    )
    if any(seeds):
        caption += " Thick: the lowest seed of a row; thin: its other seeds."
    heading = {"time": "training time", "steps": "optimizer steps", "flops": "FLOPs"}[axis]
    return Picture(f"loss_vs_{axis}", f"Loss against {heading}", caption, figure)


def _draw_stages(axes: "Axes", index: int, stages: Stages, **style: Any) -> None:
    """Draw a run, with a vertical line at each growth."""
    for cost, loss in stages:
        axes.plot(cost, loss, color=series_colour(index), linestyle=series_dash(index), **style)
    for (_, before), (start, after) in pairwise(stages):
        axes.plot([start[0], start[0]], [before[-1], after[0]], "|-", color=series_colour(index), ms=5, **style)


def _cost(pair: Pair, axis: str) -> Cost | None:
    run, log = pair
    if axis == "steps":
        return lambda steps: np.asarray(steps, np.float64)
    return (lambda steps: log.flops_at(steps, run.flops_by_stage)) if axis == "flops" else None


def loss_stages(log: RunLog, cost: Cost | None = None, points: int = 40) -> Stages:
    """Compute (cost, loss) of each stage with finite losses; a stage starts at its growth.

    The loss is a running mean over 2 / ``points`` of the run, taken within a stage, so that growths stay sharp.

    Args:
        log: the run.
        cost: function from optimizer steps to cost; default: training seconds.
        points: sets the window of the running mean, as above.
    """
    cost = cost or log.seconds_at
    logged = log.series("train/output")
    costs = cost(logged.steps)
    known = np.isfinite(logged.values) & np.isfinite(costs)
    steps, costs, loss = logged.steps[known], costs[known], logged.values[known]
    starts = [mark.step for mark in log.growth]
    stages = np.searchsorted(starts, steps)  # a growth comes after the step that it names
    found = []
    for stage in np.unique(stages):
        inside = stages == stage
        smooth = running_mean(loss[inside], max(1, len(loss) // points))
        start = cost([starts[stage - 1]]) if stage else costs[inside][:1]
        found.append((np.append(start, costs[inside]), np.append(smooth[:1], smooth)))
    return found


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Compute the mean over a window of 2 ``reach`` + 1 values, which is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def depth_vs_step(pairs: Sequence[Pair]) -> Picture | None:
    """Draw depth against steps; lines of the same depth are shifted so that each can be seen."""
    known = [index for index, (_, log) in enumerate(pairs) if log.depth_profile() and log.steps]
    if not known:
        return None
    figure, axes = single_axes(2.9)
    ends = {}
    for place, index in enumerate(known):
        log = pairs[index][1]
        shift = min(0.2, 1.2 / len(known)) * (place - (len(known) - 1) / 2)
        profile = log.depth_profile()
        steps = [start for start, _ in profile] + [log.steps or 0]
        depths = np.array([depth for _, depth in profile] + [profile[-1][1]]) + shift
        axes.step(steps, depths, where="post", lw=1.8, color=series_colour(index), linestyle=series_dash(index))
        ends[index] = (float(steps[-1]), float(depths[-1]))
    depths_seen = {depth for index in known for _, depth in pairs[index][1].depth_profile()}
    axes.set_yticks(sorted(depths_seen))
    axes.set_ylim(0, max(depths_seen) + 1)
    axes.set_xlabel("optimizer step")
    axes.set_title("student depth (layers)", loc="left", fontsize=FONT, color=MUTED)
    label_ends(figure, axes, ends, [run.label for run, _ in pairs])
    caption = "Layers of the student against optimizer steps. Lines of the same depth are drawn side by side."
    return Picture("depth_vs_step", "Depth against step", caption, figure)
