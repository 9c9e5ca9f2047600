"""The corpus of the study with Whisper: what is in which split, and that nothing held out is trained on."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from experiments.corpora.real_speech import LONGEST_PIECE, SOURCES, real_speech_corpus

SECONDS = {"1-1-0000": 2.0, "1-1-0001": 12.5, "2277-1-0000": 3.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every source folder with a short and a long utterance, and one of a held-out speaker."""
    generator = np.random.default_rng(0)
    lines = ["set\tpath\tseconds\tspeaker\tlabel\ttext"]
    for source in {source for sources in SOURCES.values() for source in sources}:
        for number, (name, seconds) in enumerate(SECONDS.items()):
            speaker, chapter, _ = name.split("-")
            path = tmp_path / "data" / source / speaker / chapter / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, generator.uniform(-0.1, 0.1, int(seconds * 16_000)), 16_000)
            with (path.parent / f"{speaker}-{chapter}.trans.txt").open("a") as transcripts:
                transcripts.write(f"{name} HELLO\n")
            relative = path.relative_to(tmp_path / "data")
            lines.append(f"{source}\t{relative}\t{seconds}\t{speaker}\t{number}\tHELLO")
    lines += ["fsdd\tfsdd/0_a_0.flac\t1.0\ta\t0\t", "speech_commands_3words\twords/cat/a_nohash_0.flac\t1.0\ta\tcat\t"]
    (tmp_path / "data" / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.flac")}


def test_held_out_speech_is_in_no_training_split(data: Path, tmp_path: Path) -> None:
    real_speech_corpus(str(data), str(tmp_path / "corpus"))
    splits = tmp_path / "corpus" / "LibriSpeech"
    assert names(splits / "train") == {"1-1-0000-0.flac", *(f"1-1-0001-{piece}.flac" for piece in range(3))}
    assert names(splits / "labelled") == {"1-1-0000.flac", "1-1-0001.flac"}
    assert names(splits / "dev") == {"2277-1-0000.flac"}
    assert names(splits / "test-other") == {f"{name}.flac" for name in SECONDS}
    assert (splits / "labelled" / "1" / "1" / "1-1.trans.txt").is_file()
    assert {path.name for path in (tmp_path / "corpus" / "tables").iterdir()} >= {"speakers.tsv", "three_words.tsv"}


def test_pieces_are_the_utterance_and_are_written_once(data: Path, tmp_path: Path) -> None:
    real_speech_corpus(str(data), str(tmp_path / "corpus"))
    pieces = sorted((tmp_path / "corpus" / "LibriSpeech" / "train" / "1" / "1").glob("1-1-0001-*.flac"))
    heard = [soundfile.read(piece, dtype="int16")[0] for piece in pieces]
    assert max(map(len, heard)) <= LONGEST_PIECE
    # The last of the sources that hold an utterance of this name would have won: the first one stays.
    whole, _ = soundfile.read(data / SOURCES["train"][0] / "1" / "1" / "1-1-0001.flac", dtype="int16")
    assert np.array_equal(np.concatenate(heard), whole)
    times = [piece.stat().st_mtime_ns for piece in pieces]
    real_speech_corpus(str(data), str(tmp_path / "corpus"))
    assert [piece.stat().st_mtime_ns for piece in pieces] == times


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder LibriSpeech/train-clean-100: --data is the folder"):
        real_speech_corpus(str(tmp_path), str(tmp_path / "corpus"))
