"""``python -m experiments.analysis.copies --results FILE``: copies beside layers that are as far apart in other rows.

The third claim of the paper as ``docs/table1_whisper.md`` states it. For every pair of layers of a row's final students
that descend from one first-stage layer, its linear CKA is compared with the mean CKA of all pairs at the same distance
in the students of another row and the same seed.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules.errors import InputError
from experiments.report.study_reading import StudyFolder, read_study

Matrix = Sequence[Sequence[float]]


def copy_pairs(ancestry: Sequence[int | None]) -> list[tuple[int, int]]:
    """Pairs of layers, lower one first, that descend from the same first-stage layer."""
    pairs = combinations(range(len(ancestry)), 2)
    return [(a, b) for a, b in pairs if ancestry[a] is not None and ancestry[a] == ancestry[b]]


def mean_at(cka: Matrix, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean CKA of these pairs."""
    return float(np.mean([cka[a][b] for a, b in pairs]))


def mean_at_distances(cka: Matrix, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean, over these pairs, of the mean CKA of all pairs of layers that are as far apart."""
    return float(np.mean([np.diagonal(np.asarray(cka, dtype=float), b - a).mean() for a, b in pairs]))


def copies(results: str, row: str = "interleave_equal") -> None:
    """Print the comparison of one row's copies with every other row, seed by seed.

    Args:
        results: results.json of a study, or its folder.
        row: name of the row whose copies are compared.

    Raises:
        InputError: the row has no layer similarity, or its layers are no copies.
    """
    study = read_study(Path(results))
    own = stages_of(study, row)
    pairs = {seed: copy_pairs(ancestry) for seed, (ancestry, _) in own.items()}
    if not all(pairs.values()) or not own:
        raise InputError(f"{results} has no copies in the row {row}: give a row that grows and has layer similarity")
    table = Table("row", *(f"seed {seed}" for seed in own), title=f"mean CKA at the distances of copies in {row}")
    table.add_row(f"{row}, copies", *(f"{mean_at(cka, pairs[seed]):.3f}" for seed, (_, cka) in own.items()))
    for other in (each["name"] for each in study.study["rows"]):
        found = stages_of(study, other)
        cells = [f"{mean_at_distances(found[seed][1], pairs[seed]):.3f}" if seed in found else "-" for seed in own]
        table.add_row(f"{other}, all pairs", *cells)
    Console().print(table)


def stages_of(study: StudyFolder, row: str) -> dict[int, tuple[list[int | None], Matrix]]:
    """Ancestry and CKA of a row's students at their last stage, by seed."""
    results = {job.seed or 0: job.result for job in study.of("similarity", row) if job.result.get("runs")}
    return {seed: (each["runs"][-1]["stages"][-1]["ancestry"], each["cka"]) for seed, each in results.items()}


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(copies)
