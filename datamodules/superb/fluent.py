"""Fluent Speech Commands for IC, read through torchaudio's class; each utterance has an action, object and location."""

import os

from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, in_order_of_appearance, measured_corpus

FOLDER = "fluent_speech_commands_dataset"
CSV = {"train": "train", "dev": "valid", "test": "test"}

PUBLISHED = Published(
    "Fluent Speech Commands",
    "https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/",
    f"ROOT/{FOLDER}/data/{{train,valid,test}}_data.csv     (ROOT may be this folder itself)\n"
    f"ROOT/{FOLDER}/wavs/speakers/SPEAKER/UTTERANCE.wav",
)


def read_fluent(root: str, labels: list[list[str]] | None = None, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the corpus. The default labels are the values of the train csv in order of first appearance.

    Raises:
        InputError: a file is missing, a label does not occur in train, or audio is bad.
    """
    root = require_fluent(root)
    splits = {split: _rows(root, name) for split, name in CSV.items()}
    targets = [lambda row, part=part: row.target.split("\t")[part] for part in range(3)]
    labels = labels or [in_order_of_appearance(map(pick, splits["train"])) for pick in targets]
    return measured_corpus(splits, labels, reading, targets)


def require_fluent(root: str) -> str:
    """Check the corpus's files and return the folder that contains ``fluent_speech_commands_dataset``.

    Raises:
        InputError: a file is missing.
    """
    root = os.path.abspath(root)
    if os.path.basename(root) == FOLDER:
        root = os.path.dirname(root)
    home = os.path.join(root, FOLDER)
    PUBLISHED.require(*(os.path.join(home, "data", f"{name}_data.csv") for name in CSV.values()))
    return root


def _rows(root: str, subset: str) -> list[Row]:
    from torchaudio.datasets import FluentSpeechCommands

    data = FluentSpeechCommands(root, subset)
    rows = []
    for index in range(len(data)):
        path, _, key, speaker, _, *intent = data.get_metadata(index)
        rows.append(Row(key, os.path.join(root, FOLDER, path), 0, "\t".join(intent), str(speaker)))
    return rows
