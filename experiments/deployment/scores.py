"""Scores of a study beside measured encoders."""

from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from datamodules.errors import InputError
from experiments.command_line import nearest
from experiments.report.study_reading import cell_values, default_columns, read_study
from experiments.report.study_tables import column, numbers


class Scores(NamedTuple):
    """A metric's title, which direction is better (``low`` or ``high``), and the mean over seeds of each encoder."""

    title: str
    better: str
    values: dict[str, float]


def find_scores(
    path: Path, names: Collection[str], score_names: Mapping[str, str] | None, metric: str | None
) -> Scores:
    """Read the scores of encoders from a study.

    Args:
        path: ``results.json`` or the folder of the study.
        names: names of the encoders.
        score_names: the study's row of each encoder; ``None``: its own name, and an encoder that the study lacks has no
            score.
        metric: ``TASK/METRIC``; ``None``: the first one of the study.

    Raises:
        InputError: the study has no such metric or row, or the row has no score.
    """
    study = read_study(path)
    rows = dict.fromkeys(job.row for job in study.of("evaluate") if job.result)
    known = [each for each in default_columns(study) if "/" in each]
    if not known:
        raise InputError(f"{path} has no scores: no evaluation of the study is finished")
    key = metric or known[0]
    if key not in known:
        raise InputError(f"{path} has no metric {key!r}{nearest(key, known)} (it has {', '.join(known)})")
    wanted = score_names if score_names is not None else {name: name for name in names if name in rows}
    for name, row in wanted.items():
        if name not in names:
            raise InputError(f"score_names: {name!r} is no measured encoder{nearest(name, names)}")
        if row not in rows:
            raise InputError(
                f"{path} has no score of row {row!r}{nearest(row, rows)} (it has those of {', '.join(rows)})"
            )
    cells = cell_values(study, list(wanted.values()), [key])
    values = {name: list(numbers(cells[row][key]).values()) for name, row in wanted.items()}
    if empty := [row for name, row in wanted.items() if not values[name]]:
        raise InputError(f"{path} has no {key} of row {empty[0]!r}: give another metric")
    shown = column(key)
    return Scores(shown.title, shown.better or "high", {name: fmean(each) for name, each in values.items()})
