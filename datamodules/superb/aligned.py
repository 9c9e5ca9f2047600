"""Corpora with phone alignments: for PR without a lexicon, and for the probe of frames."""

from collections.abc import Sequence

from datamodules.alignments import find_audio, phone_inventory, phone_sequence, read_split, timed_phones
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
    """Rows whose target is their phones, separated by spaces; the one label list is the inventory, sorted.

    With ``timed`` silence is a phone too, and each phone has its times (:func:`datamodules.alignments.timed_phones`).

    The inventory is that of all splits: a phone that only the held-out speakers use is an error that no head can avoid,
    and counts. Utterances without any phone are left out.

    Raises:
        ValueError: no alignments, none of them with a phone, or bad audio.
    """
    skipped: list[Problem] = []
    inventory: set[str] = set()

    def rows(splits: Sequence[str]) -> list[Row]:
        found: list[Row] = []
        for split in splits:
            alignment = {key: row for key, row in read_split(root, split).items() if phone_sequence(row)}
            paths = find_audio(root, split, alignment)
            inventory.update(
                phone_inventory([alignment]) if timed else set().union(*map(phone_sequence, alignment.values()))
            )
            targets = {
                key: timed_phones(row) if timed else " ".join(phone_sequence(row)) for key, row in alignment.items()
            }
            found += [Row(key, str(paths[key]), 0, target) for key, target in targets.items()]
        if not found:
            raise ValueError(f"the alignments of {', '.join(splits)} below {root} hold nothing but silence")
        measured, problems = measure(found, reading)
        skipped.extend(problems)
        return measured

    train, dev, tests = rows(train_splits), rows(dev_splits), {split: rows([split]) for split in test_splits}
    return SuperbCorpus(train, dev, tests, [sorted(inventory)], skipped)
