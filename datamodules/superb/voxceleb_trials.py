"""VoxCeleb1 for ASV: training speakers, and the trials of the original test list."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, Trial, Trials, in_order_of_appearance, measured_corpus
from datamodules.superb.voxceleb import WAV_FOLDERS, speaker_folders

LISTS = ("voxceleb1_test_v2.txt", "veri_test.txt")

PUBLISHED = Published(
    "VoxCeleb1",
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html (vox1_dev_wav, vox1_test_wav) and "
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/veri_test.txt",
    f"ROOT/{LISTS[1]} (or {LISTS[0]})   lines of '1 id10270/VIDEO/00001.wav id10270/VIDEO/00002.wav'\n"
    "ROOT/wav/id10001/VIDEO/00001.wav     both archives in one folder, or ROOT/dev/wav and ROOT/test/wav",
)


def read_voxceleb1_trials(root: str, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the corpus. Train are all utterances of the speakers that occur in no trial.

    Dev and test are the utterances of the trials, and have the same trials: there is no dev list, and s3prl reports the
    lowest error of ten checkpoints on the test.

    Raises:
        InputError: a file is missing, a line of the list has another form, or audio is bad.
    """
    path = require_voxceleb1_trials(root)
    lines = list(_trials(path))
    names = in_order_of_appearance(name for _, *pair in lines for name in pair)
    tested = {name.partition("/")[0] for name in names}
    folders = speaker_folders(root)
    train = [row for speaker in sorted(folders.keys() - tested) for row in _speaker(folders[speaker], speaker)]
    rows = [_row(_folder_of(folders, name, path), name) for name in names]
    pairs = [Trial(_key(first), _key(second), label == "1") for label, first, second in lines]
    corpus = measured_corpus({"train": train, "dev": rows, "test": rows}, [], reading)
    speakers = sorted({row.target for row in corpus.train})
    trials = Trials(pairs)
    return replace(corpus, labels=[speakers], trials={"dev": trials, "test": trials})


def require_voxceleb1_trials(root: str) -> str:
    """Check that ``root`` has the corpus's files, and return the list of trials.

    Raises:
        InputError: a file or folder is missing.
    """
    there = [path for name in LISTS if os.path.isfile(path := os.path.join(root, name))]
    if not there:
        raise InputError(PUBLISHED.missing(f"{root} has neither {' nor '.join(LISTS)}"))
    if not speaker_folders(root):
        raise InputError(PUBLISHED.missing(f"{root} has no speaker's folder in {' or '.join(WAV_FOLDERS)}"))
    return there[0]


def _trials(path: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(read_lines(path), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in ("0", "1"):
            raise InputError(f"{path}, line {number}: {line!r} is no trial; it needs 1 or 0 and two files")
        yield parts[0], parts[1], parts[2]


def _speaker(folder: str, speaker: str) -> Iterator[Row]:
    """Rows of a speaker, sorted."""
    for place, _, files in sorted(os.walk(os.path.join(folder, speaker))):
        for file in sorted(name for name in files if name.endswith(".wav")):
            yield _row(folder, os.path.relpath(os.path.join(place, file), folder))


def _row(folder: str, name: str) -> Row:
    speaker = name.partition("/")[0]
    return Row(_key(name), os.path.join(folder, name), 0, speaker, speaker)


def _key(name: str) -> str:
    """Utterance id as in s3prl's names of pairs: ``id10270-VIDEO-00001``."""
    return os.path.splitext(name)[0].replace("/", "-")


def _folder_of(folders: Mapping[str, str], name: str, path: str) -> str:
    folder = folders.get(name.partition("/")[0])
    if folder is None or not os.path.isfile(os.path.join(folder, name)):
        raise InputError(f"{path} names {name}, which is in none of {', '.join(sorted({*folders.values()}))}")
    return folder
