"""Any other corpus for any task, from a table of tab-separated values with a header line.

The columns are ``path`` (from the table's folder, or absolute), ``split`` (train, dev, and any other names for tests)
and columns of the task. These are ``text`` (PR, ASR), ``text`` and ``tags`` (SF: a slot type or O for each word),
``label`` (KS, SID, ER, ASV), ``action``, ``object`` and ``location`` (IC), ``segments`` (SD), or ``role`` (QbE:
query or document). ASV and QbE need a file of trials as well, see :mod:`datamodules.superb.trials`. ``key`` (utterance
id, by default the path without its suffix) and ``speaker`` are optional. Further columns are ignored, so that several
tasks can use one table.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from datamodules.audio import SAMPLE_RATE, BadAudioError, usable_samples
from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.librimix import chunks, require_two_speakers, speech_of
from datamodules.superb.rows import Reading, Row, SuperbCorpus, Trial, Trials, measured_corpus, require_labels
from datamodules.superb.snips import NO_SLOT, require_slots
from datamodules.superb.trials import DOCUMENT, QUERY, every_pair, read_trials


class TableLayout(NamedTuple):
    """The layout of a task's table.

    Attributes:
        columns: the task's columns, whose values make up the target.
        corpus: function that makes a corpus of the rows.
        trials: function that makes a split's trials of its rows and of those in the file; ``None``: there are none.
        has_train: whether the table needs rows of train.
    """

    columns: tuple[str, ...]
    corpus: Callable[[dict[str, list[Row]], list[list[str]] | None, Reading], SuperbCorpus]
    trials: Callable[[list[Row], list[Trial]], list[Trial]] | None = None
    has_train: bool = True


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
    splits = _splits(path, layout)
    corpus = layout.corpus(splits, labels, reading)
    if layout.trials is None:
        return corpus
    trials = {name: Trials(layout.trials(splits[name], listed)) for name, listed in read_trials(path, splits).items()}
    return replace(corpus, trials=trials)


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


def _speakers(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    speakers = labels or [sorted({row.target for row in splits["train"]})]
    require_labels("train", splits["train"], lambda row: row.target, speakers[0])
    return replace(measured_corpus(splits, [], reading), labels=speakers)


def _roles(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    for split, rows in splits.items():
        if (found := {row.target for row in rows}) != {QUERY, DOCUMENT}:
            raise InputError(
                f"split {split!r} has the roles {', '.join(sorted(found))}; it needs {QUERY} and {DOCUMENT}"
            )
    return measured_corpus(splits, [], reading)


def _mixtures(splits: dict[str, list[Row]], labels: list[list[str]] | None, reading: Reading) -> SuperbCorpus:
    chunked = {name: [chunk for row in rows for chunk in _chunks(row, reading)] for name, rows in splits.items()}
    return measured_corpus(chunked, [], reading)


def _chunks(row: Row, reading: Reading) -> Iterator[Row]:
    require_two_speakers(row.path, row.key, speech_of(row.target))
    try:
        samples = usable_samples(row.path, SAMPLE_RATE, reading.min_samples, reading.resample)
    except BadAudioError:
        return iter([row])  # measuring reports it
    return chunks(row, samples / SAMPLE_RATE, reading.hop)


TEXT = TableLayout(("text",), _transcribed)
SLOTS = TableLayout(("text", "tags"), _tagged)
LABEL = TableLayout(("label",), _labelled)
INTENT = TableLayout(("action", "object", "location"), _labelled)
SEGMENTS = TableLayout(("segments",), _mixtures)
SPEAKER = TableLayout(("label",), _speakers, trials=lambda rows, listed: listed)
ROLE = TableLayout(
    ("role",),
    _roles,
    trials=lambda rows, listed: every_pair(rows, {(trial.first, trial.second) for trial in listed if trial.matches}),
    has_train=False,
)


def require_table(path: str, layout: TableLayout) -> None:
    """Read the table without its audio.

    Raises:
        InputError: the table is missing, or lacks a column, a value or a split.
    """
    splits = _splits(path, layout)
    if layout.trials is not None:
        read_trials(path, splits)


def _splits(path: str, layout: TableLayout) -> dict[str, list[Row]]:
    if not os.path.isfile(path):
        raise InputError(f"the table {path} does not exist")
    columns = layout.columns
    needed = ("train", "dev") if layout.has_train else ("dev",)
    splits: dict[str, list[Row]] = {name: [] for name in needed}
    # No quoting, because a quotation mark in a transcript is an ordinary character.
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    _require_columns(path, columns, reader.fieldnames or ())
    for line in reader:
        split, row = _row(path, reader.line_num, line, columns)
        splits.setdefault(split, []).append(row)
    if not layout.has_train:
        splits.pop("train", None)
    if missing := [name for name in needed if not splits[name]]:
        raise InputError(f"{path} has no row of split {missing[0]!r}")
    if len(splits) == len(needed):
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
