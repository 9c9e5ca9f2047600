"""Mixtures of two speakers for SD, in the Kaldi folders that s3prl's ``prepare_diarization.py`` makes of Libri2Mix."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.superb.missing import Published
from datamodules.superb.rows import MIN_SAMPLES, Reading, Row, SuperbCorpus, measured_corpus

SPLITS = ("train", "dev", "test")
FILES = ("wav.scp", "segments", "utt2spk", "reco2dur")
FOLDER = "diarization"
CHUNK_FRAMES = 2000
"""Frames of the longest chunk; 40 s with an encoder of 50 frames a second."""

PUBLISHED = Published(
    "Libri2Mix",
    "https://github.com/s3prl/LibriMix (generate_librimix_sd.sh, then scripts/prepare_diarization.py with ROOT as its "
    "--target_dir)",
    f"ROOT/{{{','.join(SPLITS)}}}/{{{','.join(FILES)}}}     (ROOT may also hold them in {FOLDER}/)",
)


class Segment(NamedTuple):
    """A stretch of speech, in seconds from the start of the recording."""

    speaker: str
    start: float
    end: float


def text_of(segments: Sequence[Segment]) -> str:
    """The target of a row with these segments."""
    return ", ".join(f"{segment.speaker} {segment.start!r} {segment.end!r}" for segment in segments)


def speech_of(target: str) -> list[Segment]:
    """The segments of a target, ``SPEAKER START END, SPEAKER START END``, with times in seconds.

    Raises:
        InputError: a part has another form.
    """
    return [_segment(part) for part in target.split(",") if part.strip()]


def _segment(text: str) -> Segment:
    try:
        speaker, start, end = text.split()
        segment = Segment(speaker, float(start), float(end))
    except ValueError:
        raise InputError(f"{text.strip()!r} is no segment: give SPEAKER START END, with times in seconds") from None
    if not 0 <= segment.start <= segment.end:
        raise InputError(f"the segment {text.strip()!r} ends before it starts, or starts before 0 s")
    return segment


def chunk_of(key: str) -> tuple[str, int]:
    """Recording and first frame of a row; its key is that of the recording, with ``@FRAME`` for later chunks."""
    recording, _, frame = key.partition("@")
    return recording, int(frame or 0)


def chunks(row: Row, seconds: float, hop: int) -> Iterator[Row]:
    """Rows of at most 2,000 frames that make up a recording.

    What is left at the end is dropped if it is less than a frame, or too short for an encoder, on which s3prl fails.

    Args:
        row: the recording.
        seconds: its duration.
        hop: samples from one frame to the next.
    """
    frames = int(seconds * SAMPLE_RATE / hop)
    for first in range(0, frames, CHUNK_FRAMES):
        samples = hop * min(CHUNK_FRAMES, frames - first)
        if first and samples < MIN_SAMPLES:
            return
        key = f"{row.key}@{first}" if first else row.key
        yield replace(row, key=key, start=hop * first, num_samples=samples)


def read_librimix(root: str, reading: Reading = Reading()) -> SuperbCorpus:  # noqa: B008
    """Read the corpus in chunks of 2,000 frames of the encoder.

    The reference is ``segments`` with ``utt2spk``. ``prepare_diarization.py`` writes ``rttm`` of the same times and
    speakers, except where both speakers have a segment of the same times. These share an id, and ``utt2spk`` gives both
    to the second speaker, here as in s3prl. In the published lists that is one segment of train.

    Raises:
        InputError: a file is missing or faulty, or a recording has other than two speakers, or audio is bad.
    """
    home = require_librimix(root)
    splits = {split: list(_rows(home, os.path.join(home, split), reading.hop)) for split in SPLITS}
    return measured_corpus(splits, [], reading)


def require_librimix(root: str) -> str:
    """Check the corpus's files and return the folder of the splits.

    Raises:
        InputError: a file is missing.
    """
    inside = os.path.join(root, FOLDER)
    home = inside if os.path.isdir(inside) else root
    PUBLISHED.require(*(os.path.join(home, split, file) for split in SPLITS for file in FILES))
    return home


def _rows(home: str, folder: str, hop: int) -> Iterator[Row]:
    speaker_of = {utterance: speaker for utterance, speaker in _fields(os.path.join(folder, "utt2spk"), 2)}
    segments: dict[str, list[Segment]] = defaultdict(list)
    path = os.path.join(folder, "segments")
    for utterance, recording, start, end in _fields(path, 4):
        if utterance not in speaker_of:
            raise InputError(f"{path}: {utterance} has no speaker in {folder}/utt2spk")
        segments[recording].append(_segment(f"{speaker_of[utterance]} {start} {end}"))
    seconds = dict(_durations(os.path.join(folder, "reco2dur")))
    path = os.path.join(folder, "wav.scp")
    for recording, audio in _fields(path, 2):
        if recording not in seconds:
            raise InputError(f"{path}: {recording} has no duration in {folder}/reco2dur")
        if audio.endswith("|"):
            raise InputError(f"{path}: {recording} is a command ({audio}); only files are read")
        require_two_speakers(path, recording, segments[recording])
        places = [audio, os.path.join(folder, audio), os.path.join(home, audio)]
        found = next((place for place in places if os.path.isfile(place)), audio)
        yield from chunks(Row(recording, found, 0, text_of(segments[recording])), seconds[recording], hop)


def _durations(path: str) -> Iterator[tuple[str, float]]:
    for recording, duration in _fields(path, 2):
        try:
            yield recording, float(duration)
        except ValueError:
            raise InputError(f"{path}: the duration of {recording} is {duration!r}; give seconds") from None


def require_two_speakers(path: str, recording: str, segments: Sequence[Segment]) -> None:
    """Check that a recording has two speakers, for which the head has an output each.

    Raises:
        InputError: it has another number.
    """
    if len(speakers := sorted({segment.speaker for segment in segments})) != 2:
        shown = ", ".join(speakers) or "none"
        raise InputError(f"{path}: {recording} has {len(speakers)} speakers ({shown}); the task needs two")


def _fields(path: str, number: int) -> Iterator[tuple[str, ...]]:
    """The fields of every line; the last takes the rest of the line."""
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        fields = tuple(line.strip().split(None, number - 1))
        if len(fields) != number:
            raise InputError(f"{path}, line {line_number}: {line!r} has {len(fields)} fields, not {number}")
        yield fields
