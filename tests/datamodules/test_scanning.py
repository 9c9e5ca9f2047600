"""Bad input of a corpus, with both settings of ``on_bad_audio`` and of ``transcripts``."""

import logging
from pathlib import Path

import pytest

from datamodules.audio import BadAudioError
from datamodules.corpus import CorpusSettings, list_files, split_folders
from datamodules.scanning import Problem, Row, scan
from tests.datamodules.corpora import utterance, write_audio, write_corpus, write_transcripts
from tests.datamodules.test_audio import make_bad


def scan_corpus(root: Path, **settings: str) -> tuple[list[Row], list[Problem]]:
    corpus = CorpusSettings(roots=(str(root),), splits=("train",), **settings)
    return scan(list_files(split_folders(corpus)), corpus)


def test_rows_of_a_clean_corpus(tmp_path: Path) -> None:
    rows, problems = scan_corpus(write_corpus(tmp_path, {"train": [500, 600]}))
    assert problems == []
    first = utterance(tmp_path, 0)
    assert rows[0] == Row(str(first), "train/19/198/19-198-0000.flac", 500, "19", "WORD 0")
    assert [row.num_samples for row in rows] == [500, 600]


@pytest.mark.parametrize("kind", ["zero_bytes", "text", "stereo", "short", "rate", "cut_wav", "no_length"])
def test_a_bad_file_is_an_error_or_is_listed(tmp_path: Path, kind: str) -> None:
    write_corpus(tmp_path, {"train": [500, 600]})
    bad = make_bad(utterance(tmp_path, 0).parent, kind)
    with pytest.raises(BadAudioError, match=rf"^{bad}: .*on_bad_audio: skip$"):
        scan_corpus(tmp_path)
    rows, problems = scan_corpus(tmp_path, on_bad_audio="skip")
    assert [row.num_samples for row in rows] == [500, 600]
    assert [problem.path for problem in problems] == [str(bad)]
    assert not problems[0].reason.startswith(str(tmp_path))


def test_a_link_to_nothing_is_bad_audio(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": [500]}, transcripts=False)
    utterance(tmp_path, 1).symlink_to(tmp_path / "nowhere.flac")
    with pytest.raises(BadAudioError, match=r"0001\.flac: does not exist"):
        scan_corpus(tmp_path)


def test_a_file_outside_of_chapters_is_bad_audio(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": [500]})
    write_audio(tmp_path / "train" / "loose.flac", 500)
    with pytest.raises(BadAudioError, match=r"loose\.flac: is not in a SPEAKER/CHAPTER folder"):
        scan_corpus(tmp_path)


def test_several_bad_files_are_counted(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": [500, 10, 20, 30]})
    with pytest.raises(BadAudioError, match=r"0001\.flac: is too short.*\(and 2 more\)$"):
        scan_corpus(tmp_path)


def test_a_split_with_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"train": [10, 20]})
    with pytest.raises(ValueError, match="nothing in the split 'train' is usable"):
        scan_corpus(tmp_path, on_bad_audio="skip")


def test_a_chapter_without_transcripts_matters_only_where_text_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path, {"train": [500]}, transcripts=False)
    rows, _ = scan_corpus(tmp_path)
    assert rows[0].transcript is None
    assert not caplog.records
    with pytest.raises(BadAudioError, match=r"0000\.flac: has no transcript file beside it"):
        scan_corpus(tmp_path, transcripts="required")


@pytest.mark.parametrize(
    ("lines", "message"),
    [([0], r"0001\.flac: has no line in 19-198\.trans\.txt; add '19-198-0001 TEXT'"),
     ([0, 1, 2], r"19-198\.trans\.txt: has a line for 19-198-0002, which has no audio file")],
)  # fmt: skip
def test_gaps_between_transcripts_and_audio(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: list[int], message: str
) -> None:
    write_corpus(tmp_path, {"train": [500, 600]})
    write_transcripts(tmp_path, lines)
    with pytest.raises(BadAudioError, match=message):
        scan_corpus(tmp_path, transcripts="required")
    rows, problems = scan_corpus(tmp_path, transcripts="required", on_bad_audio="skip")
    assert len(problems) == 1
    assert [row.transcript for row in rows] == [f"WORD {number}" for number in lines[:2]]
    with caplog.at_level(logging.WARNING):
        rows, problems = scan_corpus(tmp_path)
    assert (len(rows), problems) == (2, [])
    assert "1 gaps between transcripts and audio" in caplog.text
