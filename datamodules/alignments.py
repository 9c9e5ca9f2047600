"""Phone alignments, the phones of each utterance with their times: reading, writing and frame labels.

Format, for your own corpus and for the synthetic one: UTF-8 files ``ROOT/alignments/SPLIT/*.tsv`` (any
names, any depth; ROOT holds the folders of splits), tab-separated, with this first line::

    utterance<TAB>phone<TAB>start_seconds<TAB>end_seconds

and one line per phone, in order of time within an utterance. ``utterance`` is the audio file's name without
its suffix (``84-121123-0000``), ``phone`` any symbol without white space; silence is ``SIL``. Phones may not
overlap. Time that no line covers is silence. All lines of an utterance are in one file, without lines of others
between them.

Shapes: F frames.
"""

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.audio import AUDIO_SUFFIXES
from datamodules.corpus import refuse_twins
from datamodules.errors import InputError
from datamodules.files import read_lines, write_text
from datamodules.frames import HOP, WINDOW

logger = logging.getLogger(__name__)

ALIGNMENTS = "alignments"
SILENCE = "SIL"
HEADER = ("utterance", "phone", "start_seconds", "end_seconds")


class Segment(NamedTuple):
    """One phone of one utterance; times in seconds from the start of its audio file."""

    phone: str
    start_seconds: float
    end_seconds: float


Alignment = Mapping[str, Sequence[Segment]]
"""Segments of each utterance in order of time, by utterance id."""


def corpus_folder(root: str | Path) -> Path:
    """The folder that holds the splits and ``alignments``: ``root``, or ``LibriSpeech`` in it.

    Raises:
        InputError: neither folder has a subfolder ``alignments``.
    """
    for folder in (Path(root), Path(root) / "LibriSpeech"):
        if (folder / ALIGNMENTS).is_dir():
            return folder
    raise InputError(
        f"{root} holds no folder {ALIGNMENTS!r} beside its splits: give a corpus with phone alignments "
        "(their format: datamodules/alignments.py), or make one by `interstack synthesize`"
    )


def write_alignment(path: str | Path, alignment: Alignment) -> None:
    """Write one alignment file, atomically. Times are rounded to 0.1 ms, which is finer than a sample at 8 kHz."""
    lines = ["\t".join(HEADER)]
    for utterance, segments in alignment.items():
        lines += [f"{utterance}\t{s.phone}\t{s.start_seconds:.4f}\t{s.end_seconds:.4f}" for s in segments]
    write_text(path, "\n".join(lines) + "\n")


def read_alignment(path: str | Path) -> dict[str, list[Segment]]:
    """Read one alignment file.

    Raises:
        InputError: the header is wrong, a line does not have four fields, a time is not a number, phones
            overlap or run backwards, or the lines of an utterance are not together. File and line are named.
    """
    lines = read_lines(path)
    if not lines or tuple(lines[0].split("\t")) != HEADER:
        raise InputError(f"{path}: the first line must be the tab-separated names {' '.join(HEADER)}")
    rows = [(f"{path}, line {number}", *_row(path, number, line)) for number, line in enumerate(lines[1:], 2)]
    alignment: dict[str, list[Segment]] = {}
    for utterance, group in itertools.groupby(rows, key=lambda row: row[1]):
        where, segments = zip(*[(row[0], row[2]) for row in group], strict=True)
        if utterance in alignment:
            raise InputError(f"{where[0]}: utterance {utterance} was already given; keep its lines together")
        _check_order(where, segments)
        alignment[utterance] = list(segments)
    return alignment


def _row(path: str | Path, number: int, line: str) -> tuple[str, Segment]:
    fields = line.split("\t")
    try:
        utterance, phone, start, end = fields
        segment = Segment(phone, float(start), float(end))
    except ValueError:
        raise InputError(f"{path}, line {number}: expected {' '.join(HEADER)}, got {line!r}") from None
    if not utterance or not phone or phone.split() != [phone]:
        raise InputError(f"{path}, line {number}: utterance and phone must be symbols without spaces, got {line!r}")
    return utterance, segment


def _check_order(where: Sequence[str], segments: Sequence[Segment]) -> None:
    previous = 0.0
    for place, segment in zip(where, segments, strict=True):
        # The negated comparisons also refuse NaN.
        if not (previous <= segment.start_seconds <= segment.end_seconds < math.inf):
            raise InputError(
                f"{place}: phone {segment.phone!r} runs from {segment.start_seconds} to {segment.end_seconds} "
                f"s, the one before it to {previous} s; phones must follow one another without overlap"
            )
        previous = segment.end_seconds


def _split_files(root: str | Path, split: str) -> list[Path]:
    folder = corpus_folder(root) / ALIGNMENTS / split
    paths = sorted(folder.rglob("*.tsv"))
    if not paths:
        raise InputError(f"{folder} holds no alignments (*.tsv) of the split {split!r}")
    return paths


def alignment_digest(root: str | Path, splits: Iterable[str]) -> str:
    """Hash of all alignments of these splits, by which a changed corpus is recognised."""
    digest = hashlib.sha256()
    for split in splits:
        for path in _split_files(root, split):
            digest.update(f"{split}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def read_split(root: str | Path, split: str) -> dict[str, list[Segment]]:
    """Read all alignments of one split.

    Raises:
        InputError: the split has no alignments, or two files give the same utterance.
    """
    merged: dict[str, list[Segment]] = {}
    for path in _split_files(root, split):
        part = read_alignment(path)
        if double := merged.keys() & part.keys():
            raise InputError(f"{path}: utterance {min(double)} is aligned in another file too; keep one of them")
        merged |= part
    return merged


def find_audio(root: str | Path, split: str, utterances: Iterable[str]) -> dict[str, Path]:
    """Find the audio file of each utterance, in the order given.

    Raises:
        InputError: an utterance has no audio file or two; the first is named. Audio without an alignment is a warning.
    """
    folder = corpus_folder(root) / split
    # Through links to folders, as the walk of a corpus.
    below = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)
    audio = sorted(path for path in below if path.suffix.lower() in AUDIO_SUFFIXES)
    refuse_twins(map(str, audio))
    found = {path.stem: path for path in audio}
    paths = {utterance: found[utterance] for utterance in utterances if utterance in found}
    if missing := [utterance for utterance in utterances if utterance not in paths]:
        raise InputError(
            f"{missing[0]} (and {len(missing) - 1} more) is aligned but has no audio file below {folder}: "
            "an utterance has the name of its .flac, .wav or .mp3 file without the suffix. If the file was removed, "
            "remove its alignment: delete the .tsv of its chapter, and `interstack align` writes the rest again"
        )
    if unaligned := len(found) - len(paths):
        logger.warning(
            "%d of %d audio files below %s have no alignment and are not used", unaligned, len(found), folder
        )
    return paths


def phone_sequence(segments: Iterable[Segment]) -> list[str]:
    """The spoken phones in order, without silence. A phone spoken twice in a row stays twice."""
    return [segment.phone for segment in segments if segment.phone != SILENCE]


def timed_phones(segments: Iterable[Segment]) -> str:
    """Phones with their times in one line of text, silence included; see :func:`segments_of`."""
    return " ".join(f"{s.phone}:{s.start_seconds:.4f}:{s.end_seconds:.4f}" for s in segments)


def segments_of(text: str) -> list[Segment]:
    """Parse the segments from a text of :func:`timed_phones`."""
    parts = (word.rsplit(":", 2) for word in text.split())
    return [Segment(phone, float(start), float(end)) for phone, start, end in parts]


def phone_inventory(alignments: Iterable[Alignment]) -> list[str]:
    """All phones, sorted, with ``SIL`` first whether it occurs or not."""
    seen = {segment.phone for alignment in alignments for row in alignment.values() for segment in row}
    return [SILENCE, *sorted(seen - {SILENCE})]


def frame_labels(
    segments: Sequence[Segment],
    num_frames: int,
    phones: Sequence[str],
    start_sample: int = 0,
    sample_rate: int = 16_000,
    hop: int = HOP,
) -> NDArray[np.int64]:
    """Index into ``phones`` of the phone at the centre of each frame, (F,).

    Args:
        segments: one utterance's phones in order of time.
        num_frames: number of frames F.
        phones: the inventory; must contain ``SIL`` and every phone of ``segments``.
        start_sample: first sample of the crop; frame 0 covers ``[start_sample, start_sample + WINDOW)``.
        sample_rate: sample rate of the audio in Hz.
        hop: samples from one frame to the next.
    """
    index = {phone: number for number, phone in enumerate(phones)}
    labels_F = np.full(num_frames, index[SILENCE], dtype=np.int64)
    if not segments:
        return labels_F
    centres_F = (start_sample + np.arange(num_frames) * hop + WINDOW / 2) / sample_rate
    starts = np.array([segment.start_seconds for segment in segments])
    ends = np.array([segment.end_seconds for segment in segments])
    row_F = np.searchsorted(starts, centres_F, side="right") - 1  # the last phone that began at or before the centre
    inside_F = (row_F >= 0) & (centres_F < ends[row_F])
    labels_F[inside_F] = np.array([index[segment.phone] for segment in segments])[row_F[inside_F]]
    return labels_F
