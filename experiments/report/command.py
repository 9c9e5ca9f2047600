"""``interstack report``: write tables, plots and one page from a study or from folders of single runs."""

from pathlib import Path

from rich.console import Console

from datamodules.errors import InputError
from experiments.report.runs import study_of_runs
from experiments.report.study import PaperColumns, PaperForm, build_report
from experiments.report.study_reading import StudyFolder, read_study


def report(
    folders: list[str],
    output: str | None = None,
    files: list[str] | None = None,
    format: PaperForm | None = None,
    columns: PaperColumns = 1,
) -> None:
    """Write report.md, report.html, report.tex, report.csv, report.json, results.json and pictures.

    Args:
        folders: one folder of `interstack reproduce` or `interstack quickstart`, or a results.json of one, or several
            run folders.
        output: folder for the report, required for run folders; default: the study's folder.
        files: files of the report to write, such as [report.md,loss_vs_steps.png]; default: all.
        format: also draw every picture for a paper, as pdf (for LaTeX) or svg, in light colours with text of 8 to 9
            points.
        columns: width of the pictures of --format: 1 column of a paper (80 mm) or both of its 2 (170 mm).
    """
    built = build_report(_study(folders, output), None if output is None else Path(output), files, format, columns)
    console = Console()
    console.width = max(console.width, 110)  # the table of results needs it
    console.print(built.table)
    console.print(f"report: {built.main}")


def _study(folders: list[str], output: str | None) -> StudyFolder:
    paths = [Path(folder) for folder in folders]
    if paths[0].is_file() or (paths[0] / "study.json").is_file():
        if len(paths) > 1:
            raise InputError(f"{paths[0]} is a study: give it alone")
        return read_study(paths[0])
    if (paths[0] / "quickstart.json").is_file():
        raise InputError(f"{paths[0]} holds an unfinished quick start: run `interstack quickstart` again first")
    if output is None:
        raise InputError("run folders need --output, the folder for their report")
    return study_of_runs(paths, " ".join(["interstack report", *folders, "--output", output]))
