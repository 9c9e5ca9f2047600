"""QUESST 2014 for QbE: its English queries and documents, of 8 kHz, and the ground truth of dev and eval."""

import os
import re
from dataclasses import replace
from pathlib import Path

from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.missing import Published
from datamodules.superb.rows import Reading, Row, SuperbCorpus, Trials, measured_corpus
from datamodules.superb.trials import DOCUMENT, QUERY, every_pair

FOLDER, LANGUAGE = "quesst14Database", "nnenglish"
PARTS = {"dev": "dev", "test": "eval"}

PUBLISHED = Published(
    "QUESST 2014",
    "https://speech.fit.vutbr.cz/files/quesst14Database.tgz",
    f"ROOT/{FOLDER}/scoring/language_key_{{utterances,dev,eval}}.lst     (ROOT may be this folder itself)\n"
    f"ROOT/{FOLDER}/scoring/groundtruth_quesst14_{{dev,eval}}/quesst14_{{dev,eval}}.rttm\n"
    f"ROOT/{FOLDER}/{{Audio,dev_queries,eval_queries}}/*.wav",
)


def read_quesst14(root: str, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the English part (138 queries each, 2,438 documents). Test is the eval part; there is no train.

    The ground truth has the queries of all languages. Their numbers are kept, because the published value is a mean
    over all of them.

    Raises:
        InputError: a file is missing or has another form, or audio is bad.
    """
    home = require_quesst14(root)
    documents, total = _rows(home, "utterances", DOCUMENT)
    splits, trials = {}, {}
    for split, part in PARTS.items():
        queries, _ = _rows(home, part, QUERY)
        splits[split] = [*queries, *documents]
        matching = _ground_truth(_rttm(home, part))
        trials[split] = Trials(every_pair(splits[split], matching), len({query for query, _ in matching}), total)
    return replace(measured_corpus(splits, [], reading), trials=trials)


def require_quesst14(root: str) -> str:
    """Check the corpus's files and return its folder.

    Raises:
        InputError: a file is missing.
    """
    inside = os.path.join(root, FOLDER)
    home = inside if os.path.isdir(inside) else root
    PUBLISHED.require(*(_list(home, part) for part in ("utterances", *PARTS.values())))
    PUBLISHED.require(*(_rttm(home, part) for part in PARTS.values()))
    return home


def _list(home: str, part: str) -> str:
    return os.path.join(home, "scoring", f"language_key_{part}.lst")


def _rttm(home: str, part: str) -> str:
    return os.path.join(home, "scoring", f"groundtruth_quesst14_{part}", f"quesst14_{part}.rttm")


def _rows(home: str, part: str, role: str) -> tuple[list[Row], int]:
    """Rows of a list's English files, and the number of all its files."""
    path = _list(home, part)
    lines = [line.split() for line in read_lines(path) if line.strip()]
    if wrong := [line for line in lines if len(line) != 2]:
        raise InputError(f"{path}: {' '.join(wrong[0])!r} is no line of 'FOLDER/FILE LANGUAGE'")
    # The lists name files from the folder above; s3prl drops what precedes the first slash too.
    names = [re.sub(r"^.*?/", "", name) for name, language in lines if language == LANGUAGE]
    if not names:
        raise InputError(f"{path} has no file of the language {LANGUAGE}")
    return [Row(Path(name).stem, os.path.join(home, name), 0, role) for name in names], len(lines)


def _ground_truth(path: str) -> set[tuple[str, str]]:
    """Pairs of query and document of an RTTM file's lines ``LEXEME DOCUMENT 1 START DURATION QUERY ...``.

    The form was taken from public code that reads the file, not from the file itself.
    """
    fields = [line.split() for line in read_lines(path)]
    found = {(line[5], line[1]) for line in fields if len(line) > 5 and line[0] == "LEXEME" and line[5] != "NO_KEYWORD"}
    if not found:
        raise InputError(f"{path} has no line 'LEXEME DOCUMENT 1 START DURATION QUERY'")
    return found
