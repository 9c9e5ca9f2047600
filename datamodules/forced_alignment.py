"""Forced alignment of transcribed speech to phones, with pocketsphinx.

Its package carries an acoustic model of English (``en-us``, 16 kHz) and the CMU dictionary, so nothing is downloaded.
The words of the transcript are searched first, among the pronunciations that the dictionary has; then the phones of
what was found are aligned to frames of 10 ms. Phones are ARPABET without stress; silence and noise are ``SIL``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.alignments import SILENCE, Segment

SAMPLE_RATE = 16_000
FRAME_SECONDS = 0.01
BEAMS: tuple[dict[str, float], ...] = ({}, {"beam": 1e-120, "pbeam": 1e-120, "wbeam": 1e-100})
"""Search as pocketsphinx does, then, for what that does not find, with wide beams."""


class AlignmentError(ValueError):
    """An utterance that cannot be aligned; the message says why."""


class PhoneAligner:
    """An acoustic model and a dictionary.

    Args:
        lexicon: further words with their phones, whose stress is dropped; the dictionary's own words stay as they are.

    Raises:
        ValueError: pocketsphinx is not installed.
    """

    def __init__(self, lexicon: Mapping[str, Sequence[str]] | None = None) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise ValueError("phones are aligned by pocketsphinx: pip install 'interstack[align]'") from None
        self._lexicon = {word.lower(): phones for word, phones in (lexicon or {}).items()}
        self._decoders: list[Any] = [
            pocketsphinx.Decoder(
                hmm=pocketsphinx.get_model_path("en-us/en-us"),
                dict=pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"),
                lm=None,
                bestpath=False,  # its lattice has no end in one utterance of eight
                cmn="batch",  # of each utterance alone: the result does not depend on those before it
                loglevel="FATAL",
                **beams,
            )
            for beams in BEAMS
        ]

    def align(self, samples_T: np.ndarray, text: str) -> list[Segment]:
        """The phones that were said and when.

        Args:
            samples_T: float32 at 16 kHz.
            text: what was said, words separated by spaces.

        Raises:
            AlignmentError: there is no text, a word has no pronunciation, or no path through the words fits.
        """
        words = text.lower().split()
        if not words:
            raise AlignmentError("it has no transcript")
        if unknown := [word for word in words if not self._knows(word)]:
            raise AlignmentError(f"not in the dictionary: {' '.join(unknown)}; add them with --lexicon")
        pcm = (np.clip(samples_T, -1, 1) * 32767).astype("<i2").tobytes()
        for decoder in self._decoders:
            try:
                return self._align(decoder, pcm, " ".join(words))
            except RuntimeError:  # "Failed to stop utterance processing": no path reached the end
                continue
        raise AlignmentError("no path through its words fits the audio: is the transcript right?")

    def _knows(self, word: str) -> bool:
        if self._decoders[0].lookup_word(word) is not None:
            return True
        if word not in self._lexicon:
            return False
        phones = " ".join(re.sub(r"\d", "", phone) for phone in self._lexicon[word])
        for decoder in self._decoders:
            decoder.add_word(word, phones, True)
        return True

    @staticmethod
    def _align(decoder: Any, pcm: bytes, text: str) -> list[Segment]:
        decoder.reinit_feat()  # forgets the noise and the mean of utterances before this one
        decoder.set_align_text(text)
        for second_pass in (False, True):
            if second_pass:
                decoder.set_alignment()
            decoder.start_utt()
            decoder.process_raw(pcm, full_utt=True)
            decoder.end_utt()
        return [
            Segment(
                SILENCE if phone.name == "SIL" or phone.name.startswith("+") else phone.name,
                phone.start * FRAME_SECONDS,
                (phone.start + phone.duration) * FRAME_SECONDS,
            )
            for word in decoder.get_alignment()
            for phone in word
        ]
