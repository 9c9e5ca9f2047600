"""Any other corpus for any task, from a table of tab-separated values with a header line.

The columns are ``path`` (from the table's folder, or absolute), ``split`` (train, dev, and any other names for tests)
and columns of the task. These are ``text`` (PR, ASR), ``text`` and ``tags`` (SF: a slot type or O for each word),
``label`` (KS, SID), or ``action``, ``object`` and ``location`` (IC). ``key`` (utterance id, by default the path without
its suffix) and ``speaker`` are optional. Further columns are ignored, so that several tasks can use one table.
"""

import csv
import os
from collections.abc import Iterable

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus
from datamodules.superb.snips import NO_SLOT, require_slots

COLUMNS = {
    "pr": ("text",),
    "asr": ("text",),
    "sf": ("text", "tags"),
    "ks": ("label",),
    "sid": ("label",),
    "ic": ("action", "object", "location"),
}
CLASSIFICATION = ("ks", "sid", "ic")


def read_table(
    path: str,
    task: str,
    labels: list[list[str]] | None = None,
    reading: Reading = Reading(),  # noqa: B008
) -> SuperbCorpus:
    """Read rows in the table's order. The default label lists are the sorted values that occur in train.

    Raises:
        InputError: the table is missing, lacks a column, a value or a split, a label does not occur in train, or audio
            is bad.
    """
    splits = _splits(path, task)
    if task in CLASSIFICATION:
        targets = [lambda row, part=part: row.target.split("\t")[part] for part in range(len(COLUMNS[task]))]
        labels = labels or [sorted({pick(row) for row in splits["train"]}) for pick in targets]
        return measured_corpus(splits, labels, reading, targets)
    if task != "sf":
        return measured_corpus(splits, [], reading)
    slots = labels[0] if labels else _slots(splits["train"])
    for split, rows in splits.items():
        require_slots(split, rows, slots)
    corpus = measured_corpus(splits, [], reading)
    return SuperbCorpus(corpus.train, corpus.dev, corpus.tests, [slots], corpus.skipped)


def require_table(path: str, task: str) -> None:
    """Read the table without its audio.

    Raises:
        InputError: the table is missing, or lacks a column, a value or a split.
    """
    _splits(path, task)


def _splits(path: str, task: str) -> dict[str, list[Row]]:
    if not os.path.isfile(path):
        raise InputError(f"the table {path} does not exist")
    splits: dict[str, list[Row]] = {"train": [], "dev": []}
    # No quoting, because a quotation mark in a transcript is an ordinary character.
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    _require_columns(path, task, reader.fieldnames or ())
    for line in reader:
        split, row = _row(path, reader.line_num, line, COLUMNS[task])
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


def _require_columns(path: str, task: str, names: Iterable[str]) -> None:
    names, needed = list(names), ("path", "split", *COLUMNS[task])
    if missing := [name for name in needed if name not in names]:
        raise InputError(
            f"{path} has no column {missing[0]!r}: task {task} needs a header line with {', '.join(needed)}, "
            "separated by tabs"
        )


def _slots(rows: list[Row]) -> list[str]:
    return sorted({tag for row in rows for tag in row.target.partition("\t")[2].split(" ")} - {NO_SLOT})
