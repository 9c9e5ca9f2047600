"""Speech Commands v0.01 for KS: ten keywords, ``_unknown_`` and ``_silence_``, split by the hash of the speaker.

torchaudio's class is not used, because it drops the background noise and every file without ``_nohash_``, which
includes all silence of the test archive.
"""

import hashlib
import os
import re
from collections.abc import Iterator

from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
LABELS = [*KEYWORDS, UNKNOWN, SILENCE]
NOISE_FOLDER = "_background_noise_"
MOST_PER_CLASS = 2**27 - 1
TRAIN_ARCHIVE, TEST_ARCHIVE = "speech_commands_v0.01", "speech_commands_test_set_v0.01"

PUBLISHED = Published(
    "Speech Commands v0.01",
    "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz and "
    "http://download.tensorflow.org/data/speech_commands_test_set_v0.01.tar.gz",
    f"ROOT/{TRAIN_ARCHIVE}/WORD/SPEAKER_nohash_N.wav     30 words (ROOT may be this folder itself)\n"
    f"ROOT/{TRAIN_ARCHIVE}/{NOISE_FOLDER}/*.wav    6 recordings\n"
    f"ROOT/{TEST_ARCHIVE}/LABEL/*.wav      12 labels; elsewhere: the setting test_root",
)


def read_speech_commands(root: str, test_root: str | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the published split: hash below 10 % is dev, 10 to 20 % is left out, the rest train; test is an archive.

    The recordings of background noise belong to train and to dev, one row each; a data module crops them.

    Raises:
        InputError: a folder is missing, or audio is bad.
    """
    train_root, test_root = require_speech_commands(root, test_root)
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": list(_test_rows(test_root))}
    for row in _word_rows(train_root):
        if (split := split_of(os.path.basename(row.path))) is not None:
            splits[split].append(row)
    noise = list(_files(train_root, NOISE_FOLDER, SILENCE))
    splits["train"] += noise
    splits["dev"] += noise
    return measured_corpus(splits, [LABELS], reading, [lambda row: row.target])


def require_speech_commands(root: str, test_root: str | None = None) -> tuple[str, str]:
    """Check the corpus's folders and return those of the words and of the test.

    Raises:
        InputError: a folder is missing.
    """
    train_root = os.path.join(root, TRAIN_ARCHIVE)
    train_root = train_root if os.path.isdir(train_root) else root
    test_root = test_root or os.path.join(root, TEST_ARCHIVE)
    PUBLISHED.require(train_root, os.path.join(train_root, NOISE_FOLDER), test_root)
    return train_root, test_root


def split_of(name: str) -> str | None:
    """Split of a file by the speaker, its name before ``_nohash_``; ``None`` for the tenth that is left out."""
    speaker = re.sub(r"_nohash_.*$", "", name)
    percentage = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (MOST_PER_CLASS + 1) * 100.0 / MOST_PER_CLASS
    if percentage < 10:
        return "dev"
    return None if percentage < 20 else "train"


def _word_rows(root: str) -> Iterator[Row]:
    for word in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        # A test archive unpacked beside the words is not a word.
        if word != NOISE_FOLDER and not word.startswith((".", "speech_commands_")):
            yield from _files(root, word, word if word in KEYWORDS else UNKNOWN)


def _test_rows(root: str) -> Iterator[Row]:
    for label in LABELS:
        PUBLISHED.require(os.path.join(root, label))
        yield from _files(root, label, label)


def _files(root: str, folder: str, label: str) -> Iterator[Row]:
    names = sorted(name for name in os.listdir(os.path.join(root, folder)) if name.lower().endswith(".wav"))
    for name in names:
        stem = os.path.splitext(name)[0]
        # The leaderboard's key. A speaker's file of one number has the same name in the folder of every word.
        yield Row(f"{folder}-{name}", os.path.join(root, folder, name), 0, label, stem.partition("_nohash_")[0])
