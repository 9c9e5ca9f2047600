"""PR on a corpus with phone alignments instead of transcripts and a lexicon: targets are phones, silence left out."""

from collections.abc import Sequence

from datamodules.alignments import find_audio, phone_sequence, read_split
from datamodules.scanning import Problem
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measure


def read_aligned(
    root: str,
    train_splits: Sequence[str],
    dev_splits: Sequence[str],
    test_splits: Sequence[str],
    reading: Reading = Reading(),  # noqa: B008
) -> SuperbCorpus:
    """Rows whose target is their phones, separated by spaces; the one label list is the inventory, sorted.

    The inventory is that of all splits: a phone that only the held-out speakers use is an error that no head can avoid,
    and counts. Utterances without any phone are left out.

    Raises:
        ValueError: no alignments, none of them with a phone, or bad audio.
    """
    skipped: list[Problem] = []

    def rows(splits: Sequence[str]) -> list[Row]:
        found: list[Row] = []
        for split in splits:
            spoken = {key: phone_sequence(segments) for key, segments in read_split(root, split).items()}
            paths = find_audio(root, split, spoken)
            found += [Row(key, str(paths[key]), 0, " ".join(phones)) for key, phones in spoken.items() if phones]
        if not found:
            raise ValueError(f"the alignments of {', '.join(splits)} below {root} hold nothing but silence")
        measured, problems = measure(found, reading)
        skipped.extend(problems)
        return measured

    train, dev, tests = rows(train_splits), rows(dev_splits), {split: rows([split]) for split in test_splits}
    everything = [*train, *dev, *(row for part in tests.values() for row in part)]
    inventory = sorted({phone for row in everything for phone in row.target.split()})
    return SuperbCorpus(train, dev, tests, [inventory], skipped)
