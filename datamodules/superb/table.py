"""Any other corpus for any task, from a table of tab-separated values with a header line.

The columns are ``path`` (from the table's folder, or absolute), ``split`` (train, dev, and any other names for tests)
and columns of the task. These are ``text`` (PR, ASR), ``text`` and ``tags`` (SF: a slot type or O for each word),
``label`` (KS, SID), or ``action``, ``object`` and ``location`` (IC). ``key`` (utterance id, by default the path without
its suffix) and ``speaker`` are optional. Further columns are ignored, so that several tasks can use one table.
"""

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus
from datamodules.superb.snips import NO_SLOT, require_slots


class TableLayout(NamedTuple):
    """A task's columns, whose values make up the target, and the function that makes a corpus of the rows."""

    columns: tuple[str, ...]
    corpus: Callable[[dict[str, list[Row]], list[list[str]] | None, Reading], SuperbCorpus]


def read_table(
    path: str,
    layout: TableLayout,
    labels: list[list[str]] | None = None,
    reading: Reading = Reading(),  # noqa: B008
) -> SuperbCorpus:
    """Read rows in the table's order. The default label lists are the sorted values that occur in train.

    Raises:
        InputError: the table is missing, lacks a column, a value or a split, a label does not occur in train, or audio
            is bad.
    """
    return layout.corpus(_splits(path, layout.columns), labels, reading)


def _transcribed(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    return measured_corpus(splits, [], reading)


def _tagged(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    slots = labels[0] if labels else _slots(splits["train"])
    for split, rows in splits.items():
        require_slots(split, rows, slots)
    return replace(measured_corpus(splits, [], reading), labels=[slots])


def _labelled(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    columns = splits["train"][0].target.count("\t") + 1
    targets = [lambda row, part=part: row.target.split("\t")[part] for part in range(columns)]
    labels = labels or [sorted({pick(row) for row in splits["train"]}) for pick in targets]
    return measured_corpus(splits, labels, reading, targets)


TEXT = TableLayout(("text",), _transcribed)
SLOTS = TableLayout(("text", "tags"), _tagged)
LABEL = TableLayout(("label",), _labelled)
INTENT = TableLayout(("action", "object", "location"), _labelled)


def require_table(path: str, layout: TableLayout) -> None:
    """Read the table without its audio.

    Raises:
        InputError: the table is missing, or lacks a column, a value or a split.
    """
    _splits(path, layout.columns)


def _splits(path: str, columns: tuple[str, ...]) -> dict[str, list[Row]]:
    if not os.path.isfile(path):
        raise InputError(f"the table {path} does not exist")
    splits: dict[str, list[Row]] = {"train": [], "dev": []}
    # No quoting, because a quotation mark in a transcript is an ordinary character.
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    _require_columns(path, columns, reader.fieldnames or ())
    for line in reader:
        split, row = _row(path, reader.line_num, line, columns)
        splits.setdefault(split, []).append(row)
    if missing := [name for name in ("train", "dev") if not splits[name]]:
        raise InputError(f"{path} has no row of split {missing[0]!r}")
    if len(splits) == 2:
        raise InputError(f"{path} has no test: rows whose split is neither 'train' nor 'dev', such as 'test'")
    return splits


def _row(path: str, number: int, line: dict[str, str | None], columns: tuple[str, ...]) -> tuple[str, Row]:
    values = {name: (line.get(name) or "").strip() for name in ("path", "split", "key", "speaker", *columns)}
    if empty := [name for name in ("path", "split", *columns) if not values[name]]:
        raise InputError(f"{path}, line {number}: {empty[0]} is empty")
    audio = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), values["path"]))
    key = values["key"] or os.path.splitext(values["path"])[0]
    return values["split"], Row(key, audio, 0, "\t".join(values[name] for name in columns), values["speaker"])


def _require_columns(path: str, columns: tuple[str, ...], names: Iterable[str]) -> None:
    names, needed = list(names), ("path", "split", *columns)
    if missing := [name for name in needed if name not in names]:
        raise InputError(
            f"{path} has no column {missing[0]!r}: the task needs a header line with {', '.join(needed)}, "
            "separated by tabs"
        )


def _slots(rows: list[Row]) -> list[str]:
    return sorted({tag for row in rows for tag in row.target.partition("\t")[2].split(" ")} - {NO_SLOT})
