"""VoxCeleb1 for SID, read through torchaudio's class, with the identification split of 1,251 speakers."""

import os

from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus

LABELS = [f"id{10001 + speaker}" for speaker in range(1251)]
SPLIT_FILE = "iden_split.txt"

PUBLISHED = Published(
    "VoxCeleb1",
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html (vox1_dev_wav, vox1_test_wav) and "
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt",
    f"ROOT/{SPLIT_FILE}               lines of '1 id10003/VIDEO/00001.wav' (1 train, 2 dev, 3 test)\n"
    "ROOT/wav/id10001/VIDEO/00001.wav     dev and test archives unpacked into one folder",
)


def read_voxceleb1(root: str, labels: list[list[str]] | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the corpus. The class of id10001 is 0 and that of id11251 is 1250, whether or not the speaker occurs.

    Raises:
        InputError: a file is missing, a speaker is not among the labels, or audio is bad.
    """
    require_voxceleb1(root)
    splits = {split: _rows(root, split) for split in ("train", "dev", "test")}
    return measured_corpus(splits, labels or [LABELS], reading, [lambda row: row.target])


def require_voxceleb1(root: str) -> None:
    """Check that ``root`` has the corpus's files.

    Raises:
        InputError: a file or folder is missing.
    """
    PUBLISHED.require(os.path.join(root, "wav"), os.path.join(root, SPLIT_FILE))


def _rows(root: str, subset: str) -> list[Row]:
    from torchaudio.datasets import VoxCeleb1Identification

    data = VoxCeleb1Identification(root, subset)
    rows = []
    for index in range(len(data)):
        path, _, _, key = data.get_metadata(index)
        speaker = key.partition("-")[0]
        rows.append(Row(key, os.path.join(root, "wav", path), 0, speaker, speaker))
    return rows
