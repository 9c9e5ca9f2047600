"""Speech synthesis by eSpeak NG's C interface, from text to samples and timed phones. It runs as a separate program::

    python -P datamodules/espeak.py REQUEST.json RESULT.npz

One process synthesises one speaker. The library carries random state (flutter, breath, roughness) from one utterance
to the next, and no call resets it, so only a new process gives the same samples again. The separate process also keeps
a GPL-3.0 library out of the process of this Apache-2.0 program, and a crash in C does not end the caller.

It needs numpy and the standard library only, so that it starts in 0.2 s. The interface is ``speak_lib.h`` of eSpeak NG
1.52.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import InputError
from datamodules.files import read_json

SAMPLE_RATE = 22_050
_SYNCHRONOUS, _PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 2, 1, 2, 0x8000
_EVENT_END, _EVENT_PHONEME = 0, 7
_RATE, _PITCH, _RANGE = 1, 3, 4
_CHARACTERS, _UTF8 = 1, 1
# The library has 160 bytes for its data path and fails with a longer one.
_LONGEST_DATA_PATH = 140


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Utterance(NamedTuple):
    """One synthesised text: samples at 22.05 kHz, and (first sample, IPA symbol) of each phone; "" is a pause."""

    samples: NDArray[np.int16]
    phones: list[tuple[int, str]]


class Synthesizer:
    """One voice of eSpeak NG.

    Args:
        library: path of the shared library.
        data: path of ``espeak-ng-data``.
        voice: language and variant, such as ``en-us+f2``.
        pitch: 0 to 99.
        pitch_range: 0 (monotone) to 99.
        words_per_minute: 80 to 450.
        seed: seed of the library's random numbers.

    Raises:
        InputError: the library cannot start, or does not have the voice.
    """

    def __init__(
        self,
        library: str,
        data: str,
        voice: str,
        pitch: int,
        pitch_range: int,
        words_per_minute: int,
        seed: int,
    ) -> None:
        self._library = ctypes.CDLL(library)
        options = _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), options)
        if rate != SAMPLE_RATE:
            raise InputError(f"eSpeak NG did not start with the data in {data} (it returned {rate})")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise InputError(f"eSpeak NG has no voice {voice!r}")
        for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._pieces: list[NDArray[np.int16]] = []
        self._phones: list[tuple[int, str]] = []
        self._callback = _Callback(self._receive)  # kept here, as the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_END:
            event = events[index]
            if event.type == _EVENT_PHONEME:
                self._phones.append((event.sample, event.id.string.decode("utf-8")))
            index += 1
        return 0

    def speak(self, text: str) -> Utterance:
        """Synthesise ``text``; the result depends on all texts that this object has synthesised before."""
        self._pieces, self._phones = [], []
        encoded = text.encode()
        self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), ctypes.c_uint(0), _CHARACTERS, ctypes.c_uint(0),
            ctypes.c_uint(_UTF8), None, None,
        )  # fmt: skip
        return Utterance(np.concatenate([np.zeros(0, dtype=np.int16), *self._pieces]), self._phones)


@contextmanager
def short_path(data: str) -> Iterator[str]:
    """``data``, or a link to it whose path is short enough for the library."""
    if len(os.fsencode(data)) <= _LONGEST_DATA_PATH:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="espeak-") as folder:
        link = Path(folder) / "espeak-ng-data"
        link.symlink_to(data, target_is_directory=True)
        yield str(link)


def _speak_until(synthesizer: Synthesizer, request: dict[str, Any]) -> list[tuple[int, Utterance]]:
    kept: list[tuple[int, Utterance]] = []
    total, wanted = 0, request["seconds"] * SAMPLE_RATE
    for index, text in enumerate(request["texts"]):
        if total >= wanted:
            return kept
        utterance = synthesizer.speak(text)
        if request["min_seconds"] <= len(utterance.samples) / SAMPLE_RATE <= request["max_seconds"]:
            kept.append((index, utterance))
            total += len(utterance.samples)
    raise InputError(f"{len(request['texts'])} texts give {total / SAMPLE_RATE:.0f} s, not {request['seconds']} s")


def main(request_path: str, result_path: str) -> None:
    """Synthesise the request's texts until ``seconds`` are reached, and leave out utterances of other lengths.

    The result has these arrays, over all kept utterances one after another: ``samples``; ``phones`` and
    ``phone_starts`` (in samples from the start of the utterance); ``text`` (index into the texts), ``num_samples`` and
    ``num_phones``.
    """
    request = read_json(request_path)
    settings = request["synthesizer"]
    with short_path(settings.pop("data")) as data:
        kept = _speak_until(Synthesizer(data=data, **settings), request)
    np.savez(
        result_path,
        samples=np.concatenate([utterance.samples for _, utterance in kept]),
        phones=np.array([phone for _, utterance in kept for _, phone in utterance.phones]),
        phone_starts=np.array([start for _, utterance in kept for start, _ in utterance.phones]),
        text=np.array([index for index, _ in kept]),
        num_samples=np.array([len(utterance.samples) for _, utterance in kept]),
        num_phones=np.array([len(utterance.phones) for _, utterance in kept]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
