"""Pairs of utterances that ASV and QbE score: every query with every document, and the file of a table's trials."""

import csv
import os
from collections.abc import Collection, Mapping, Sequence

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.rows import Row, Trial

QUERY, DOCUMENT = "query", "document"
"""Targets of QbE's rows."""
COLUMNS = ("split", "first", "second", "matches")


def every_pair(rows: Sequence[Row], matching: Collection[tuple[str, str]]) -> list[Trial]:
    """Every query of the rows with every document; ``matching`` are the keys of those that match."""
    queries, documents = ([row.key for row in rows if row.target == role] for role in (QUERY, DOCUMENT))
    return [Trial(query, document, (query, document) in matching) for query in queries for document in documents]


def trials_file(table: str) -> str:
    """The file of a table's trials: ``X.trials.tsv`` beside ``X.tsv``."""
    return f"{table.removesuffix('.tsv')}.trials.tsv"


def read_trials(table: str, splits: Mapping[str, Sequence[Row]]) -> dict[str, list[Trial]]:
    """Read the trials of a table by split: lines of split, first, second and matches (1 or 0).

    Raises:
        InputError: the file is missing or lacks a column, a split that is scored has no trial, or a trial names an
            utterance that its split lacks.
    """
    path = trials_file(table)
    if not os.path.isfile(path):
        raise InputError(f"the table {table} needs its trials in {path}: columns {', '.join(COLUMNS)}, tab-separated")
    keys = {name: {row.key for row in rows} for name, rows in splits.items() if name != "train"}
    trials: dict[str, list[Trial]] = {name: [] for name in keys}
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise InputError(f"{path} has no column {missing[0]!r}: it needs {', '.join(COLUMNS)}, separated by tabs")
    for line in reader:
        place = f"{path}, line {reader.line_num}"
        split, first, second, matches = ((line[name] or "").strip() for name in COLUMNS)
        if split not in keys:
            raise InputError(f"{place}: {split!r} is no split of {table} that is scored ({', '.join(keys)})")
        if unknown := [key for key in (first, second) if key not in keys[split]]:
            raise InputError(f"{place}: split {split!r} of {table} has no utterance {unknown[0]!r}")
        if matches not in ("0", "1"):
            raise InputError(f"{place}: matches is {matches!r}; give 1 or 0")
        trials[split].append(Trial(first, second, matches == "1"))
    if empty := [name for name, found in trials.items() if not found]:
        raise InputError(f"{path} has no trial of split {empty[0]!r}")
    return trials
