"""Pictures of a study: those of single runs for one run of each row, and those over several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.records.reading import RunLog
from experiments.report.figures import WIDTH, Picture, require_matplotlib
from experiments.report.heat_maps import COMPARISONS, layer_weights, similarity
from experiments.report.looks import Look, looks_of
from experiments.report.plots import depth_vs_step, loss_curves
from experiments.report.policy_figure import PANELS, Panel, Stage, draw_panels
from experiments.report.runs import Pair, ReportRun
from experiments.report.speed_quality import speed_quality, summary
from experiments.report.stage_figures import copies_picture, depth_use_picture, exits_picture
from experiments.report.study_reading import StudyFolder, StudyJob
from experiments.report.study_tables import task_title
from experiments.report.theme import follow_theme
from lightning_modules.growth.event import GrowthEvent
from lightning_modules.growth.policies import kept_positions


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
    return [runs[0] for runs in study_runs(folder)]


def study_runs(folder: StudyFolder) -> list[list[Pair]]:
    """List the runs of each row that has some, by seed; the similarity of each is the mean of the row."""
    looks = study_looks(folder)
    found = []
    for row in folder.study["rows"]:
        matrices = {title: mean for key, title in COMPARISONS.items() if (mean := _mean(folder, row["name"], key))}
        jobs = [job for job in folder.of("distil", row["name"]) if job.seed in folder.study["seeds"]]
        logs = [(job, folder.run_log(job)) for job in jobs]
        run = ReportRun(row["label"], looks[row["label"]], similarity=matrices)
        found.append([(_with_flops(run, job, log), log) for job, log in logs if log is not None])
    return [runs for runs in found if runs]


def study_looks(folder: StudyFolder) -> dict[str, Look]:
    """Find the look of every row of the study by label, whether or not it has run."""
    return looks_of(folder.study["rows"])


def _with_flops(run: ReportRun, job: StudyJob, log: RunLog) -> ReportRun:
    flops = tuple(job.result.get("flops_by_stage") or ())
    if not log.growth and not flops and job.result.get("flops"):
        flops = (job.result["flops"],)
    return replace(run, flops_by_stage=flops)


def _mean(folder: StudyFolder, row: str, key: str) -> list[list[float]]:
    """Average the similarity matrix over the seeds of a row; empty without any."""
    found = [job.result[key] for job in folder.of("similarity", row) if job.result.get(key)]
    return np.mean(np.array(found, dtype=float), axis=0).tolist() if found else []


def study_pictures(folder: StudyFolder, report: dict[str, Any], width: float = WIDTH) -> list[Picture]:
    """Draw every picture that has data, ``width`` inches wide."""
    require_matplotlib()
    runs, stages, looks = study_runs(folder), stage_runs(folder), study_looks(folder)
    pairs = [pairs[0] for pairs in runs]
    drawn = [
        summary(report, looks, width),
        *_losses(runs, report, width),
        depth_vs_step(pairs, width),
        *(speed_quality(report, key, looks, width) for key in report["columns"] if "/" in key),
        *(similarity(pairs, key, width) for key in COMPARISONS),
        copies_picture(stages, looks, width),
        depth_use_picture(stages, width),
        exits_picture(stages, looks, width),
        *(_layer_weights(folder, pairs, task, width) for task in _tasks(folder)),
    ]
    one_seed = " One run of each row is shown, that of its lowest seed."
    several = len(report["seeds"]) > 1
    pictures = [picture for picture in drawn if picture is not None]
    single = ("depth_vs_step", "copies", "depth_use", "exits")
    return [
        replace(each, caption=each.caption + one_seed) if several and each.name in single else each for each in pictures
    ]


def _losses(runs: Sequence[Sequence[Pair]], report: dict[str, Any], width: float) -> list[Picture]:
    """Draw the losses of the rows that compare with the baseline: in their loss, and along the seconds in these too."""

    def without(shown: Sequence[Sequence[Pair]], rows: Sequence[str], reason: str) -> tuple[list[Sequence[Pair]], str]:
        others = {row["label"] for row in report["rows"] if row["name"] in rows}
        left_out = [seeds[0][0].label for seeds in shown if seeds[0][0].label in others]
        note = f" Not shown, since {reason}: {'; '.join(left_out)}." if left_out else ""
        return [seeds for seeds in shown if seeds[0][0].label not in others], note

    same, note = without(runs, report["other_losses"], "their loss is another function")
    timed, untimed = without(same, report["other_seconds"], "their seconds do not compare")
    pictures = [
        (loss_curves(same, "steps", width), note),
        (loss_curves(timed, "time", width), note + untimed),
        (loss_curves(same, "flops", width), note),
    ]
    return [replace(each, caption=each.caption + text) for each, text in pictures if each is not None]


def stage_runs(folder: StudyFolder) -> list[dict[str, Any]]:
    """Collect the results of `interstack similarity` on each row's stages, for the lowest seed that has them."""
    found = []
    for row in folder.study["rows"]:
        results = [job.result for job in folder.of("similarity", row["name"]) if job.result.get("runs")]
        found += [results[0]["runs"][-1] | {"name": row["label"]}] if results else []
    return found


def _tasks(folder: StudyFolder) -> list[str]:
    return list(dict.fromkeys(job.task for job in folder.of("evaluate") if job.task and job.result))


def _layer_weights(folder: StudyFolder, pairs: Sequence[Pair], task: str, width: float) -> Picture | None:
    labels = {row["label"]: row["name"] for row in folder.study["rows"]}
    chosen = []
    for run, log in pairs:
        jobs = folder.of("evaluate", labels[run.label])
        found = [job.result["layer_weights"] for job in jobs if job.task == task and job.result.get("layer_weights")]
        chosen.append((replace(run, layer_weights=np.mean(found, axis=0).tolist() if found else None), log))
    picture = layer_weights(chosen, width)
    if picture is None:
        return None
    return replace(picture, name=f"layer_weights_{task}", heading=f"{picture.heading}: {task_title(task)}")


def ancestry_drawing(pairs: Sequence[Pair]) -> SvgDrawing | None:
    """Draw how the runs grew, from their growth logs: one panel for each distinct ancestry, named by policy."""
    panels: dict[tuple[Any, ...], Panel] = {}
    for _, log in pairs:
        if log.growth:
            key = (log.policy, *(mark.ancestry for mark in log.growth))
            panels.setdefault(key, Panel(log.policy or "unknown", PANELS.get(log.policy or "", ""), _stages(log)))
    if not panels:
        return None
    caption = (
        "Columns are stages, with the depth below them; layer 1 is at the bottom. Colour and number name the "
        "first-stage layer that a layer descends from. Drawn from the growth logs of the runs."
    )
    places = len(panels) + 1  # one for the legend
    columns = places if places < 4 else min((3, 2), key=lambda columns: -places % columns)
    return SvgDrawing("ancestry", "How the students grew", caption, draw_panels(list(panels.values()), columns, ()))


def _stages(log: RunLog) -> list[Stage]:
    first = log.growth[0].depth_before
    return [Stage(tuple(range(first)), (False,) * first), *(_stage(mark) for mark in log.growth)]


def _stage(mark: GrowthEvent) -> Stage:
    kept = set(kept_positions(list(mark.plan), mark.depth_before)) if mark.plan else set(range(mark.depth))
    return Stage(mark.ancestry, tuple(place not in kept for place in range(mark.depth)))
