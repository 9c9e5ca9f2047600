"""Forced alignment of transcribed speech to phones, with pocketsphinx.

Its package contains an acoustic model of English (``en-us``, 16 kHz) and the CMU dictionary, so nothing is downloaded.
First the words of the transcript are aligned, with a search over the dictionary's pronunciations. Then the phones of
the pronunciations found are aligned to frames of 10 ms. Phones are ARPABET without stress; silence and noise are
``SIL``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.alignments import SILENCE, Segment
from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError

FRAME_SECONDS = 0.01
BOUNDARY_SECONDS = 0.0078
"""Offset of the boundary before frame f from ``f * FRAME_SECONDS``. The boundary is half-way between the centres of the
frame's window of 25.6 ms and of the window before."""
LEAST_SCORE = -40.0
"""Smallest accepted mean acoustic score of a phone's frame. The lowest of 1,082 utterances of LibriSpeech is -34.5.
With the words of another utterance 101 of 152 have no path at all, and 46 of the others have a lower score than this.
"""
SILENT_SAMPLES = 8000


class AlignmentError(InputError):
    """An utterance cannot be aligned; the message gives the reason."""


class PhoneAligner:
    """Aligns utterances with an acoustic model and a dictionary.

    Args:
        lexicon: phones of further words, whose stress is dropped; the dictionary's own words do not change.

    Raises:
        InputError: pocketsphinx is not installed.
    """

    def __init__(self, lexicon: Mapping[str, Sequence[str]] | None = None) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise InputError("phones are aligned by pocketsphinx: pip install 'interstack[align]'") from None
        self._lexicon = {word.lower(): phones for word, phones in (lexicon or {}).items()}
        self._decoder: Any = pocketsphinx.Decoder(
            hmm=pocketsphinx.get_model_path("en-us/en-us"),
            dict=pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"),
            lm=None,
            bestpath=False,  # for one utterance of eight its lattice has no final node
            loglevel="FATAL",
        )

    def align(self, samples_T: np.ndarray, text: str) -> list[Segment]:
        """Align the phones of an utterance.

        Args:
            samples_T: audio in float32 at 16 kHz.
            text: transcript, words separated by spaces.

        Returns:
            Segments without a gap; neighbouring silences are merged.

        Raises:
            AlignmentError: there is no text or no audio, a word has no pronunciation, or the words do not fit.
        """
        phones = [phone for word in self._words(samples_T, text) for phone in word.phones]
        return _segments(phones, len(samples_T) / SAMPLE_RATE)

    def align_words(self, samples_T: np.ndarray, text: str) -> list[Segment]:
        """Align the words of an utterance, as :meth:`align` does its phones; silence is left out."""
        seconds = len(samples_T) / SAMPLE_RATE
        spoken = [word for word in self._words(samples_T, text) if not all(map(_is_silent, word.phones))]
        return [
            # The dictionary writes the second way to say a word as "a(2)".
            Segment(re.sub(r"\(\d+\)$", "", word.name).upper(), *_boundaries(word, seconds))
            for word in spoken
        ]

    def _words(self, samples_T: np.ndarray, text: str) -> list["_Word"]:
        """Words, silence among them."""
        words = text.lower().split()
        if not words:
            raise AlignmentError("it has no transcript")
        if not len(samples_T):
            raise AlignmentError("it has no samples")
        if unknown := [word for word in words if not self._knows(word)]:
            raise AlignmentError(f"not in the dictionary: {' '.join(unknown)}; add them with --lexicon")
        try:
            found = self._search_words(_pcm(samples_T), " ".join(words))
        except RuntimeError:  # "Failed to stop utterance processing": no path reached the end
            raise AlignmentError("no path through its words fits the audio: is the transcript right?") from None
        spoken = [phone for word in found for phone in word.phones if not _is_silent(phone)]
        score = sum(phone.score for phone in spoken) / sum(phone.duration for phone in spoken)
        if score < LEAST_SCORE:
            raise AlignmentError(
                f"its words fit the audio badly (score {score:.0f}, at least {LEAST_SCORE:.0f} is needed): is the "
                "transcript right?"
            )
        return found

    def _knows(self, word: str) -> bool:
        if self._decoder.lookup_word(word) is not None:
            return True
        if word not in self._lexicon:
            return False
        phones = " ".join(re.sub(r"\d", "", phone) for phone in self._lexicon[word])
        try:
            self._decoder.add_word(word, phones, True)
        except RuntimeError:  # a phone that the acoustic model lacks, such as SPN of <UNK>
            return False
        return True

    def _search_words(self, pcm: bytes, text: str) -> list["_Word"]:
        # Scoring starts with the likely densities at the end of the previous audio, so that is always made silence.
        self._search("a", bytes(2 * SILENT_SAMPLES))
        self._search(text, pcm)
        self._decoder.set_alignment()
        self._hear(pcm)
        # Entries are copied, because they refer to memory of the iteration.
        return [
            _Word(word.name, word.start, word.duration, [_Phone(p.name, p.start, p.duration, p.score) for p in word])
            for word in self._decoder.get_alignment()
        ]

    def _search(self, text: str, pcm: bytes) -> None:
        self._decoder.set_align_text(text)
        self._hear(pcm)

    def _hear(self, pcm: bytes) -> None:
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()


class _Phone(NamedTuple):
    name: str
    start: int  # in frames
    duration: int
    score: float


class _Word(NamedTuple):
    name: str
    start: int
    duration: int
    phones: list[_Phone]


def _pcm(samples_T: np.ndarray) -> bytes:
    return (np.clip(samples_T, -1, 1) * 32767).astype("<i2").tobytes()


def _is_silent(phone: _Phone) -> bool:
    return phone.name == SILENCE or phone.name.startswith("+")  # +NSN+ is noise, +SPN+ another speaker


def _segments(phones: Sequence[_Phone], seconds: float) -> list[Segment]:
    segments: list[Segment] = []
    for phone in phones:
        name = SILENCE if _is_silent(phone) else phone.name
        start, end = _boundaries(phone, seconds)
        if name == SILENCE and segments and segments[-1].phone == SILENCE:
            start = segments.pop().start_seconds
        segments.append(Segment(name, start, end))
    return segments


def _boundaries(entry: _Phone | _Word, seconds: float) -> tuple[float, float]:
    return _boundary(entry.start, seconds), _boundary(entry.start + entry.duration, seconds)


def _boundary(frame: int, seconds: float) -> float:
    return min(frame * FRAME_SECONDS + BOUNDARY_SECONDS, seconds) if frame else 0.0
