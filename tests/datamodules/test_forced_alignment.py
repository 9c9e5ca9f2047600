"""Forced alignment: what was said, when, and what is refused."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.alignments import SILENCE, phone_sequence
from datamodules.audio import SAMPLE_RATE, read_audio
from datamodules.corpus import read_transcripts
from datamodules.forced_alignment import AlignmentError, PhoneAligner, _segments

pocketsphinx = pytest.importorskip("pocketsphinx")

LEXICON = {"HELSTONE": ["HH", "EH1", "L", "S", "T", "OW2", "N"]}
NAMES = ("533-1066-0006", "533-1066-0003", "3331-159605-0006")


@pytest.fixture(scope="module")
def aligner() -> PhoneAligner:
    return PhoneAligner(LEXICON)


@pytest.fixture(scope="module")
def clips(real_data: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Samples and text of three short utterances."""
    found = {}
    for name in NAMES:
        (path,) = (real_data / "LibriSpeech" / "test-other").rglob(f"{name}.*")
        text = read_transcripts(str(next(path.parent.glob("*.trans.txt"))))[name]
        found[name] = (read_audio(str(path), SAMPLE_RATE), text)
    return found


def pronunciations(text: str) -> set[tuple[str, ...]]:
    """All ways to say a text, by the dictionary of pocketsphinx: WORD, WORD(2), ..."""
    spoken: dict[str, list[list[str]]] = {}
    with open(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")) as file:
        for word, *phones in map(str.split, file):
            spoken.setdefault(word.partition("(")[0], []).append(phones)
    ways = itertools.product(*(spoken[word] for word in text.lower().split()))
    return {tuple(itertools.chain(*way)) for way in ways}


@pytest.mark.ci
def test_phones_are_a_pronunciation_of_the_words(
    aligner: PhoneAligner, clips: dict[str, tuple[np.ndarray, str]]
) -> None:
    for samples_T, text in clips.values():
        segments = aligner.align(samples_T, text)
        assert tuple(phone_sequence(segments)) in pronunciations(text)
        assert tuple(phone_sequence(segments)[1:]) not in pronunciations(text)
        assert segments[0].start_seconds == 0
        assert segments[-1].end_seconds == pytest.approx(len(samples_T) / SAMPLE_RATE, abs=0.03)
        assert all(one.end_seconds == two.start_seconds for one, two in itertools.pairwise(segments))
        assert all(one.phone != SILENCE or two.phone != SILENCE for one, two in itertools.pairwise(segments))


def decibels(samples_T: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples_T**2) + 1e-9))


def test_silence_is_where_the_energy_is_low(aligner: PhoneAligner, clips: dict[str, tuple[np.ndarray, str]]) -> None:
    def contrast(samples_T: np.ndarray, text: str, moved: int = 0) -> float:
        energies: dict[bool, list[float]] = {True: [], False: []}
        heard_T = np.roll(samples_T, moved)
        for segment in aligner.align(samples_T, text):
            start, stop = (round(t * SAMPLE_RATE) for t in (segment.start_seconds, segment.end_seconds))
            energies[segment.phone == SILENCE].append(decibels(heard_T[start:stop]))
        return float(np.mean(energies[False]) - np.mean(energies[True]))

    right = np.mean([contrast(*clip) for clip in clips.values()])
    moved = np.mean([contrast(*clip, moved=len(clip[0]) // 2) for clip in clips.values()])
    assert right > 15
    assert moved < right - 10


def test_an_alignment_depends_on_its_utterance_alone(
    aligner: PhoneAligner, clips: dict[str, tuple[np.ndarray, str]]
) -> None:
    once = {name: aligner.align(*clips[name]) for name in NAMES}
    back = {name: aligner.align(*clips[name]) for name in reversed(NAMES)}
    fresh = {name: PhoneAligner().align(*clips[name]) for name in NAMES}
    assert once == back == fresh


def test_the_words_of_another_utterance_are_refused(
    aligner: PhoneAligner, clips: dict[str, tuple[np.ndarray, str]]
) -> None:
    (first, text), (second, other), _ = clips.values()
    assert aligner.align(first, text)
    for samples_T, words in ((first, other), (second, text)):
        with pytest.raises(AlignmentError, match="is the transcript right"):
            aligner.align(samples_T, words)


def test_what_cannot_be_said_is_named(aligner: PhoneAligner) -> None:
    noise_T = np.random.default_rng(0).normal(0, 0.01, SAMPLE_RATE).astype(np.float32)
    for text, message in (
        ("  ", "it has no transcript"),
        ("THE XQZV AND THE QQRZ", "not in the dictionary: xqzv qqrz; add them with --lexicon"),
    ):
        with pytest.raises(AlignmentError, match=message):
            aligner.align(noise_T, text)
    for samples, message in ((0, "it has no samples"), (500, "no path through its words")):
        with pytest.raises(AlignmentError, match=message):
            aligner.align(noise_T[:samples], "GOOD MORNING")


def test_the_lexicon_is_for_words_that_the_dictionary_lacks(aligner: PhoneAligner) -> None:
    assert aligner._knows("helstone")
    assert aligner._decoder.lookup_word("helstone") == "HH EH L S T OW N"
    assert not PhoneAligner()._knows("helstone")
    assert not PhoneAligner({"<UNK>": ["SPN"]})._knows("<unk>")  # the acoustic model has no such phone
    other = PhoneAligner({"THE": ["ZH"]})
    assert other._knows("the")
    assert other._decoder.lookup_word("the") == "DH AH"


def test_noise_is_silence_and_neighbouring_silences_are_one() -> None:
    entries = [("SIL", 0, 10), ("+NSN+", 10, 5), ("AH", 15, 5), ("T", 20, 4), ("SIL", 24, 6)]
    phones = [SimpleNamespace(name=name, start=start, duration=length) for name, start, length in entries]
    found = [(segment.phone, segment.start_seconds, segment.end_seconds) for segment in _segments(phones, 0.3)]
    expected = [("SIL", 0, 0.1578), ("AH", 0.1578, 0.2078), ("T", 0.2078, 0.2478), ("SIL", 0.2478, 0.3)]
    assert [name for name, *_ in found] == [name for name, *_ in expected]
    np.testing.assert_allclose([times for _, *times in found], [times for _, *times in expected])


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(ValueError, match=r"pocketsphinx: pip install 'interstack\[align\]'"):
        PhoneAligner()
