"""Pictures of a study: those of single runs for one run of each row, and those over several seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.records.reading import RunLog
from experiments.report.figures import (
    FONT,
    MARKERS,
    Picture,
    label_points,
    require_matplotlib,
    series_colour,
    single_axes,
)
from experiments.report.heat_maps import layer_weights, similarity
from experiments.report.plots import depth_vs_step, loss_curves
from experiments.report.policy_figure import Panel, Stage, draw_panels
from experiments.report.runs import Pair, ReportRun
from experiments.report.stage_figures import copies_picture, depth_use_picture
from experiments.report.study_reading import StudyFolder, StudyJob
from experiments.report.study_tables import column, numbers, task_title
from experiments.report.theme import MUTED, follow_theme
from lightning_modules.growth.event import GrowthEvent
from lightning_modules.growth.policies import kept_positions

COMPARISONS = {
    "cka": "student layers (linear CKA)",
    "cosine": "student layers (cosine)",
    "cka_teacher": "student and teacher (linear CKA)",
}


@dataclass(frozen=True)
class SvgDrawing:
    """A picture that was drawn as SVG in the light colours."""

    name: str
    heading: str
    caption: str
    text: str

    def svg(self) -> str:
        """Return the SVG with colours that follow the reader's theme."""
        return follow_theme(self.text)


def study_pairs(folder: StudyFolder) -> list[Pair]:
    """Choose one run of each row, that of the lowest seed with a run."""
    pairs = []
    for name, runs in _runs_by_row(folder):
        matrices = {title: mean for key, title in COMPARISONS.items() if (mean := _mean(folder, name, key))}
        run, log = runs[0]
        pairs.append((replace(run, similarity=matrices), log))
    return pairs


def other_seeds(folder: StudyFolder) -> list[list[Pair]]:
    """List the runs of the row's other seeds for each of `study_pairs`."""
    return [runs[1:] for _, runs in _runs_by_row(folder)]


def _runs_by_row(folder: StudyFolder) -> list[tuple[str, list[Pair]]]:
    """List the rows that have runs, each with its runs by seed."""
    found = []
    for row in folder.study["rows"]:
        jobs = [job for job in folder.of("distil", row["name"]) if job.seed in folder.study["seeds"]]
        logs = [(job, folder.run_log(job)) for job in jobs]
        found.append((row["name"], [_pair(job, log, row["label"]) for job, log in logs if log is not None]))
    return [(name, pairs) for name, pairs in found if pairs]


def _pair(job: StudyJob, log: RunLog, label: str) -> Pair:
    flops = tuple(job.result.get("flops_by_stage") or ())
    if not log.growth and not flops and job.result.get("flops"):
        flops = (job.result["flops"],)
    return ReportRun(label, flops_by_stage=flops), log


def _mean(folder: StudyFolder, row: str, key: str) -> list[list[float]]:
    """Average the similarity matrix over the seeds of a row; empty without any."""
    found = [job.result[key] for job in folder.of("similarity", row) if job.result.get(key)]
    return np.mean(np.array(found, dtype=float), axis=0).tolist() if found else []


def study_pictures(folder: StudyFolder, report: dict[str, Any]) -> list[Picture]:
    """Draw every picture that has data."""
    require_matplotlib()
    pairs, seeds, stages = study_pairs(folder), other_seeds(folder), stage_runs(folder)
    drawn = [
        *(loss_curves(pairs, axis, seeds) for axis in ("steps", "time", "flops")),
        depth_vs_step(pairs),
        *(speed_quality(report, key) for key in report["columns"] if "/" in key),
        *(_similarity(pairs, key) for key in COMPARISONS),
        copies_picture(stages),
        depth_use_picture(stages),
        *(_layer_weights(folder, pairs, task) for task in _tasks(folder)),
    ]
    one_seed = " One run of each row is shown, that of its lowest seed."
    several = len(report["seeds"]) > 1
    pictures = [picture for picture in drawn if picture is not None]
    single = ("depth_vs_step", "copies", "depth_use")
    return [
        replace(each, caption=each.caption + one_seed) if several and each.name in single else each for each in pictures
    ]


def stage_runs(folder: StudyFolder) -> list[dict[str, Any]]:
    """Collect the results of `interstack similarity` on each row's stages, for the lowest seed that has them."""
    found = []
    for row in folder.study["rows"]:
        results = [job.result for job in folder.of("similarity", row["name"]) if job.result.get("runs")]
        found += [results[0]["runs"][-1] | {"name": row["label"]}] if results else []
    return found


def _tasks(folder: StudyFolder) -> list[str]:
    return list(dict.fromkeys(job.task for job in folder.of("evaluate") if job.task and job.result))


def _similarity(pairs: Sequence[Pair], key: str) -> Picture | None:
    name = COMPARISONS[key]
    chosen = [
        (replace(run, similarity={name: run.similarity[name]} if name in run.similarity else {}), log)
        for run, log in pairs
    ]
    picture = similarity(chosen)
    if picture is None:
        return None
    heading = f"Layer similarity: {name}"
    return replace(picture, name=f"similarity_{key}", heading=heading, caption=picture.caption + " Mean over seeds.")


def _layer_weights(folder: StudyFolder, pairs: Sequence[Pair], task: str) -> Picture | None:
    labels = {row["label"]: row["name"] for row in folder.study["rows"]}
    chosen = []
    for run, log in pairs:
        jobs = folder.of("evaluate", labels[run.label])
        found = [job.result["layer_weights"] for job in jobs if job.task == task and job.result.get("layer_weights")]
        chosen.append((replace(run, layer_weights=np.mean(found, axis=0).tolist() if found else None), log))
    picture = layer_weights(chosen)
    if picture is None:
        return None
    return replace(picture, name=f"layer_weights_{task}", heading=f"{picture.heading}: {task_title(task)}")


def speed_quality(report: dict[str, Any], key: str) -> Picture | None:
    """Draw one point per row, speed-up over the baseline against a metric; whiskers are the spread over seeds."""
    points, spreads = {}, {}
    for index, row in enumerate(report["rows"]):
        speeds, qualities = (numbers(report["values"][row["name"]].get(name, {})) for name in ("speed_up", key))
        if speeds and qualities:
            points[index] = (statistics.fmean(speeds.values()), statistics.fmean(qualities.values()))
            spreads[index] = tuple(
                statistics.stdev(values.values()) if len(values) > 1 else 0.0 for values in (speeds, qualities)
            )
    if not points:
        return None
    figure, axes = single_axes(3.4)
    for index, (speed, quality) in points.items():
        style: Any = {"color": series_colour(index)}
        axes.errorbar(speed, quality, xerr=spreads[index][0], yerr=spreads[index][1], linewidth=1, **style)
        axes.plot(speed, quality, MARKERS[index % len(MARKERS)], markersize=8, **style)
    axes.margins(x=0.3, y=0.2)
    axes.set_xlabel("speed-up over the baseline row (training time)")
    axes.set_title(column(key).title, loc="left", fontsize=FONT, color=MUTED)
    label_points(figure, axes, points, [row["label"] for row in report["rows"]])
    better = "further down" if column(key).better == "low" else "further up"
    caption = f"{column(key).title} against speed-up, means over seeds: {better} and right is better. "
    caption += "Whiskers are one standard deviation over seeds."
    name = f"speed_quality_{key.replace('/', '_')}"
    return Picture(name, f"Speed and quality: {column(key).title}", caption, figure)


def ancestry_drawing(pairs: Sequence[Pair]) -> SvgDrawing | None:
    """Draw how the runs grew, from their growth logs: one panel for each distinct ancestry, named by policy."""
    panels: dict[tuple[Any, ...], Panel] = {}
    for run, log in pairs:
        if log.growth:
            key = (log.policy, *(mark.ancestry for mark in log.growth))
            panels.setdefault(key, Panel(log.policy or "unknown", _shorten(run.label), _stages(log)))
    if not panels:
        return None
    caption = (
        "Columns are stages, layer 1 at the bottom. Colour and number name the first-stage layer that a layer descends "
        "from; a dot marks a layer that was new at that growth. Drawn from the growth logs of the runs."
    )
    text = draw_panels(list(panels.values()), columns=min(3, len(panels) + 1))
    return SvgDrawing("ancestry", "How the students grew", caption, text)


def _shorten(label: str, longest: int = 26) -> str:
    return label if len(label) <= longest else label[: longest - 3] + "..."


def _stages(log: RunLog) -> list[Stage]:
    first = log.growth[0].depth_before
    return [Stage(tuple(range(first)), (False,) * first), *(_stage(mark) for mark in log.growth)]


def _stage(mark: GrowthEvent) -> Stage:
    kept = set(kept_positions(list(mark.plan), mark.depth_before)) if mark.plan else set(range(mark.depth))
    return Stage(mark.ancestry, tuple(place not in kept for place in range(mark.depth)))
