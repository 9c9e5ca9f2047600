"""The report of a study: ``report.md``, ``.tex``, ``.csv``, ``.json``, ``.html`` and pictures, from its results.

``report.json`` holds every number of the tables, cell by cell and seed by seed; `study_texts` makes the texts from it
alone. Jobs that failed or have not run yet leave gaps, so a report can be made at any time.
"""

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from datamodules.errors import InputError
from datamodules.files import json_text, write_bytes
from experiments.report.comparisons import compare, comparison_grid, comparison_notes
from experiments.report.figures import PAPER_WIDTHS, Picture
from experiments.report.grids import html_grid, latex_grid, markdown_grid, rich_grid
from experiments.report.looks import is_untrained
from experiments.report.page import bullets, document, figures, made
from experiments.report.study_plots import SvgDrawing, ancestry_drawing, study_pairs, study_pictures
from experiments.report.study_reading import (
    StudyFolder,
    cell_values,
    default_columns,
    disagreements,
    failures,
    loss_functions,
    matched_costs,
    other_losses,
    other_seconds,
    results_text,
    scores,
)
from experiments.report.study_tables import (
    difference_grid,
    difference_note,
    few_seeds,
    long_rows,
    published_grid,
    result_grid,
)

PaperForm = Literal["pdf", "svg"]
PaperColumns = Literal[1, 2]
FORMAT = 2
RESULTS = "results.json"
"""File with all inputs of the report, so that it can be made again."""
RESULT_NOTES = (
    "Mean \u00b1 standard deviation over seeds; (n of m) where seeds are missing. The best mean of a column, among "
    "rows with the most seeds, is bold, whether or not the difference means anything: see the paired differences.",
    "Training, s: wall-clock seconds of training, without validation and checkpoints. Speed-up: training seconds of "
    "the baseline row divided by those of the row, seed by seed. Student speed-up leaves the teacher's forward out.",
    "A dash means that there is no such value (yet).",
)
FLOPS_NOTE = (
    "FLOPs are those of training by formula, of the student and of a teacher that runs in the step. Where targets come "
    "from a cache, neither the teacher nor the making of the cache is counted."
)
COLUMN_NOTES = {
    "flops": FLOPS_NOTE,
    "flops_ratio": FLOPS_NOTE,
    "final_loss": "Train loss has the terms that a row is trained on, over its last epoch: rows with and without an "
    "intermediate loss do not compare in it. The dev output loss does not depend on the intermediate loss.",
    "peak_memory_bytes": "Memory: the most that the process held, of the GPU its tensors, without one all of its main "
    "memory, libraries included.",
}
PUBLISHED_NOTE = (
    "Published rows are quoted from their papers and the SUPERB leaderboard (960 h of LibriSpeech). They were not "
    "measured here and are never bold."
)


# Jobs of models that were not distilled here have these names instead of a row's.
REFERENCE_LABELS = {"teacher": "Teacher", "untrained": "Untrained teacher", "fbank": "Log-mel features (FBANK)"}


@dataclass(frozen=True)
class BuiltReport:
    """Written files by name; ``table`` is for the terminal."""

    files: dict[str, Path]
    table: Table

    @property
    def main(self) -> Path:
        """The file to open first."""
        return self.files.get("report.html") or next(iter(self.files.values()))


def build_report(
    study: StudyFolder,
    output: Path | None = None,
    files: Collection[str] | None = None,
    form: PaperForm | None = None,
    columns: PaperColumns = 1,
) -> BuiltReport:
    """Write the report of a study; each file is replaced atomically.

    Args:
        study: the study, from a folder, its ``results.json``, or run folders.
        output: folder of the report; default: the study's folder.
        files: names of the files to write; default: all. ``report.md`` shows the pictures among them.
        form: also draw the pictures for a paper, in this format.
        columns: of a paper that these are as wide as.

    Raises:
        InputError: matplotlib is missing, or the report has no file of a name in ``files``.
    """
    folder, report = output or study.path, study_values(study)
    ancestry = ancestry_drawing(study_pairs(study))
    drawings: dict[str, Picture | SvgDrawing] = {f"{each.name}.png": each for each in study_pictures(study, report)}
    drawings |= {f"{ancestry.name}.svg": ancestry} if ancestry else {}
    printed = study_pictures(study, report, PAPER_WIDTHS[columns]) if form else []
    papers = {f"{each.name}.{form}": each for each in printed}
    texts = study_texts(report)
    names = ["report.md", "report.tex", "report.csv", "report.json", "report.html", RESULTS, *drawings, *papers]
    chosen = chosen_files(names, files)
    shown = [(name, each.heading, each.caption) for name, each in drawings.items() if name in chosen]

    def content(name: str) -> bytes:
        if form and (paper := papers.get(name)):
            return paper.paper(form)
        if drawing := drawings.get(name):
            return drawing.png() if isinstance(drawing, Picture) else drawing.text.encode()
        if name == RESULTS:
            return results_text(study.results).encode()
        if name == "report.json":
            return json_text(report).encode()
        if name == "report.html":
            return study_page(report, list(drawings.values())).encode()
        pictures = _markdown_pictures(shown) + _markdown_made(report) if name == "report.md" else ""
        return (texts[name.removeprefix("report.")] + pictures).encode()

    written = {name: write_bytes(folder / name, content(name)) for name in chosen}
    return BuiltReport(
        written, rich_grid(result_grid(report), report["title"], "\n".join(report["caveats"] + report["failures"]))
    )


def chosen_files(names: Sequence[str], files: Collection[str] | None) -> list[str]:
    """List the names to write, all without ``files``.

    Raises:
        InputError: ``files`` is empty or has another name.
    """
    if files is not None and not files:
        raise InputError(f"--files names none: choose from {', '.join(names)}")
    if unknown := [name for name in files or () if name not in names]:
        raise InputError(f"the report has no file {', '.join(unknown)}; it has {', '.join(names)}")
    return [name for name in names if files is None or name in files]


def study_values(study: StudyFolder) -> dict[str, Any]:
    """Collect the content of the tables and texts in plain values."""
    described = study.study
    rows = [{"name": row["name"], "label": row.get("label") or row["name"]} for row in described["rows"]]
    labels = {row["name"]: row["label"] for row in rows} | REFERENCE_LABELS
    columns = list(described.get("columns") or default_columns(study))
    comparisons = described.get("comparisons") or []
    # The pictures of speed and quality need the ratio, whether or not the table shows it.
    ratio = ["flops_ratio"] if described.get("baseline") else []
    shown = dict.fromkeys([*columns, *(each["measure"] for each in comparisons), *ratio])
    values = cell_values(study, [row["name"] for row in rows], list(shown))
    report: dict[str, Any] = {
        "format": FORMAT,
        "name": described["name"],
        "title": described.get("title") or described["name"],
        "rows": rows,
        "seeds": list(described["seeds"]),
        "columns": columns,
        "baseline": described.get("baseline"),
        "references": list(described.get("references") or []),
        "measured_references": _measured_references(study, [row["name"] for row in rows], columns),
        "values": values,
        "comparisons": compare(comparisons, values, loss_functions(study)),
        "other_losses": list(other_losses(study)[1]),
        "other_seconds": other_seconds(study),
        "untrained": [row["name"] for row in described["rows"] if is_untrained(row)],
        "failures": failures(study, labels),
        "matched": matched_costs(study, labels),
        "run_seeds": described.get("run_seeds") or list(described["seeds"]),
        **{key: described.get(key) or "" for key in ("command", "commit", "hardware", "versions")},
    }
    unfinished = sum(job.status not in ("done", "failed") for job in study.jobs)
    caveats = [few_seeds(report), f"{unfinished} of {len(study.jobs)} jobs have not been done." if unfinished else None]
    notes = described.get("notes") or []
    report["caveats"] = [line for line in [*notes, *caveats, *disagreements(study)] if line]
    return report


def _measured_references(study: StudyFolder, rows: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Collect models that were evaluated but not distilled here, such as the teacher and the untrained teacher."""
    names = dict.fromkeys(job.row for job in study.of("evaluate") if job.row not in rows and job.result)
    measured = []
    for name in names:
        jobs = study.of("evaluate", name)
        values: dict[str, float] = {}
        for key in (key for key in columns if "/" in key):
            task = key.partition("/")[0]
            found = [scores(job, key) for job in jobs if job.task == task]
            seen = [metrics[metric] for metrics, metric in found if metric in metrics]
            values |= {key: statistics.fmean(seen)} if seen else {}
        measured.append({"name": name, "label": REFERENCE_LABELS.get(name, name), "values": values})
    return measured


def study_texts(report: dict[str, Any]) -> dict[str, str]:
    """Make Markdown (without pictures), LaTeX and CSV from the content of ``report.json``.

    Raises:
        InputError: the format number is another one.
    """
    if report.get("format") != FORMAT:
        raise InputError(f"report format is {report.get('format')!r}; this version reads format {FORMAT}")
    results, planned = result_grid(report), comparison_grid(report)
    differences, published = difference_grid(report), published_grid(report)
    parts = [f"# {report['title']}", *(f"> {line}" for line in report["caveats"]), "## Results"]
    parts += [markdown_grid(results).rstrip(), "\n".join(f"- {line}" for line in _notes(report))]
    if planned:
        parts += ["## Planned comparisons", markdown_grid(planned).rstrip()]
        parts += ["\n".join(f"- {line}" for line in comparison_notes(report))]
    if differences:
        parts += [
            f"## Differences to {_baseline(report)}",
            markdown_grid(differences).rstrip(),
            difference_note(report),
        ]
    if published:
        parts += ["## Published results", markdown_grid(published).rstrip(), PUBLISHED_NOTE]
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(long_rows(report))
    grids = [grid for grid in (results, planned, differences, published) if grid]
    return {
        "md": "\n\n".join(parts) + "\n",
        "tex": "% needs \\usepackage{booktabs}\n" + "\n".join(latex_grid(grid) for grid in grids),
        "csv": lines.getvalue(),
    }


def study_page(report: dict[str, Any], drawings: Sequence[Picture | SvgDrawing]) -> str:
    """Render one self-contained HTML page."""
    planned, differences, published = comparison_grid(report), difference_grid(report), published_grid(report)
    caption = "Error rates and losses: lower is better. Accuracies: higher is better."
    body = ["<h2>Results</h2>", html_grid(result_grid(report), caption)]
    body += [bullets(_notes(report))]
    if planned:
        caption = "Row minus reference, paired by seed."
        body += ["<h2>Planned comparisons</h2>", html_grid(planned, caption), bullets(comparison_notes(report))]
    if differences:
        body += [f"<h2>Differences to {_baseline(report)}</h2>", html_grid(differences, difference_note(report))]
    body += [figures(drawings)]
    if published:
        body += ["<h2>Published results</h2>", html_grid(published, PUBLISHED_NOTE)]
    return document(report["title"], report["caveats"], [*body, made(_provenance(report))])


def _notes(report: dict[str, Any]) -> list[str]:
    published = [PUBLISHED_NOTE] if report["references"] and not published_grid(report) else []
    columns = dict.fromkeys(note for key, note in COLUMN_NOTES.items() if key in report["columns"])
    return [*report["failures"], *report["matched"], *RESULT_NOTES, *columns, *published]


def _baseline(report: dict[str, Any]) -> str:
    return next(row["label"] for row in report["rows"] if row["name"] == report["baseline"])


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    """List (name, value) of the facts needed to make the study again; unknown ones are left out."""
    lines = [(key.capitalize(), report[key]) for key in ("command", "commit", "hardware")]
    versions = ", ".join(f"{name} {version}" for name, version in sorted((report["versions"] or {}).items()))
    lines += [("Versions", versions), ("Seeds", ", ".join(map(str, report["run_seeds"])))]
    return [(name, value) for name, value in lines if value]


def _markdown_pictures(shown: Sequence[tuple[str, str, str]]) -> str:
    return "".join(f"\n## {heading}\n\n![{heading}]({name})\n\n{caption}\n" for name, heading, caption in shown)


def _markdown_made(report: dict[str, Any]) -> str:
    lines = "\n".join(f"- {name}: {value}" for name, value in _provenance(report))
    return f"\n## How this was made\n\n{lines}\n"
