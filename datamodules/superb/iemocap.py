"""IEMOCAP for ER: four emotions, five folds, one for each session as the test, with s3prl's lists of utterances."""

import os
from pathlib import Path
from typing import Any

import torch

from datamodules.errors import InputError
from datamodules.files import read_json
from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, measured_corpus

FOLDS = tuple(f"fold{session}" for session in range(1, 6))
FOLDERS = ("IEMOCAP_full_release", "IEMOCAP")
LISTS = "meta_data"
TRAIN_SHARE = 0.8

PUBLISHED = Published(
    "IEMOCAP",
    "https://sail.usc.edu/iemocap/, on request, and s3prl's lists from its folder s3prl/downstream/emotion/meta_data "
    "(or the Hugging Face data set s3prl/iemocap_split)",
    f"ROOT/{LISTS}/Session1/train_meta_data.json and test_meta_data.json, to Session5\n"
    "ROOT/Session1/sentences/wav/DIALOGUE/UTTERANCE.wav               to Session5\n"
    f"(ROOT may also be the folder that holds {' or '.join(FOLDERS)})",
)


def read_iemocap(root: str, labels: list[list[str]] | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read one fold. The test is one session, in the order of s3prl's list.

    Train and dev are a random split of the other list, 80 to 20, by torch's permutation at seed 0. So they depend on
    the list's order, which is that of a directory listing and cannot be rebuilt from the corpus. The default labels are
    in the order of the list: neu, hap (which includes excited), ang, sad.

    Raises:
        InputError: a file is missing, a list does not have s3prl's form, or audio is bad.
    """
    home = require_iemocap(root)
    session = reading.fold.replace("fold", "Session")
    train, known = _rows(home, os.path.join(home, LISTS, session, "train_meta_data.json"))
    test, _ = _rows(home, os.path.join(home, LISTS, session, "test_meta_data.json"))
    size = int(TRAIN_SHARE * len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    splits = {"train": [train[index] for index in order[:size]], "dev": [train[index] for index in order[size:]]}
    return measured_corpus(splits | {"test": test}, labels or [known], reading, [lambda row: row.target])


def require_iemocap(root: str) -> str:
    """Check the corpus's lists and return its folder.

    Raises:
        InputError: a list is missing.
    """
    inside = (os.path.join(root, name) for name in FOLDERS)
    home = next((path for path in inside if os.path.isdir(path)), root)
    for fold in FOLDS:
        folder = os.path.join(home, LISTS, fold.replace("fold", "Session"))
        PUBLISHED.require(*(os.path.join(folder, f"{split}_meta_data.json") for split in ("train", "test")))
    return home


def _rows(home: str, path: str) -> tuple[list[Row], list[str]]:
    """Rows of a list in its order, and its labels."""
    content = read_json(path)
    try:
        known: dict[str, int] = content["labels"]
        return [_row(home, item) for item in content["meta_data"]], sorted(known, key=lambda label: known[label])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no list of s3prl's: it needs the keys labels and meta_data ({error!r})") from error


def _row(home: str, item: dict[str, Any]) -> Row:
    return Row(Path(item["path"]).stem, os.path.join(home, item["path"]), 0, item["label"], item["speaker"])
