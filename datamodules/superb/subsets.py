"""Random subsets of a corpus, for probes: the same for a seed, and such that the task can still be measured."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from datamodules.errors import InputError
from datamodules.superb.rows import Row, SuperbCorpus, Trials

logger = logging.getLogger(__name__)

Unit = Callable[[Row], str]


def limited(
    corpus: SuperbCorpus,
    most_train: int | None,
    most_eval: int | None,
    seed: int,
    classes: bool,
    recording: Unit | None,
) -> SuperbCorpus:
    """Take at most so many utterances of each split.

    Args:
        corpus: the whole corpus.
        most_train: utterances of train; ``None``: all.
        most_eval: utterances of dev and of each test; ``None``: all.
        seed: random seed of the subsets.
        classes: whether a target is a class, of which train and dev then have a quarter of an even share at least,
            where there are as many.
        recording: recording of a row, whose rows stay together; ``None``: each row is one.

    Raises:
        InputError: the trials that are left are all of one kind, or no recording is short enough.
    """

    def evaluated(name: str, rows: list[Row], classes: bool = False) -> list[Row]:
        if trials := corpus.trials.get(name):
            return _of_trials(rows, trials, most_eval, seed)
        return _subset(rows, most_eval, seed, classes, recording)

    found = replace(
        corpus,
        train=_subset(corpus.train, most_train, seed, classes, recording),
        dev=evaluated("dev", corpus.dev, classes),
        tests={name: evaluated(name, rows) for name, rows in corpus.tests.items()},
    )
    if classes:
        _warn_of_missing_classes(found)
    return replace(found, trials={name: _possible(found, name) for name in corpus.trials})


def _subset(rows: list[Row], most: int | None, seed: int, classes: bool, recording: Unit | None) -> list[Row]:
    """At most ``most`` rows, chosen at random and kept in order; all of them if there are no more."""
    if most is None or len(rows) <= most:
        return rows
    units: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault(recording(row) if recording else row.key, []).append(index)
    listed = list(units.values())
    order = [listed[place] for place in np.random.default_rng(seed).permutation(len(listed))]
    if classes:
        order = _rare_first(order, rows, most)
    chosen: list[int] = []
    for unit in order:
        if len(chosen) + len(unit) <= most:
            chosen += unit
    if not chosen:
        raise InputError(
            f"at most {most} parts of recordings are to be used, but every recording has {min(map(len, order))} or "
            "more: give a higher max_train_utterances or max_eval_utterances"
        )
    return [rows[index] for index in sorted(chosen)]


def _rare_first(order: list[list[int]], rows: Sequence[Row], most: int) -> list[list[int]]:
    """The same units, those first that give each class its least number. A subset that has it is not changed."""
    least = max(1, most // (4 * len({row.target for row in rows})))
    seen: Counter[str] = Counter()
    needed: list[list[int]] = []
    others: list[list[int]] = []
    for unit in order:
        label = rows[unit[0]].target
        seen[label] += 1
        (needed if seen[label] <= least else others).append(unit)
    return needed + others


def _of_trials(rows: list[Row], trials: Trials, most: int | None, seed: int) -> list[Row]:
    """The utterances of trials that are drawn until there are ``most``; few pairs are left of random utterances."""
    if most is None or len(rows) <= most:
        return rows
    chosen: set[str] = set()
    for place in np.random.default_rng(seed).permutation(len(trials.pairs)):
        wider = chosen | {trials.pairs[place].first, trials.pairs[place].second}
        if len(wider) > most:
            break
        chosen = wider
    return [row for row in rows if row.key in chosen]


def _possible(corpus: SuperbCorpus, split: str) -> Trials:
    """The trials of a split whose utterances are both in it."""
    keys, trials = {row.key for row in corpus.splits[split]}, corpus.trials[split]
    pairs = [pair for pair in trials.pairs if pair.first in keys and pair.second in keys]
    if len({pair.matches for pair in pairs}) < 2:
        raise InputError(
            f"the trials of {split!r} that are left ({len(pairs)}) are not of both kinds, matching and not matching: "
            "give more utterances, or a higher max_eval_utterances"
        )
    return trials._replace(pairs=pairs)


def _warn_of_missing_classes(corpus: SuperbCorpus) -> None:
    known = {row.target for row in corpus.train}
    for name, rows in corpus.splits.items():
        if missing := sum(row.target not in known for row in rows):
            logger.warning(
                "%d of %d utterances of %s have a label that no utterance of train has, and count as errors: give more "
                "training utterances (--data.max_train_utterances)",
                *(missing, len(rows), name),
            )
