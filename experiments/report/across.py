"""The report of several studies: their rows side by side, each with its difference to the baseline of its own study.

Rows are matched by name. What keeps the studies from being compared stands at the top of the page.
"""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from datamodules.files import write_bytes
from experiments.report.figures import FONT, PAPER_WIDTHS, SMALL, WIDTH, Picture, axes_grid, legend_below, light_grid
from experiments.report.grids import Cell, Grid, html_grid, latex_grid, markdown_grid, rich_grid
from experiments.report.looks import Look
from experiments.report.numbers import DASH
from experiments.report.page import bullets, document, figures, made
from experiments.report.study import BuiltReport, PaperColumns, PaperForm, chosen_files, study_values
from experiments.report.study_plots import study_looks
from experiments.report.study_reading import StudyFolder
from experiments.report.study_tables import (
    INTERVAL_NOTE,
    NO_INTERVAL_NOTE,
    baseline_difference,
    column,
    difference_cell,
    difference_columns,
    value_cell,
)
from experiments.report.theme import GRID, INK, MUTED

TITLE = "Studies side by side"
NOTES = (
    "A row of several studies is one of that name in each of them. Its difference is to the baseline row of the same "
    "study, over the seeds that both have.",
    INTERVAL_NOTE,
    NO_INTERVAL_NOTE,
)
MOST_PANELS = 4
MARKS = "osD^vP"
# Facts that must agree before values compare: words, and what of ``study.json`` holds them.
FACTS = {
    "teacher": ("teacher",),
    "data": ("data", "corpus"),
    "settings of all rows": ("configs", "overrides"),
    "evaluation": ("evaluation",),
}
Values = dict[str, dict[str, Any]]  # name of a study -> its `study_values`


def compare_studies(
    studies: Sequence[StudyFolder],
    output: Path,
    command: str,
    files: Collection[str] | None = None,
    form: PaperForm | None = None,
    columns: PaperColumns = 1,
) -> BuiltReport:
    """Write ``report.html``, ``.md``, ``.tex`` and ``studies.png`` for several studies.

    Args:
        studies: the studies.
        output: folder of the report.
        command: for the page.
        files: names of the files to write; default: all.
        form: also draw the picture for a paper, in this format.
        columns: of a paper that this is as wide as.

    Raises:
        InputError: two studies have the same name and folder name, a study has no baseline, there is no measure or no
            row that two of them share, or ``files`` has another name.
    """
    named = _named(studies)
    values = {name: study_values(study) for name, study in named.items()}
    keys, rows = _shared(values)
    grids = {key: _grid(values, rows, key) for key in keys}
    looks = {name: look for study in named.values() for name, look in _looks(study).items()}
    own = [f"{name}: {line}" for name, each in values.items() for line in each["caveats"]]
    caveats = [*what_differs(named, values, rows), *own]
    picture = _picture(values, rows, keys, looks, WIDTH)
    papers = {f"studies.{form}": _picture(values, rows, keys, looks, PAPER_WIDTHS[columns])} if form else {}
    facts = [("Command", command), *((name, str(study.path)) for name, study in named.items())]
    texts = {
        "report.md": lambda: _markdown(caveats, grids, picture, facts),
        "report.html": lambda: _page(caveats, grids, picture, facts),
        "report.tex": lambda: "% needs \\usepackage{booktabs}\n" + "\n".join(map(latex_grid, grids.values())),
    }
    written = {}
    for name in chosen_files([*texts, "studies.png", *papers], files):
        if form and name in papers:
            content = papers[name].paper(form)
        else:
            content = picture.png() if name == "studies.png" else texts[name]().encode()
        written[name] = write_bytes(output / name, content)
    return BuiltReport(written, rich_grid(grids[keys[0]], column(keys[0]).title, "\n".join(caveats)))


def _named(studies: Sequence[StudyFolder]) -> dict[str, StudyFolder]:
    names = [study.study["name"] for study in studies]
    if len(set(names)) < len(names):
        names = [study.path.absolute().name for study in studies]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{names.count(repeated[0])} studies have the name {repeated[0]}: rename one of their folders")
    if missing := [name for name, study in zip(names, studies, strict=True) if not study.study.get("baseline")]:
        raise InputError(f"{', '.join(missing)} names no baseline row, so there are no differences to compare")
    return dict(zip(names, studies, strict=True))


def _shared(values: Values) -> tuple[list[str], list[str]]:
    """List measures and names of rows that at least two of the studies have; metrics of tasks come first."""
    measures = [key for each in values.values() for key in difference_columns(each)]
    keys = [key for key in dict.fromkeys(measures) if measures.count(key) > 1]
    named = [row["name"] for each in values.values() for row in each["rows"]]
    rows = [name for name in dict.fromkeys(named) if named.count(name) > 1]
    others = _not_only_baselines(values, rows)
    for what, found in (("measure", keys), ("row of the same name other than the baseline", others)):
        if not found:
            raise InputError(f"no two of {', '.join(values)} share a {what}: there is nothing to compare")
    return sorted(keys, key=lambda key: "/" not in key), rows


def _not_only_baselines(values: Values, rows: Sequence[str]) -> list[str]:
    """Select the rows that have a difference in some study."""
    return [row for row in rows if any(row != each["baseline"] and row in each["values"] for each in values.values())]


def what_differs(named: Mapping[str, StudyFolder], values: Values, rows: Sequence[str]) -> list[str]:
    """Say what keeps the studies' values, differences or seconds from being compared."""
    lines = []
    for words, keys in FACTS.items():
        plain = {name: _flat({key: study.study.get(key) for key in keys}) for name, study in named.items()}
        apart = sorted(
            key for key in set().union(*plain.values()) if len({repr(each.get(key)) for each in plain.values()}) > 1
        )
        if apart:
            shown = "; ".join(
                f"{name}: " + ", ".join(f"{key} {each.get(key, 'not set')}" for key in apart[:4])
                for name, each in plain.items()
            )
            more = f" and {len(apart) - 4} more" if len(apart) > 4 else ""
            lines.append(f"The studies differ in their {words} ({shown}{more}).")
    if lines:
        lines.append(
            "Therefore their values do not compare, and their differences to the baseline only as answers from "
            "different set-ups."
        )
    machines = {name: str(study.study.get("hardware") or "unknown") for name, study in named.items()}
    if len(set(machines.values())) > 1:
        shown = "; ".join(f"{name}: {machine}" for name, machine in machines.items())
        lines.append(f"The studies ran on different machines ({shown}): seconds and memory do not compare.")
    baselines = {name: each["baseline"] for name, each in values.items()}
    if len(set(baselines.values())) > 1:
        shown = "; ".join(f"{name}: {row}" for name, row in baselines.items())
        lines.append(f"The studies have different baselines ({shown}): their differences do not compare.")
    for row in rows:
        keys = ("configs", "overrides", "match", "random_growth")
        found = [each for study in named.values() for each in study.study["rows"] if each["name"] == row]
        if len({repr([each.get(key) or None for key in keys]) for each in found}) > 1:
            lines.append(f"Row {row} has other settings in one of the studies than in another.")
    return lines or ["The studies agree in teacher, data, settings, evaluation, machine and baseline."]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Map nested mappings to dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _looks(study: StudyFolder) -> dict[str, Look]:
    looks = study_looks(study)
    return {row["name"]: looks[row["label"]] for row in study.study["rows"]}


def _labels(values: Values) -> dict[str, str]:
    """Map names of rows to their labels, those of the first study that has them."""
    return {row["name"]: row["label"] for each in reversed(values.values()) for row in each["rows"]}


def _cells(values: Values, row: str, key: str) -> list[Cell]:
    cells = []
    for each in values.values():
        found = each["values"].get(row, {}).get(key)
        if found is None:
            cells += [Cell(DASH, missing=True)] * 2
        else:
            own = row == each["baseline"]
            cells += [value_cell(found, key), Cell("baseline") if own else difference_cell(each, row, key)]
    return cells


def _grid(values: Values, rows: Sequence[str], key: str) -> Grid:
    labels = _labels(values)
    titles = [title for name in values for title in (name, f"{name}: difference")]
    return Grid(("System", *titles), tuple((Cell(labels[row]), *_cells(values, row, key)) for row in rows))


def _picture(
    values: Values, rows: Sequence[str], keys: Sequence[str], looks: Mapping[str, Look], width: float
) -> Picture:
    """Draw the differences with their intervals: a line per row, a marker per study, a panel per measure."""
    from matplotlib.ticker import MaxNLocator

    shown, labels = list(keys[:MOST_PANELS]), _labels(values)
    rows = _not_only_baselines(values, rows)
    names = [textwrap.fill(labels[row], int(72 * width / 3 / (0.56 * SMALL)), break_long_words=False) for row in rows]
    marks = {name: Look(MUTED, MARKS[place % len(MARKS)]) for place, name in enumerate(values)}
    height = 0.55 + (0.12 + 0.1 * len(values)) * len(rows)
    figure, grid = axes_grid(len(shown), 1, size=(width, height * len(shown)))
    for key, (axes,) in zip(shown, grid, strict=True):
        light_grid(axes)
        axes.axvline(0, color=INK, linewidth=0.8)
        for line, row in enumerate(rows):
            for place, (name, each) in enumerate(values.items()):
                if row == each["baseline"] or key not in each["values"].get(row, {}):
                    continue
                found = baseline_difference(each, row, key)
                if found.mean is None:
                    continue
                y, colour = line + 0.7 * ((place + 0.5) / len(values) - 0.5), looks[row].colour
                if found.low is not None and found.high is not None:
                    axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1)
                axes.plot([found.mean], [y], marks[name].marker, color=colour, markersize=5.5)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(labelsize=SMALL)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(column(key).title, loc="left", fontsize=FONT, color=MUTED)
        axes.spines["bottom"].set_color(GRID)
    legend_below(figure, marks, lines=False)
    caption = (
        "Row minus the baseline of its own study, mean over seeds; a marker for each study. A line is the 95 % "
        "interval of Student's t, from three seeds on."
    )
    return Picture("studies", "Differences to each study's baseline", caption, figure)


def _markdown(
    caveats: Sequence[str], grids: Mapping[str, Grid], picture: Picture, facts: Sequence[tuple[str, str]]
) -> str:
    parts = [f"# {TITLE}", *(f"> {line}" for line in caveats)]
    for key, grid in grids.items():
        parts += [f"## {column(key).title}", markdown_grid(grid).rstrip()]
    parts += ["\n".join(f"- {line}" for line in NOTES), f"## {picture.heading}"]
    parts += [f"![{picture.heading}](studies.png)", picture.caption, "## How this was made"]
    return "\n\n".join([*parts, "\n".join(f"- {name}: {value}" for name, value in facts)]) + "\n"


def _page(caveats: Sequence[str], grids: Mapping[str, Grid], picture: Picture, facts: Sequence[tuple[str, str]]) -> str:
    body = []
    for key, grid in grids.items():
        body += [f"<h2>{column(key).title}</h2>", html_grid(grid, _direction(key))]
    return document(TITLE, caveats, [*body, bullets(NOTES), figures([picture]), made(facts)])


def _direction(key: str) -> str:
    return f"{'Lower' if column(key).better == 'low' else 'Higher'} is better."
