"""Random subsets of corpora, with which a task can still be measured."""

import logging
from collections import Counter
from pathlib import Path

import pytest

from datamodules.superb.registry import SuperbData, find_source, read_corpus
from datamodules.superb.rows import Row, SuperbCorpus, Trial, Trials
from datamodules.superb.subsets import limited
from tests.datamodules.superb import corpora


def rows(counts: dict[str, int]) -> list[Row]:
    keys = [(label, f"{label}-{number}") for label, count in counts.items() for number in range(count)]
    return [Row(key, f"{key}.wav", 16_000, target=label) for label, key in keys]


def corpus_of(train: list[Row], test: list[Row], trials: list[Trial] | None = None) -> SuperbCorpus:
    return SuperbCorpus(train, test, {"test": test}, [], trials={"test": Trials(trials)} if trials else {})


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_is_trained_on(seed: int) -> None:
    """Of Speech Commands' 51,094 utterances six are silence, which a random subset has not."""
    words = {f"word{number}": 1_850 for number in range(11)}
    corpus = corpus_of(rows(words | {"_silence_": 6}), rows({"_silence_": 300}))
    counts = Counter(row.target for row in limited(corpus, 500, 200, seed, True, None).train)
    assert (counts.total(), counts["_silence_"]) == (500, 6)
    assert min(counts.values()) >= 6
    without = limited(corpus, 500, 200, seed, False, None).train
    assert Counter(row.target for row in without)["_silence_"] < 6  # control


def test_a_subset_in_which_no_class_is_rare_is_the_plain_one() -> None:
    corpus = corpus_of(rows({"bed": 210, "cat": 205, "dog": 206}), rows({"bed": 3}))
    assert limited(corpus, 500, None, 0, True, None) == limited(corpus, 500, None, 0, False, None)


def test_classes_that_train_lacks_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    speakers = {f"id{number}": 1 for number in range(20)}
    with caplog.at_level(logging.WARNING):
        limited(corpus_of(rows(speakers), rows(speakers)), 5, None, 0, True, None)
    assert "15 of 20 utterances of test have a label that no utterance of train has" in caplog.text
    caplog.clear()
    limited(corpus_of(rows(speakers), rows(speakers)), None, None, 0, True, None)
    assert caplog.text == ""


def test_pairs_are_drawn_and_not_utterances() -> None:
    """Of random utterances of a long list hardly a pair would be left."""
    test = rows({"id": 1_000})
    pairs = [Trial(f"id-{k}", f"id-{(k + 1) % 1_000}", bool(k % 2)) for k in range(1_000)]
    corpus = corpus_of(rows({"other": 3}), test, pairs)
    found = limited(corpus, None, 100, 3, False, None)
    assert 98 <= len(found.tests["test"]) <= 100
    assert len(found.trials["test"].pairs) >= 50
    assert limited(corpus, None, 100, 3, False, None) == found
    assert limited(corpus, None, None, 3, False, None) == corpus


def test_a_recording_is_in_it_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.superb.librimix.CHUNK_FRAMES", 20)
    root = str(corpora.librimix(tmp_path))
    whole, recording = read_corpus("sd", SuperbData(root)), find_source("sd").recording
    assert recording is not None
    sizes = Counter(recording(row) for row in whole.train)
    assert min(sizes.values()) > 1
    for most in range(max(sizes.values()), len(whole.train)):
        some = Counter(map(recording, read_corpus("sd", SuperbData(root, max_train_utterances=most)).train))
        assert some
        assert some.items() <= sizes.items()


def test_recordings_that_are_all_too_long_are_an_error() -> None:
    test = rows({"meeting": 9})
    with pytest.raises(ValueError, match=r"at most 8 parts of recordings .* has 9 or more"):
        limited(corpus_of(rows({"other": 2}), test), None, 8, 0, False, lambda row: row.target)


def test_a_recording_of_which_a_part_is_bad_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.superb.librimix.CHUNK_FRAMES", 20)
    root, recording = corpora.librimix(tmp_path), find_source("sd").recording
    assert recording is not None
    first, *_ = sorted((root / "diarization" / "test" / "wav").iterdir())
    corpora.write_tone(first, 0.9, 0)  # its list says 1 s, so that only its last part is missing
    corpus = read_corpus("sd", SuperbData(str(root), on_bad_audio="skip"))
    assert len(corpus.skipped) == 1
    assert {recording(row) for row in corpus.tests["test"]} == {"test-1"}
