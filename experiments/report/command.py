"""``interstack report``: write tables, plots and one page from a study, a quick start, or folders of single runs."""

from pathlib import Path

from rich.console import Console

from datamodules.errors import InputError
from datamodules.files import read_json, read_text
from experiments.records.reading import read_run
from experiments.report.build import ReportPaths, build_report
from experiments.report.document import ReferenceRow, Report, ReportNotes, ReportRun
from experiments.report.study import StudyReport, build_study_report


def report(folders: list[str], output: str | None = None, files: list[str] | None = None) -> None:
    """Write report.md, report.html, report.json and pictures; a study also gets report.tex and report.csv.

    Args:
        folders: one folder of `interstack reproduce` or of `interstack quickstart`, or a results.json of a study, or
            several run folders.
        output: folder for the report, required for run folders; default: the study's folder. A quick start's report
            always lies in its own folder.
        files: files of a study's report to write, such as [report.md,loss_vs_steps.png]; default: all.
    """
    paths = [Path(folder) for folder in folders]
    first, into = paths[0], None if output is None else Path(output)
    kind = next((name for name in ("study.json", "quickstart.json") if (first / name).is_file()), None)
    if first.is_file():
        kind = "results.json"
    if kind and len(paths) > 1:
        raise InputError(f"{first} is or holds a {kind}: give it alone")
    if files is not None and kind not in ("study.json", "results.json"):
        raise InputError("--files chooses among the files of a study's report, and this is no study")
    if kind == "quickstart.json":
        if into is not None:
            raise InputError(f"{first} holds a quickstart.json: give it without --output, its report lies in it")
        _show(build_report(first, *_quick_start(first)))
    elif kind:
        _show(build_study_report(first, into, files))
    elif into is None:
        raise InputError("run folders need --output, the folder for their report")
    else:
        runs = [ReportRun(path, path.name) for path in paths]
        _show(build_report(into, runs, [], _notes(folders, str(into))))


def _show(built: ReportPaths | StudyReport) -> None:
    console = Console()
    console.width = max(console.width, 110)  # the table of results needs it
    console.print(built.table)
    console.print(f"report: {built.main}")


def _quick_start(folder: Path) -> tuple[list[ReportRun], list[ReferenceRow], ReportNotes]:
    """Read runs, reference rows and notes of a quick start back from its report."""
    if not (folder / "report.json").is_file():
        raise InputError(f"{folder} holds an unfinished quick start: run `interstack quickstart` again first")
    written = Report.from_json(read_text(folder / "report.json"))
    rows = {row.system: row for row in written.rows}
    runs = []
    for details in written.runs:
        path = Path(details["folder"])
        path = path if path.is_dir() else folder / "students" / path.name
        label = details["label"]
        runs.append(ReportRun(path, label, rows[label].per, details["layer_weights"], details["similarity"]))
    labels = {run.label for run in runs}
    references = [ReferenceRow(row.system, row.per, row.parameters) for row in written.rows if row.system not in labels]
    return runs, references, written.notes


def _notes(folders: list[str], output: str) -> ReportNotes:
    records = [path for path in (Path(folder) / "run.json" for folder in folders) if path.is_file()]
    commits = {str(read_json(path).get("git_commit")) for path in records}
    hardware = {str(log.hardware) for log in (read_run(Path(folder)) for folder in folders) if log.hardware}
    return ReportNotes(
        title="Comparison of runs",
        command=" ".join(["interstack report", *folders, "--output", output]),
        commit=", ".join(sorted(commits)),
        hardware="; ".join(sorted(hardware)),
        versions={},
        caveats=("One run per system: nothing can be concluded about differences between systems.",),
    )
