"""The common form of all SUPERB corpora: rows of audio file and target, in splits, with label lists."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from datamodules.audio import SAMPLE_RATE, BadAudioError, usable_samples
from datamodules.errors import InputError
from datamodules.frames import HOP
from datamodules.scanning import Problem
from datamodules.superb.effects import NO_EFFECTS, Effects
from datamodules.superb.lengths import Lengths

MIN_SAMPLES = 400
"""Samples of one frame of a HuBERT-like front end; shorter audio is bad audio."""


@dataclass(frozen=True)
class Row:
    """One utterance.

    ``target`` depends on the task. For PR and ASR it is the transcript, for SF ``w1 w2 ...<TAB>tag1 tag2 ...``, for KS,
    SID, ASV and ER the label, for IC ``action<TAB>object<TAB>location``, for SD the segments of speech (see
    :func:`datamodules.superb.librimix.speech_of`), for QbE "query" or "document". It is empty if a task has none.
    """

    key: str  # utterance id, as in the hypothesis files
    path: str
    num_samples: int  # at 16 kHz, after the recipe's effects; 0 until it is measured
    target: str
    speaker: str = ""
    start: int = 0  # first sample of the utterance in the file, at 16 kHz


class Trial(NamedTuple):
    """A pair of utterances of one split that is scored: two recordings of ASV, a query and a document of QbE."""

    first: str  # key of a row
    second: str
    matches: bool  # whether they have the same speaker, or the document holds the query


class Trials(NamedTuple):
    """All pairs of a split.

    Attributes:
        pairs: the pairs to score.
        queries: queries of the whole ground truth that match a document, if the split has only some of them (QUESST's
            English ones); 0: those of the pairs.
        documents: documents of the whole collection; 0: those of the pairs.
    """

    pairs: list[Trial]
    queries: int = 0
    documents: int = 0


@dataclass(frozen=True)
class SuperbCorpus:
    """The rows on which a task is trained and scored.

    ``labels`` has one list for KS, SID, ASV and ER, three for IC (action, object, location), the slot types for SF, and
    none for the other tasks. A label's class is its index in the list. ``skipped`` lists the audio that was left out,
    with reasons. ``trials`` are the pairs to score by split, for ASV and QbE. ``too_short`` counts the utterances of
    train that were left out because the recipe asks for longer ones.
    """

    train: list[Row]
    dev: list[Row]
    tests: dict[str, list[Row]]
    labels: list[list[str]]
    skipped: list[Problem] = field(default_factory=list)
    trials: dict[str, Trials] = field(default_factory=dict)
    too_short: int = 0

    @property
    def splits(self) -> dict[str, list[Row]]:
        return {"train": self.train, "dev": self.dev, **self.tests}


@dataclass(frozen=True)
class Reading:
    """Settings with which a corpus is read.

    Attributes:
        resample: convert audio of other rates; see :func:`datamodules.audio.usable_samples`.
        on_bad_audio: "error" stops at the first bad file; "skip" leaves bad files out.
        min_samples: samples of the shortest usable utterance.
        effects: effects after which utterances are measured.
        cache_dir: folder in which measured lengths are kept; ``None``: the default folder.
        hop: samples from one frame of the encoder to the next, which decide on the chunks of SD.
        fold: the fold to read of a corpus that has folds.
    """

    resample: bool = False
    on_bad_audio: str = "error"
    min_samples: int = MIN_SAMPLES
    effects: Effects = NO_EFFECTS
    cache_dir: str | None = None
    hop: int = HOP
    fold: str = ""


def measure(rows: Iterable[Row], reading: Reading) -> tuple[list[Row], list[Problem]]:
    """Return the usable rows with their lengths, and the files that cannot be used.

    Lengths are from the files' headers; only effects that cut silence need decoded audio. A row that has a length
    already keeps it, and its file must be long enough.

    Raises:
        BadAudioError: a file cannot be used and ``reading.on_bad_audio`` is "error".
        InputError: no file is usable.
    """
    rows = list(rows)
    lengths = None
    if rows and reading.effects.remove_silence:
        lengths = Lengths((row.path for row in rows), reading.effects, reading.resample, reading.cache_dir)
    found: list[Row | Problem] = []
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        chunks = [rows[start : start + 256] for start in range(0, len(rows), 256)]
        for part in pool.map(lambda chunk: [_measured(row, reading, lengths) for row in chunk], chunks):
            found += part
            if lengths is not None:
                lengths.save(force=len(found) == len(rows))
    problems = [item for item in found if isinstance(item, Problem)]
    usable = [item for item in found if isinstance(item, Row)]
    if problems and reading.on_bad_audio == "error":
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        remedy = "or leave such files out with on_bad_audio: skip"
        raise BadAudioError(f"{problems[0].path}: {problems[0].reason}, {remedy}{others}")
    if rows and not usable:
        raise InputError(f"none of {len(rows)} files is usable, the first: {problems[0].path}: {problems[0].reason}")
    return usable, problems


def measured_corpus(
    splits: dict[str, list[Row]],
    labels: list[list[str]],
    reading: Reading,
    targets: Sequence[Callable[[Row], str]] = (),
) -> SuperbCorpus:
    """Make the corpus of splits "train", "dev" and any number of tests, with lengths read and labels checked.

    Args:
        splits: rows whose ``num_samples`` is not known yet. "train" may be absent if the task trains nothing.
        labels: the label lists.
        reading: settings for checking the audio.
        targets: for each label list, a function that returns a row's label.

    Raises:
        InputError: a split is empty, a key occurs twice, or a label is not in its list.
    """
    measured: dict[str, list[Row]] = {}
    skipped: list[Problem] = []
    for name, rows in splits.items():
        if not rows:
            raise InputError(f"the split {name!r} has no utterance; it needs at least one")
        _require_unique_keys(name, rows)
        for pick, known in zip(targets, labels, strict=True):
            require_labels(name, rows, pick, known)
        # How much training audio is left without silence is for min_train_samples to judge.
        cut = name == "train" and reading.effects.remove_silence
        measured[name], problems = measure(rows, replace(reading, min_samples=0) if cut else reading)
        skipped += problems
    return SuperbCorpus(measured.pop("train", []), measured.pop("dev"), measured, labels, skipped)


def require_labels(split: str, rows: Iterable[Row], pick: Callable[[Row], str], known: Sequence[str]) -> None:
    """Check that every label is in the list, since an utterance with another label could not be scored.

    Raises:
        InputError: a label is not in the list; the first one and its file are named.
    """
    classes = set(known)
    for row in rows:
        if (label := pick(row)) not in classes:
            raise InputError(
                f"{row.path}: the label {label!r} of split {split!r} is not among the {len(known)} labels "
                f"({', '.join(known[:5])}, ...): a label must occur in train; if it is meant to be missing there, give "
                "the whole list as the setting `labels`, and its utterances count as errors"
            )


def in_order_of_appearance(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _measured(row: Row, reading: Reading, lengths: Lengths | None) -> Row | Problem:
    try:
        least = row.start + row.num_samples or (reading.min_samples if lengths is None else 1)
        num_samples = usable_samples(row.path, SAMPLE_RATE, least, reading.resample)
        if lengths is not None and (num_samples := lengths.of(row.path)) < reading.min_samples:
            problem = f"has {num_samples} samples without its silence, at least {reading.min_samples} are needed"
            return Problem(row.path, problem)
    except BadAudioError as error:
        return Problem(row.path, str(error).removeprefix(f"{row.path}: "))
    return replace(row, num_samples=row.num_samples or num_samples)


def _require_unique_keys(split: str, rows: Iterable[Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.key in seen:
            raise InputError(
                f"{row.path} and {seen[row.key]} have the same utterance id {row.key!r} in split {split!r}"
            )
        seen[row.key] = row.path
