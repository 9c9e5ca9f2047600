"""Pictures of quality against speed-up: one per measure, and all of a study on one page with published points."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from experiments.report.figures import FONT, SMALL, WIDTH, Picture, axes_grid, legend_below, light_grid, single_axes
from experiments.report.looks import Look, look_of
from experiments.report.study_tables import column, numbers
from experiments.report.theme import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = Mapping[str, Look]
Point = tuple[list[float], list[float], list[float]]
"""Qualities, measured and ideal speed-ups of a row, over seeds."""
IDEAL = (
    "An upright bar is the ideal speed-up of a row: the training FLOPs of its baseline over its own, by formula, of "
    "the student and of a teacher that runs in the step (cached targets cost nothing). A thin line joins it to the "
    "measured point. If some row has no measured speed-up that compares, none is shown: the points stand at their "
    "ideal speed-ups, without bars, and those of one speed-up side by side. Dotted: the ideal front, which is the best "
    "quality of any row at that ideal speed-up or more, among rows with the most seeds."
)
PUBLISHED = "A ring marks a value published by the paper (960 h of LibriSpeech, HuBERT Base), not measured here."
RING = "published by the paper"


def speed_quality(report: Mapping[str, Any], key: str, looks: Looks, width: float = WIDTH) -> Picture | None:
    """Draw one point per row, speed-up over the baseline against a metric; whiskers are the spread over seeds."""
    if not _points(report, key):
        return None
    figure, axes = single_axes(3.4, width)
    shown = _panel(axes, report, key, looks)
    legend_below(figure, shown, lines=False)
    name = f"speed_quality_{key.replace('/', '_').replace('@', '_')}"
    return Picture(name, f"Speed and quality: {column(key).title}", _caption(report, [key], shown), figure)


def summary(report: Mapping[str, Any], looks: Looks, width: float = WIDTH) -> Picture | None:
    """Draw all metrics of a study against speed-up on one page.

    Published values of a metric stand in its panel. If the study shares no metric with them they have a panel of their
    own, the last. None if there would be only one panel, which `speed_quality` draws.
    """
    own = [key for key in report["columns"] if "/" in key and _points(report, key)]
    published = list(dict.fromkeys(key for row in _published(report) for key in row["values"] if "/" in key))
    keys = own if set(own) & set(published) else own + published[:1]
    if not own or len(keys) < 2:
        return None
    columns = 2 if width >= WIDTH else 1
    lines = -(-len(keys) // columns)
    figure, grid = axes_grid(lines, columns, size=(width, (0.5 + columns) * lines))
    shown: dict[str, Look] = {}
    for place, axes in enumerate(axes for line in grid for axes in line):
        if place < len(keys):
            light_grid(axes)
            shown |= _panel(axes, report, keys[place], looks, shown)
            if keys[place] not in own:
                _title(axes, f"{column(keys[place]).title} (published)")
        else:
            axes.set_axis_off()
    legend_below(figure, _ring_last(shown), lines=False)
    caption = _caption(report, keys, shown)
    if keys[-1] not in own:
        caption += f" The last panel, {column(keys[-1]).title}, is another measure than those of this study."
    return Picture("summary", "Speed and quality on one page", caption, figure)


def _caption(report: Mapping[str, Any], keys: Sequence[str], shown: Looks) -> str:
    better = " and ".join(
        f"{way} is better for {', '.join(column(key).title.removesuffix(', %') for key in found)}"
        for way, low in (("further down", True), ("further up", False))
        if (found := [key for key in keys if (column(key).better == "low") == low])
    )
    baseline = next((row["label"] for row in report["rows"] if row["name"] == report["baseline"]), "the baseline row")
    start = f"Quality against the speed-up of training over {baseline}, means over seeds: {better}; right is faster. "
    ring = f" {PUBLISHED}" if RING in shown else ""
    return f"{start}Whiskers are one standard deviation over seeds; a point without has one seed. {IDEAL}{ring}"


def _points(report: Mapping[str, Any], key: str) -> dict[str, Point]:
    """Collect qualities, measured speed-ups and ideal speed-ups over seeds, by the label of a row that has both."""
    found: dict[str, Point] = {}
    for row in report["rows"]:
        values = report["values"][row["name"]]
        quality, speed, ratio = (
            list(numbers(values.get(name, {})).values()) for name in (key, "speed_up", "flops_ratio")
        )
        if quality and (speed or ratio) and row["name"] not in report["untrained"]:
            found[row["label"]] = quality, speed, [1 / each for each in ratio]
    if all(ideal for _, _, ideal in found.values()) and not all(speed for _, speed, _ in found.values()):
        return {label: (quality, [], ideal) for label, (quality, _, ideal) in found.items()}
    return found


def _shifts(points: Mapping[str, Point]) -> dict[str, float]:
    """Shift rows of one ideal speed-up, which have no other, apart by a small part of the picture's width."""
    places = {label: round(statistics.fmean(ideal), 3) for label, (_, speed, ideal) in points.items() if not speed}
    step = 0.03 * (max(places.values(), default=0.0) - min(places.values(), default=0.0))
    shifts = dict.fromkeys(points, 0.0)
    for label, place in places.items():
        same = [other for other in places if places[other] == place]
        shifts[label] = step * (same.index(label) - (len(same) - 1) / 2)
    return shifts


def _published(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["references"] if "speed_up" in row["values"]]


def _panel(
    axes: "Axes", report: Mapping[str, Any], key: str, looks: Looks, known: Looks | None = None
) -> dict[str, Look]:
    """Draw the measured and published points of a metric; return label -> look of what is shown.

    A published row that looks like one of ``known``, the rows of earlier panels, is not named again.
    """
    from matplotlib.ticker import MaxNLocator

    shown = dict(known or {})
    ideals = []
    points = _points(report, key)
    seeds = max((len(quality) for quality, _, _ in points.values()), default=0)
    by_flops = points and not any(speeds for _, speeds, _ in points.values())
    axes.set_xlabel("ideal speed-up, by FLOPs" if by_flops else "speed-up")
    shifts = _shifts(points)
    for label, (quality, speeds, ideal) in points.items():
        look, y = looks[label], statistics.fmean(quality)
        shown[label] = look
        whisker: dict[str, Any] = {"color": look.colour, "elinewidth": 1, "yerr": _spread(quality), "zorder": 2.5}
        if ideal:
            x = statistics.fmean(ideal)
            ideals += [(x, y)] if len(quality) == seeds else []
            x += shifts[label]
            if speeds:
                axes.plot([x], [y], "|", color=look.colour, markersize=9, markeredgewidth=1.6)
                axes.plot([statistics.fmean(speeds), x], [y, y], color=look.colour, linewidth=0.6)
            else:
                axes.errorbar(x, y, **whisker)
                axes.plot([x], [y], linestyle="none", zorder=3, **look.marks(6))
        if speeds:
            axes.errorbar(statistics.fmean(speeds), y, xerr=_spread(speeds), **whisker)
            axes.plot([statistics.fmean(speeds)], [y], linestyle="none", zorder=3, **look.marks(7))
    low = column(key).better == "low"
    if front := ideal_front(ideals, low):
        axes.plot(*zip(*front, strict=True), ":", drawstyle="steps-pre", color=MUTED, linewidth=1.2, zorder=1.5)
    for row in _published(report):
        if key in row["values"]:
            shown |= _draw_published(axes, row, key, shown)
    axes.margins(0.12, 0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(useOffset=False)
    axes.tick_params(labelsize=SMALL)
    _title(axes, column(key).title)
    return _ring_last(shown)


def _title(axes: "Axes", text: str) -> None:
    """Write a title over a panel, in as many lines as its width needs."""
    place = axes.get_subplotspec()
    columns = 1 if place is None else place.get_gridspec().ncols
    inches = cast("Figure", axes.figure).get_figwidth() / columns - 0.5  # without the numbers beside it
    letters = int(72 * inches / (0.55 * FONT))
    wrapped = textwrap.fill(text, letters, break_long_words=False, break_on_hyphens=False)
    axes.set_title(wrapped, loc="left", fontsize=FONT, color=MUTED)


def _draw_published(axes: "Axes", row: Mapping[str, Any], key: str, shown: Looks) -> dict[str, Look]:
    """Draw a ringed point; return what the legend lacks."""
    label, schedule = row["label"], row.get("schedule")
    name = label.lower().replace(" ", "_").replace("-", "_")
    look = look_of({"name": name, "overrides": {"growth.schedule": schedule} if schedule else {}})
    place = [row["values"]["speed_up"]], [row["values"][key]]
    ring = Look(MUTED, "o", "none")
    axes.plot(*place, linestyle="none", **ring.marks(13) | {"markerfacecolor": "none", "markeredgewidth": 0.8})
    axes.plot(*place, linestyle="none", **look.marks(5))
    known = look in shown.values()
    return {RING: ring} if known else {f"{label}{f', {schedule}' if schedule else ''} (published)": look, RING: ring}


def _ring_last(shown: Looks) -> dict[str, Look]:
    return dict(sorted(shown.items(), key=lambda each: each[0] == RING))


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ideal_front(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """Select the points (speed-up, quality) that no other of at least their speed-up equals or beats, slowest first."""
    sign = 1 if lower_is_better else -1
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point[0], sign * point[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front[::-1]
