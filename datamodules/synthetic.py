"""A corpus of synthetic speech in the exact layout of LibriSpeech, for users without a corpus.

eSpeak NG reads sentences of a small grammar in many voices; 20 minutes take seconds. It reports each phone
with its time, and these alignments are stored with the audio::

    ROOT/LibriSpeech/SPEAKERS.TXT, CHAPTERS.TXT, synthetic.json (the settings)
    ROOT/LibriSpeech/{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/*.flac and *.trans.txt
    ROOT/LibriSpeech/alignments/SPLIT/SPEAKER-CHAPTER.tsv (format: see alignments.py)

Licence: eSpeak NG is GPL-3.0. It comes with the optional package espeakng-loader (``pip install
'interstack[synthetic]'``), is not part of this distribution and runs in separate processes. Its licence does not cover
speech made with it.
"""

import importlib
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from datamodules import espeak
from datamodules.alignments import ALIGNMENTS, SILENCE, Segment, write_alignment
from datamodules.errors import InputError
from datamodules.files import write_json, write_text
from datamodules.folders import is_finished, making, write_marker
from datamodules.sentences import sentences, transcript
from datamodules.voices import MOST_VOICES, Voice, choose_voices

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
FORMAT = 1
SPLITS = ("train-clean-100", "dev-clean", "test-clean")
MIN_SECONDS, MAX_SECONDS = 2.0, 8.0
UTTERANCES_PER_CHAPTER = 20
SETTINGS_FILE = "synthetic.json"
_STRESS_MARKS, _LENGTH_MARK = "\u02c8\u02cc", "\u02d0"


class Speaker(NamedTuple):
    """A voice with its number (as in the file names), split and seconds of speech."""

    number: int
    split: str
    voice: Voice
    seconds: float
    seed: int


class Recording(NamedTuple):
    """One utterance at 16 kHz: int16 samples, transcript, and phones with times."""

    samples_T: NDArray[np.int16]
    text: str
    segments: list[Segment]


def plan_speakers(minutes: float, voices: int, seed: int) -> list[Speaker]:
    """Plan the speakers of each split and their seconds; dev and test get a sixth of the voices each, at least one.

    Raises:
        InputError: there are fewer voices than splits or more than exist, or too little speech for each voice.
    """
    if not len(SPLITS) <= voices <= MOST_VOICES:
        raise InputError(f"voices={voices} must be between {len(SPLITS)} (one per split) and {MOST_VOICES}")
    seconds = minutes * 60 / voices
    if not MAX_SECONDS <= seconds < math.inf:
        least = voices * MAX_SECONDS / 60
        raise InputError(f"minutes={minutes} is too little for {voices} voices: give at least {least:.1f}")
    held_out = max(1, voices // 6)
    splits = ["dev-clean"] * held_out + ["test-clean"] * held_out
    splits += ["train-clean-100"] * (voices - len(splits))
    speakers = enumerate(zip(splits, choose_voices(voices), strict=True))
    return [Speaker(1001 + number, split, voice, seconds, seed) for number, (split, voice) in speakers]


def _library() -> dict[str, str]:
    try:
        loader = importlib.import_module("espeakng_loader")
    except ModuleNotFoundError:
        raise InputError(
            "synthetic speech needs the package espeakng-loader: pip install 'interstack[synthetic]'"
        ) from None
    return {"library": loader.get_library_path(), "data": loader.get_data_path()}


def _speak(speaker: Speaker, library: dict[str, str]) -> Iterator[Recording]:
    """Synthesise all recordings of one speaker in a new process; see ``espeak.py`` for the reason."""
    name, pitch, pitch_range, words_per_minute = speaker.voice[1:]
    # Far more texts than are used, since even the shortest kept one lasts MIN_SECONDS and few are left out.
    texts = list(islice(sentences(f"{speaker.seed}/{speaker.number}"), 50 + math.ceil(speaker.seconds)))
    request = {
        "synthesizer": {
            **library, "voice": name, "pitch": pitch, "pitch_range": pitch_range,
            "words_per_minute": words_per_minute, "seed": speaker.seed * 10_000 + speaker.number,
        },
        "texts": texts, "seconds": speaker.seconds, "min_seconds": MIN_SECONDS, "max_seconds": MAX_SECONDS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="interstack-") as folder:
        request_path, result_path = Path(folder) / "request.json", Path(folder) / "result.npz"
        write_json(request_path, request)
        # -P: modules in the script's folder must not shadow installed ones.
        command = [sys.executable, "-P", espeak.__file__, str(request_path), str(result_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise InputError(f"eSpeak NG could not speak as {name}: {reason}")
        with np.load(result_path) as result:
            yield from _recordings({key: result[key] for key in result.files}, texts)


def _recordings(result: dict[str, NDArray[Any]], texts: Sequence[str]) -> Iterator[Recording]:
    samples = np.split(result["samples"], np.cumsum(result["num_samples"])[:-1])
    phones = np.split(result["phones"], np.cumsum(result["num_phones"])[:-1])
    starts = np.split(result["phone_starts"], np.cumsum(result["num_phones"])[:-1])
    for index, spoken_T, phone, start in zip(result["text"], samples, phones, starts, strict=True):
        resampled_T = soxr.resample(spoken_T.astype(np.float32), espeak.SAMPLE_RATE, SAMPLE_RATE, quality="HQ")
        samples_T = np.clip(np.rint(resampled_T), -(2**15), 2**15 - 1).astype(np.int16)
        events = list(zip(start.tolist(), phone.tolist(), strict=True))
        yield Recording(samples_T, transcript(texts[index]), phone_segments(events, len(spoken_T)))


def phone_segments(
    events: Sequence[tuple[int, str]], num_samples: int, sample_rate: int = espeak.SAMPLE_RATE
) -> list[Segment]:
    """Convert events (first sample, IPA symbol; "" is a pause) to segments that cover the utterance without a gap.

    Stress marks are removed. Pauses become ``SIL``, and neighbouring ones are merged. A phone of zero length (eSpeak
    reports some at the end of a sentence) is dropped, so that every remaining phone is audible.
    """
    bounded = [(0, ""), *events, (num_samples, "")]
    segments: list[Segment] = []
    for (start, symbol), (end, _) in pairwise(bounded):
        # The tables of some accents use a plain colon as the length mark.
        phone = symbol.strip(_STRESS_MARKS).replace(":", _LENGTH_MARK) or SILENCE
        if end <= start:
            continue
        if phone == SILENCE and segments and segments[-1].phone == SILENCE:
            start = round(segments.pop().start_seconds * sample_rate)
        segments.append(Segment(phone, start / sample_rate, end / sample_rate))
    return segments


def _write_speaker(root: Path, speaker: Speaker, library: dict[str, str]) -> list[tuple[int, float]]:
    """Write all of a speaker's chapters below ``root``; returns (chapter, seconds) of each."""
    recordings = list(_speak(speaker, library))
    chapters = []
    for first in range(0, len(recordings), UTTERANCES_PER_CHAPTER):
        chapter = speaker.number * 1000 + first // UTTERANCES_PER_CHAPTER
        part = recordings[first : first + UTTERANCES_PER_CHAPTER]
        _write_chapter(root, speaker, chapter, part)
        chapters.append((chapter, sum(len(recording.samples_T) for recording in part) / SAMPLE_RATE))
    return chapters


def _write_chapter(root: Path, speaker: Speaker, chapter: int, recordings: Sequence[Recording]) -> None:
    name = f"{speaker.number}-{chapter}"
    folder = root / speaker.split / str(speaker.number) / str(chapter)
    folder.mkdir(parents=True)
    utterances = {f"{name}-{number:04d}": recording for number, recording in enumerate(recordings)}
    for utterance, recording in utterances.items():
        soundfile.write(folder / f"{utterance}.flac", recording.samples_T, SAMPLE_RATE, subtype="PCM_16")
    lines = [f"{utterance} {recording.text}\n" for utterance, recording in utterances.items()]
    write_text(folder / f"{name}.trans.txt", "".join(lines))
    alignments = root / ALIGNMENTS / speaker.split
    alignments.mkdir(parents=True, exist_ok=True)
    aligned = {utterance: recording.segments for utterance, recording in utterances.items()}
    write_alignment(alignments / f"{name}.tsv", aligned)


def _write_tables(root: Path, chapters: dict[Speaker, list[tuple[int, float]]]) -> None:
    speakers = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    rows = [";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE"]
    for speaker, spoken in chapters.items():
        minutes = sum(seconds for _, seconds in spoken) / 60
        voice = speaker.voice
        speakers.append(f"{speaker.number} | {voice.sex} | {speaker.split:16} | {minutes:.2f} | eSpeak NG {voice.name}")
        rows += [
            f"{chapter} | {speaker.number} | {seconds / 60:.2f} | {speaker.split:16} | 0 | 0 | - | Synthetic"
            for chapter, seconds in spoken
        ]
    write_text(root / "SPEAKERS.TXT", "\n".join(speakers) + "\n")
    write_text(root / "CHAPTERS.TXT", "\n".join(rows) + "\n")


def synthesize_corpus(
    output: str | Path, minutes: float = 20.0, voices: int = 12, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write the corpus, or keep an existing one; its files are a pure function of the settings.

    The samples are equal bit for bit in every run with the same versions of eSpeak NG, soxr and libsndfile.

    Args:
        output: folder in which ``LibriSpeech/`` is made.
        minutes: minutes of speech, over all splits.
        voices: number of speakers, 3 to 102 (see ``voices.py``); dev-clean and test-clean get a sixth each.
        seed: random seed of sentences and voices.
        overwrite: replace a synthetic corpus that has other settings.

    Returns:
        The folder of splits, ``output/LibriSpeech``.

    Raises:
        InputError: the settings are impossible, a corpus with other settings exists, or espeakng-loader is missing.
    """
    corpus = Path(output) / "LibriSpeech"
    settings = {"format": FORMAT, "minutes": float(minutes), "voices": voices, "seed": seed}
    if is_finished(corpus, SETTINGS_FILE, settings, overwrite):
        logger.info("kept the corpus in %s, which has these settings already", corpus)
        return corpus
    speakers, library = plan_speakers(minutes, voices, seed), _library()
    with making(corpus) as new:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            chapters = list(pool.map(lambda speaker: _write_speaker(new, speaker, library), speakers))
        _write_tables(new, dict(zip(speakers, chapters, strict=True)))
        total_seconds = round(sum(seconds for spoken in chapters for _, seconds in spoken), 2)
        write_marker(new, SETTINGS_FILE, settings, seconds=total_seconds)
    logger.info("wrote %.1f minutes of %d voices to %s", total_seconds / 60, voices, corpus)
    return corpus
