"""Corpora for ASV, SD and QbE that are made from real speech, and the tasks on them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.alignments import SILENCE, Segment, read_split
from datamodules.audio import read_audio
from datamodules.superb.librimix import speech_of
from datamodules.superb.registry import SuperbData, read_corpus
from experiments.corpora.align import align
from experiments.corpora.superb_sets import speech, superb_sets
from tests.experiments.superb.test_command import superb

pytestmark = pytest.mark.ci  # all of it reads one set of corpora

pytest.importorskip("pocketsphinx")


def test_speech_goes_on_through_short_pauses() -> None:
    phones = [
        (SILENCE, 0.0, 0.3),
        ("A", 0.3, 0.5),
        (SILENCE, 0.5, 0.7),
        ("B", 0.7, 0.9),
        (SILENCE, 0.9, 1.3),
        ("C", 1.3, 1.5),
    ]
    assert list(speech(Segment(*phone) for phone in phones)) == [(0.3, 0.9), (1.3, 1.5)]
    assert list(speech([Segment(SILENCE, 0.0, 1.0)])) == []


@pytest.fixture(scope="module")
def sets(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus with two or three speakers in each split, and the sets made of it."""
    root, output = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("sets")
    speakers = sorted((real_data / "LibriSpeech" / "test-other").iterdir())
    for split, part in (("train", speakers[:2]), ("dev", speakers[2:5]), ("test", speakers[5:8])):
        for speaker in part:
            shutil.copytree(speaker, root / split / speaker.name)
    align(str(root), ["train", "dev", "test"], workers=2)
    superb_sets(str(root), "train", "dev", "test", str(output), trials=6, mixtures=(8, 2, 2), queries=4)
    return root, output


def test_mixtures_are_sums_with_the_speech_of_both(sets: tuple[Path, Path]) -> None:
    root, output = sets
    corpus = read_corpus("sd", SuperbData(str(output)))
    assert [len(rows) for rows in corpus.splits.values()] == [8, 2, 2]
    aligned = read_split(root, "train")
    for row in corpus.train[:3]:
        first, second, delay = row.key.rsplit("_", 2)
        segments = speech_of(row.target)
        assert {segment.speaker for segment in segments} == {first.partition("-")[0], second.partition("-")[0]}
        expected = [start + int(delay) / 16_000 for start, _ in speech(aligned[second])]
        found = [segment.start for segment in segments if segment.speaker == second.partition("-")[0]]
        assert found == pytest.approx(expected, abs=0.006)
        mixed_T = read_audio(row.path)
        (path,) = (root / "train").rglob(f"{first}.*")
        alone_T = read_audio(str(path))[: int(delay)]  # before the second speaker begins
        share = np.corrcoef(mixed_T[: len(alone_T)], alone_T)[0, 1] if len(alone_T) > 100 else 1.0
        assert share > 0.999


def test_trials_have_both_kinds_in_equal_numbers(sets: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = sets
    corpus = read_corpus("asv", SuperbData(str(output / "speakers.tsv"), cache_dir=str(tmp_path)))
    for split in ("dev", "test"):
        pairs = corpus.trials[split].pairs
        assert len(pairs) == 12
        assert sum(pair.matches for pair in pairs) == 6
        assert all((pair.first.split("-")[0] == pair.second.split("-")[0]) == pair.matches for pair in pairs)
    assert len({row.target for row in corpus.train}) == 2


def test_queries_are_words_of_their_documents(sets: tuple[Path, Path]) -> None:
    _, output = sets
    corpus = read_corpus("qbe", SuperbData(str(output / "queries.tsv")))
    keys = {row.key for row in corpus.dev if row.target == "query"}
    assert keys
    texts = {
        line.split(" ", 1)[0]: line.split(" ", 1)[1]
        for path in (sets[0] / "dev").rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    }
    for pair in corpus.trials["dev"].pairs:
        word = pair.first.rpartition("_")[2]
        assert (word in texts[pair.second].split()) == pair.matches
        assert word in texts[pair.first.rpartition("_")[0]].split()


def test_the_tasks_run_on_them(sets: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = sets
    diarization = superb("sd", "fbank", output, tmp_path / "sd", "--updates", "1")
    assert 0 < diarization["test"]["der"] <= diarization["test"]["der_fixed"]
    assert superb("qbe", "fbank", output / "queries.tsv", tmp_path / "qbe")["test"]["mtwv"] > 0
    more = ["--updates", "2", "--preset", "probe"]
    assert superb("asv", "fbank", output / "speakers.tsv", tmp_path / "asv", *more)["test"]["eer"] <= 100


def test_a_split_with_one_speaker_is_an_error(sets: tuple[Path, Path], tmp_path: Path) -> None:
    root, _ = sets
    (tmp_path / "train").mkdir()
    shutil.copytree(next((root / "train").iterdir()), tmp_path / "train" / "1")
    for split in ("dev", "test"):
        shutil.copytree(root / split, tmp_path / split)
    shutil.copytree(root / "alignments", tmp_path / "alignments")
    with pytest.raises(ValueError, match="mixtures of train need aligned utterances of two speakers"):
        superb_sets(str(tmp_path), "train", "dev", "test", str(tmp_path / "out"), mixtures=(1, 1, 1))
