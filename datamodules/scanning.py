"""Scan of a corpus's files for its rows: read every header, attach transcripts, find bad input.

Bad input is an audio file whose header shows that it cannot be used (:func:`datamodules.audio.usable_samples`) or that
is not in a SPEAKER/CHAPTER folder. Where text is required, an utterance without text and a transcript line without
audio are bad input too. With ``on_bad_audio="error"`` the first one is raised with the number of all; with "skip" they
are left out and returned as a list. Where text is optional, gaps between transcripts and audio are only warned of.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from datamodules.audio import BadAudioError, usable_samples
from datamodules.corpus import CorpusFile, CorpusSettings, read_transcripts, utterance_id
from datamodules.errors import InputError
from datamodules.packed import unpacked_path

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One utterance."""

    path: str
    relative: str  # SPLIT/SPEAKER/CHAPTER/NAME
    num_samples: int
    speaker: str
    transcript: str | None


class Problem(NamedTuple):
    """A file that was left out, and the reason."""

    path: str
    reason: str


class Transcripts(NamedTuple):
    """Lines of all transcript files of a corpus by (folder of the chapter, utterance id)."""

    text: dict[tuple[str, str], str]
    files: dict[str, str]  # folder -> transcript file


def scan(files: Sequence[CorpusFile], settings: CorpusSettings) -> tuple[list[Row], list[Problem]]:
    """Return the rows of the usable audio files, and the files left out (empty unless ``on_bad_audio`` is "skip").

    Raises:
        BadAudioError: there is bad input and ``on_bad_audio`` is "error".
        InputError: no file of a split is usable.
    """
    audio = [file for file in files if file.is_audio]
    transcripts = _read_all_transcripts(files)
    rows, problems = _usable_rows(audio, transcripts, settings)
    gaps = _gaps(audio, transcripts, settings.transcripts == "required")
    if settings.transcripts == "required":
        without_text = {gap.path for gap in gaps}
        rows = [row for row in rows if row.path not in without_text]
        problems += gaps
    elif gaps:
        logger.warning("%d gaps between transcripts and audio, first: %s: %s", len(gaps), *gaps[0])
    _judge(problems, settings.on_bad_audio)
    _require_rows(audio, rows)
    return rows, problems


def _usable_rows(
    audio: Sequence[CorpusFile], transcripts: Transcripts, settings: CorpusSettings
) -> tuple[list[Row], list[Problem]]:
    def inspect(file: CorpusFile) -> int | Problem:
        if not file.has_speaker_and_chapter:
            return Problem(file.path, "is not in a SPEAKER/CHAPTER folder of its split; move it to one")
        try:
            return usable_samples(file.path, settings.sample_rate, settings.min_samples, settings.resample)
        except BadAudioError as error:
            return Problem(file.path, str(error).removeprefix(f"{file.path}: "))

    rows: list[Row] = []
    problems: list[Problem] = []
    with _Headers(len(audio)) as headers:
        for file, found in zip(audio, headers.map(inspect, audio), strict=True):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                text = transcripts.text.get(_utterance_key(file.path))
                rows.append(Row(file.path, file.relative, found, file.speaker, text))
    return rows, problems


class _Headers:
    """Threads that read headers (libsndfile releases the interpreter lock) under a progress bar."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        self._pool = ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1)))
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("Reading audio headers", total=total)

    def __enter__(self) -> "_Headers":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest of the corpus

    def map(
        self, inspect: Callable[[CorpusFile], int | Problem], files: Sequence[CorpusFile]
    ) -> Iterator[int | Problem]:
        # One task per file would cost more than reading its header.
        chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
        for found in self._pool.map(lambda chunk: [inspect(file) for file in chunk], chunks):
            self._progress.advance(self._task, len(found))
            yield from found


def _read_all_transcripts(files: Sequence[CorpusFile]) -> Transcripts:
    text: dict[tuple[str, str], str] = {}
    paths = [file.path for file in files if not file.is_audio]
    for path in paths:
        folder = os.path.dirname(path)
        text |= {(folder, name): line for name, line in read_transcripts(path).items()}
    return Transcripts(text, {os.path.dirname(path): path for path in paths})


def _gaps(audio: Sequence[CorpusFile], transcripts: Transcripts, required: bool) -> list[Problem]:
    """Audio without a line, lines without audio and, where text is required, chapters without lines."""
    gaps: list[Problem] = []
    for file in audio:
        folder, name = _utterance_key(file.path)
        if folder not in transcripts.files and required:
            gaps.append(Problem(file.path, "has no transcript file beside it; add SPEAKER-CHAPTER.trans.txt"))
        elif folder in transcripts.files and (folder, name) not in transcripts.text:
            reason = f"has no line in {os.path.basename(transcripts.files[folder])}; add '{name} TEXT'"
            gaps.append(Problem(file.path, reason))
    with_audio = {_utterance_key(file.path) for file in audio}
    for folder, name in transcripts.text.keys() - with_audio:
        reason = f"has a line for {name}, which has no audio file; restore it or remove the line"
        gaps.append(Problem(transcripts.files[folder], reason))
    return sorted(gaps)


def _utterance_key(path: str) -> tuple[str, str]:
    return os.path.dirname(unpacked_path(path)), utterance_id(path)


def _judge(problems: Sequence[Problem], on_bad_audio: str) -> None:
    if problems and on_bad_audio == "error":
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        remedy = "or leave such input out with on_bad_audio: skip"
        raise BadAudioError(f"{problems[0].path}: {problems[0].reason}, {remedy}{others}")


def _require_rows(audio: Sequence[CorpusFile], rows: Sequence[Row]) -> None:
    used = {row.path for row in rows}
    usable = {file.split for file in audio if file.path in used}
    for file in audio:
        if file.split not in usable:
            raise InputError(f"nothing in the split {file.split!r} is usable: all of {file.folder} was skipped")
