"""Corpora with phone alignments, for PR without a lexicon and for the frame probe."""

from collections.abc import Sequence

from datamodules.alignments import SILENCE, find_audio, phone_sequence, read_split, segments_of, timed_phones
from datamodules.errors import InputError
from datamodules.scanning import Problem
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measure


def read_aligned(
    root: str,
    train_splits: Sequence[str],
    dev_splits: Sequence[str],
    test_splits: Sequence[str],
    reading: Reading = Reading(),  # noqa: B008
    timed: bool = False,
) -> SuperbCorpus:
    """Read rows whose target is their phones, separated by spaces; the one label list is the sorted inventory.

    With ``timed`` silence is a phone too, and each phone has its times (:func:`datamodules.alignments.timed_phones`).

    The inventory covers all splits. A phone that only held-out speakers use cannot be predicted by any head, but still
    counts as an error. Utterances without any phone are left out.

    Raises:
        InputError: there are no alignments, none of them has a phone, or audio is bad.
    """
    skipped: list[Problem] = []

    def rows(splits: Sequence[str]) -> list[Row]:
        found: list[Row] = []
        for split in splits:
            spoken = {key: row for key, row in read_split(root, split).items() if phone_sequence(row)}
            paths = find_audio(root, split, spoken)
            for key, row in spoken.items():
                found.append(
                    Row(key, str(paths[key]), 0, timed_phones(row) if timed else " ".join(phone_sequence(row)))
                )
        if not found:
            raise InputError(f"the alignments of {', '.join(splits)} below {root} hold nothing but silence")
        measured, problems = measure(found, reading)
        skipped.extend(problems)
        return measured

    train, dev, tests = rows(train_splits), rows(dev_splits), {split: rows([split]) for split in test_splits}
    everything = [*train, *dev, *(row for part in tests.values() for row in part)]
    if timed:
        inventory = {SILENCE, *(segment.phone for row in everything for segment in segments_of(row.target))}
    else:
        inventory = {phone for row in everything for phone in row.target.split()}
    return SuperbCorpus(train, dev, tests, [sorted(inventory)], skipped)
