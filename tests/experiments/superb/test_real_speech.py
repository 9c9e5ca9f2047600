"""The tables of the probes on real speech, and the table of their results."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from experiments.superb.real_speech import HELD_OUT_SPEAKERS, PROBES, UPSTREAMS, markdown, write_tables
from experiments.superb.throughput import seconds_per_update


@pytest.fixture(scope="module")
def tables(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("tables")
    write_tables(real_data, folder)
    read = {}
    for path in folder.iterdir():
        with path.open(encoding="utf-8", newline="") as file:
            read[path.stem] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return read


def values(rows: list[dict[str, str]], column: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[row["split"]].add(row[column])
    return found


def test_phones_are_tested_on_speakers_that_training_never_heard(tables: dict[str, list[dict[str, str]]]) -> None:
    speakers = values(tables["dev_clean"], "speaker")
    assert speakers["test"] == set(HELD_OUT_SPEAKERS)
    assert len(speakers["train"]) == 12
    assert not speakers["train"] & (speakers["test"] | speakers["test-other"])


def test_speakers_and_words_are_the_same_in_every_split(tables: dict[str, list[dict[str, str]]]) -> None:
    for name, count in (("speakers", 15), ("fsdd", 6), ("three_words", 3)):
        labels = values(tables[name], "label")
        assert labels["train"] == labels["dev"] == labels["test"]
        assert len(labels["train"]) == count
    # But of other people, as Speech Commands splits by speaker.
    speakers = values(tables["three_words"], "speaker")
    assert not speakers["train"] & (speakers["dev"] | speakers["test"])


def test_no_recording_is_in_two_splits(tables: dict[str, list[dict[str, str]]]) -> None:
    for rows in tables.values():
        assert len({row["key"] for row in rows}) == len({row["path"] for row in rows}) == len(rows)


def test_the_table_has_a_row_for_each_test_set() -> None:
    def result(metric: str) -> dict[str, Any]:
        tests = {"test": {metric: 12.34}, "other": {metric: 50.0}}
        return {"tests": tests, "utterances": {"train": 9, "test": 3, "other": 4}, "layer_weights": [0.2, 0.8]}

    lines = markdown(PROBES, {(u, p.name): result(p.metric) for u in UPSTREAMS for p in PROBES}).splitlines()
    assert len(lines) == 2 + 2 * len(PROBES)
    assert lines[2] == "| PR, per | test | 9 / 3 | 12.3 [1] | 12.3 [1] | 12.3 [1] |"


@pytest.mark.parametrize("cached", [False, True])
def test_an_update_is_timed(cached: bool) -> None:
    assert seconds_per_update("ks", "fbank", cached, updates=1) > 0
