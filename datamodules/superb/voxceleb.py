"""VoxCeleb1 for SID, with the identification split of 1,251 speakers.

torchaudio's class is not used, because it needs both archives in one folder.
"""

import os
from collections.abc import Mapping

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus

LABELS = [f"id{10001 + speaker}" for speaker in range(1251)]
SPLIT_FILE = "iden_split.txt"
SPLITS = {"train": "1", "dev": "2", "test": "3"}
WAV_FOLDERS = ("wav", "dev/wav", "test/wav")
"""Where speakers' folders may lie: both archives in one folder, or each in its own."""

PUBLISHED = Published(
    "VoxCeleb1",
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html (vox1_dev_wav, vox1_test_wav) and "
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt",
    f"ROOT/{SPLIT_FILE}               lines of '1 id10003/VIDEO/00001.wav' (1 train, 2 dev, 3 test)\n"
    "ROOT/wav/id10001/VIDEO/00001.wav     both archives in one folder, or ROOT/dev/wav and ROOT/test/wav",
)


def read_voxceleb1(root: str, labels: list[list[str]] | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the corpus. The class of id10001 is 0 and that of id11251 is 1250, whether or not the speaker occurs.

    Raises:
        InputError: a file is missing, a speaker is not among the labels, or audio is bad.
    """
    require_voxceleb1(root)
    folders = speaker_folders(root)
    splits = {split: _rows(root, folders, number) for split, number in SPLITS.items()}
    return measured_corpus(splits, labels or [LABELS], reading, [lambda row: row.target])


def require_voxceleb1(root: str) -> None:
    """Check that ``root`` has the corpus's files.

    Raises:
        InputError: a file or folder is missing.
    """
    PUBLISHED.require(os.path.join(root, SPLIT_FILE))
    if not speaker_folders(root):
        raise InputError(PUBLISHED.missing(f"{root} has no speaker's folder in {' or '.join(WAV_FOLDERS)}"))


def speaker_folders(root: str) -> dict[str, str]:
    """Find the folder that holds the folder of each speaker, the first of those that have it."""
    folders: dict[str, str] = {}
    for place in (os.path.join(root, name) for name in WAV_FOLDERS):
        for entry in os.scandir(place) if os.path.isdir(place) else ():
            if entry.is_dir():
                folders.setdefault(entry.name, place)
    return folders


def _rows(root: str, folders: Mapping[str, str], number: str) -> list[Row]:
    """The rows of one number of the list, sorted."""
    path = os.path.join(root, SPLIT_FILE)
    rows = []
    for place, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) != 2 or words[0] not in SPLITS.values() or words[1].count("/") != 2:
            raise InputError(f"{path}, line {place}: {line!r} is no entry; it needs 1, 2 or 3 and ID/VIDEO/FILE.wav")
        if words[0] == number:
            speaker = words[1].partition("/")[0]
            key = os.path.splitext(words[1])[0].replace("/", "-")
            rows.append(Row(key, os.path.join(folders.get(speaker, root), words[1]), 0, speaker, speaker))
    return sorted(rows, key=lambda row: row.key)
