"""Pictures of a report: curves of runs.

Every function takes runs and returns a `Picture`, or None if there is nothing to draw.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.records.reading import RunLog
from experiments.report.figures import FONT, WIDTH, Picture, legend_below, log_scale, single_axes
from experiments.report.numbers import PREFIXES, unit_for
from experiments.report.runs import Pair
from experiments.report.theme import MUTED

Cost = Callable[[Sequence[int] | NDArray[np.int64]], NDArray[np.float64]]
Stages = list[tuple[NDArray[np.float64], NDArray[np.float64]]]

GRID_POINTS = 400  # of a mean curve
# Axis -> its units, words of the caption, and the end of the heading.
AXES = {
    "time": (
        tuple((size, f"training time ({unit})") for size, unit in ((1.0, "s"), (60.0, "min"), (3600.0, "h"))),
        "training time without validation and checkpoints",
        "training time",
    ),
    "steps": (
        ((1.0, "optimizer steps"), (1000.0, "optimizer steps (thousands)")),
        "optimizer steps",
        "optimizer steps",
    ),
    "flops": (
        tuple((size, f"training compute ({prefix}FLOP)") for size, prefix in PREFIXES),
        "floating-point operations (FLOP) of training by formula, of the student and of a teacher that runs in the "
        "step (cached targets cost nothing)",
        "FLOPs",
    ),
}


def loss_curves(rows: Sequence[Sequence[Pair]], axis: str, width: float = WIDTH) -> Picture | None:
    """Draw the smoothed output loss of training batches against a cost on a log scale, with marks at growths.

    Args:
        rows: for each row the runs of its seeds.
        axis: a key of ``AXES``.
        width: of the figure, in inches.
    """
    curves = [(runs, found) for runs in rows if (found := _mean_curve(runs, axis))]
    if not curves:
        return None
    figure, axes = single_axes(3.3, width)
    units, words, heading = AXES[axis]
    size, label = unit_for(max(float(costs[-1]) for _, (costs, _, _) in curves), units)
    for place, (runs, (costs, losses, _)) in enumerate(curves):
        run, mean = runs[0][0], losses.mean(axis=0)
        every = (0.02 + 0.14 * place / len(curves), 0.16)  # so that markers of curves near each other do not meet
        axes.plot(costs / size, mean, markevery=every, label=run.label, **run.look.lines() | run.look.marks(4.5))
        if len(losses) > 1:
            band: Any = {"color": run.look.colour, "alpha": 0.16, "linewidth": 0}
            axes.fill_between(costs / size, losses.min(axis=0), losses.max(axis=0), **band)
    later = np.concatenate([losses[:, GRID_POINTS // 50 :].ravel() for _, (_, losses, _) in curves])
    log_scale(axes, later)
    axes.set_ylim(0.97 * later.min(), 1.03 * later.max())
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_title("output loss", loc="left", fontsize=FONT, color=MUTED)
    grown = [(runs[0][0].look.colour, growths / size) for runs, (_, _, growths) in curves if len(growths)]
    for colour, places in _growth_marks(grown, axes.get_xlim()[1]):
        axes.plot(places, [0.0] * len(places), "^", color=colour, ms=6, clip_on=False, zorder=4, gid="growth",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    legend_below(figure, {runs[0][0].label: runs[0][0].look for runs, _ in curves})
    caption = (
        f"Output loss on the training batches (running mean, log scale) against {words}. The axis leaves out the steep "
        "start, the first 2 % of each run."
    )
    if grown:
        caption += " Triangles on the axis mark growths; grey ones are those of several rows."
    if any(len(losses) > 1 for _, (_, losses, _) in curves):
        caption += " A line is the mean over seeds, and its band goes from the lowest seed to the highest."
    return Picture(f"loss_vs_{axis}", f"Loss against {heading}", caption, figure)


def _mean_curve(
    runs: Sequence[Pair], axis: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Compute costs (P,), losses (seeds, P) and costs of the growths, means over seeds at equal shares of the run.

    None if no run has a loss and a cost at more than one step.
    """
    costs, losses, growths = [], [], []
    for pair in runs:
        cost = _cost(pair, axis)
        stages = loss_stages(pair[1], _steps) if np.isfinite(cost([0])).all() else []
        if stages and stages[-1][0][-1] > stages[0][0][0]:
            steps, loss = (np.concatenate(parts) for parts in zip(*stages, strict=True))
            shares = np.rint(np.linspace(steps[0], steps[-1], GRID_POINTS)).astype(np.int64)
            costs.append(cost(shares))
            losses.append(np.interp(shares, steps, loss))
            growths.append(cost([mark.step for mark in pair[1].growth]))
    if not costs:
        return None
    marks = np.mean([each for each in growths if len(each) == len(growths[0])], axis=0)
    return np.mean(costs, axis=0), np.array(losses), marks


def _growth_marks(
    grown: Sequence[tuple[str, NDArray[np.float64]]], right: float
) -> list[tuple[str, NDArray[np.float64]]]:
    """Merge the marks of rows that grow at the same places into grey ones; places a hundredth apart are the same."""
    merged: dict[tuple[float, ...], list[tuple[str, NDArray[np.float64]]]] = {}
    for colour, places in grown:
        merged.setdefault(tuple(np.round(100 * places / right)), []).append((colour, places))
    return [(same[0][0] if len(same) == 1 else MUTED, same[0][1]) for same in merged.values()]


def _cost(pair: Pair, axis: str) -> Cost:
    run, log = pair
    if axis == "steps":
        return _steps
    return (lambda steps: log.flops_at(steps, run.flops_by_stage)) if axis == "flops" else log.seconds_at


def _steps(steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(steps, np.float64)


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


def depth_vs_step(pairs: Sequence[Pair], width: float = WIDTH) -> Picture | None:
    """Draw depth against steps; lines of the same depth are shifted so that each can be seen."""
    known = [(run, log) for run, log in pairs if log.depth_profile() and (log.steps or 0) > 1]
    if not known:
        return None
    figure, axes = single_axes(2.9, width)
    size, label = unit_for(max(log.steps or 0 for _, log in known), AXES["steps"][0])
    for place, (run, log) in enumerate(known):
        shift = min(0.2, 1.2 / len(known)) * (place - (len(known) - 1) / 2)
        profile = log.depth_profile()
        steps = np.array([start for start, _ in profile] + [log.steps or 0]) / size
        depths = np.array([depth for _, depth in profile] + [profile[-1][1]]) + shift
        axes.step(steps, depths, where="post", **run.look.lines())
        axes.plot(steps[-1:], depths[-1:], clip_on=False, **run.look.marks())
    depths_seen = {depth for _, log in known for _, depth in log.depth_profile()}
    axes.set_yticks(sorted(depths_seen))
    axes.set_ylim(0, max(depths_seen) + 1)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_title("student depth (layers)", loc="left", fontsize=FONT, color=MUTED)
    legend_below(figure, {run.label: run.look for run, _ in known})
    caption = "Layers of the student against optimizer steps. Lines of the same depth are drawn side by side."
    return Picture("depth_vs_step", "Depth against step", caption, figure)
