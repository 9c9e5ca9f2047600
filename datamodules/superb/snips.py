"""Audio SNIPS for SF, read through torchaudio's class: words, each with a slot tag, spoken by 16 voices."""

import os

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus

SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "dev": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
FOLDERS = {"train": "train", "dev": "valid", "test": "test"}
NO_SLOT = "O"

PUBLISHED = Published(
    "Audio SNIPS",
    "the link in s3prl's documentation of the SF task (a copy that is already in WAV; the original bucket is gone)",
    "ROOT/SNIPS/{train,valid,test}/SPEAKER-snips-SPLIT-N.wav     (ROOT may be SNIPS itself; .mp3 works too)\n"
    "ROOT/SNIPS/all.iob.snips.txt     lines of 'SPEAKER-snips-SPLIT-N BOS w1 ... EOS<TAB>O tag1 ... INTENT'\n"
    "ROOT/SNIPS/slots.txt             'O', then one slot type a line",
)


def read_snips(root: str, labels: list[list[str]] | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the published split by speaker; the corpus's one label list is its slot types.

    Raises:
        InputError: a file is missing, words and tags differ in number, a slot type is unknown, or audio is bad.
    """
    root = require_snips(root)
    slots = labels[0] if labels else read_slots(os.path.join(root, "SNIPS", "slots.txt"))
    splits = {split: _rows(root, split) for split in FOLDERS}
    for split, rows in splits.items():
        require_slots(split, rows, slots)
    corpus = measured_corpus(splits, [], reading)
    return SuperbCorpus(corpus.train, corpus.dev, corpus.tests, [slots], corpus.skipped)


def require_snips(root: str) -> str:
    """Check the corpus's files and return the folder that contains ``SNIPS``.

    Raises:
        InputError: a file or folder is missing.
    """
    root = os.path.abspath(root)
    if os.path.basename(root) == "SNIPS":
        root = os.path.dirname(root)
    home = os.path.join(root, "SNIPS")
    PUBLISHED.require(*(os.path.join(home, name) for name in ("all.iob.snips.txt", "slots.txt", *FOLDERS.values())))
    return root


def read_slots(path: str) -> list[str]:
    """The slot types of ``slots.txt``, in its order, without the first line ``O``."""
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines or lines[0] != NO_SLOT:
        raise InputError(f"{path} must begin with a line {NO_SLOT!r}, then list one slot type a line")
    return lines[1:]


def require_slots(split: str, rows: list[Row], slots: list[str]) -> None:
    """Check that every target has a tag for every word, and that every tag is a known slot type or ``O``.

    Raises:
        InputError: a target does not; the first one is named.
    """
    known = {NO_SLOT, *slots}
    for row in rows:
        words, _, tags = row.target.partition("\t")
        if len(words.split(" ")) != len(tags.split(" ")):
            raise InputError(
                f"{row.path}: {len(words.split(' '))} words but {len(tags.split(' '))} tags in split {split!r}; "
                "every word needs one"
            )
        if unknown := set(tags.split(" ")) - known:
            raise InputError(
                f"{row.path}: the slot {min(unknown)!r} of split {split!r} is not among the {len(slots)} slot types"
            )


def _rows(root: str, split: str) -> list[Row]:
    from torchaudio.datasets import Snips

    folder = FOLDERS[split]
    audio_format = "wav" if _has_wav(os.path.join(root, "SNIPS", folder)) else "mp3"
    data = Snips(root, folder, list(SPEAKERS[split]), audio_format)
    if not len(data):
        voices = ", ".join(SPEAKERS[split])
        raise InputError(PUBLISHED.missing(f"{root}/SNIPS/{folder} has no audio of {voices}"))
    rows = []
    for index in range(len(data)):
        try:
            path, _, key, words, tags, _ = data.get_metadata(index)
        except KeyError as error:
            raise InputError(
                f"{data.data[index]} has no line in all.iob.snips.txt; add it or remove the file"
            ) from error
        rows.append(Row(key, os.path.join(root, "SNIPS", path), 0, f"{words}\t{tags}", key.partition("-")[0]))
    return rows


def _has_wav(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".wav") for entry in entries)
