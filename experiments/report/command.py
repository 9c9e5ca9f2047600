"""``interstack report``: write tables, plots and one page from a study or from folders of single runs."""

from pathlib import Path

from rich.console import Console

from datamodules.errors import InputError
from experiments.report.across import compare_studies
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
        folders: a folder of `interstack reproduce` or `interstack quickstart`, or a results.json of one; several of
            these, for one page that compares their rows; or run folders.
        output: folder for the report, required for run folders and several studies; default: the study's folder.
        files: files of the report to write, such as [report.md,loss_vs_steps.png]; default: all.
        format: also draw every picture for a paper, as pdf (for LaTeX) or svg, in light colours with text of 8 to 9
            points.
        columns: width of the pictures of --format: 1 column of a paper (80 mm) or both of its 2 (170 mm).
    """
    paths, target = [Path(folder) for folder in folders], None if output is None else Path(output)
    if len(paths) > 1 and any(map(_is_study, paths)):
        if others := [str(path) for path in paths if not _is_study(path)]:
            raise InputError(f"{', '.join(others)}: no study, but others are: give studies alone, or run folders alone")
        if target is None:
            raise InputError("several studies need --output, the folder for their report")
        command = " ".join(["interstack report", *folders, "--output", str(target)])
        built = compare_studies([read_study(path) for path in paths], target, command, files, format, columns)
    else:
        built = build_report(_study(paths, target), target, files, format, columns)
    console = Console()
    console.width = max(console.width, 110)  # the table of results needs it
    console.print(built.table)
    console.print(f"report: {built.main}")


def _is_study(path: Path) -> bool:
    return path.is_file() or (path / "study.json").is_file()


def _study(paths: list[Path], output: Path | None) -> StudyFolder:
    if _is_study(paths[0]):
        return read_study(paths[0])
    if (paths[0] / "quickstart.json").is_file():
        raise InputError(f"{paths[0]} holds an unfinished quick start: run `interstack quickstart` again first")
    if output is None:
        raise InputError("run folders need --output, the folder for their report")
    return study_of_runs(paths, " ".join(["interstack report", *map(str, paths), "--output", str(output)]))
