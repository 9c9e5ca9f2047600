"""``interstack align``: phone labels for transcribed speech, by forced alignment."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from datamodules.alignments import ALIGNMENTS, Segment, write_alignment
from datamodules.audio import read_audio
from datamodules.corpus import CorpusSettings, list_files, read_transcripts, split_folders, utterance_id
from datamodules.files import FolderLock, write_text
from datamodules.forced_alignment import SAMPLE_RATE, AlignmentError, PhoneAligner
from lightning_modules.superb.tokenizers import read_lexicon

log = logging.getLogger(__name__)

UNALIGNED = ".unaligned.txt"


class Chapter(NamedTuple):
    """Utterances of one folder: path and text of each, by id."""

    stem: Path  # of its files of alignments, without suffix
    utterances: dict[str, tuple[str, str]]


def align(
    root: str,
    splits: Sequence[str],
    lexicon: str | list[str] | None = None,
    workers: int | None = None,
) -> None:
    """Write which phone is said when beside a corpus, in the form that pretrain-teacher and the probes of phones read.

    It needs `pip install 'interstack[align]'` (pocketsphinx, with an acoustic model and a dictionary of English). What
    cannot be aligned is listed with the reason in ALIGNMENTS/SPLIT/CHAPTER.unaligned.txt; the next call tries it again.

    Args:
        root: the corpus in LibriSpeech's layout, with transcripts; it gets the folder alignments/.
        splits: to align.
        lexicon: file of lines WORD PHONE PHONE ..., or a list of such files, for words that the dictionary lacks.
        workers: processes; default: one per core.

    Raises:
        ValueError: the corpus or a split is not there, has no transcripts, or nothing of it could be aligned.
    """
    words = read_lexicon([lexicon] if isinstance(lexicon, str) else lexicon or [])
    PhoneAligner()  # before anything is read: it may not be installed
    chapters = _chapters(root, splits)
    aligned = failed = 0
    with (
        FolderLock(chapters[0].stem.parent.parent, ".lock", "wait for it"),
        ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start, initargs=(words,)) as pool,
    ):
        left = [chapter for chapter in chapters if not _is_finished(chapter)]
        log.info("%d of %d chapters are aligned already", len(chapters) - len(left), len(chapters))
        for chapter, (good, bad) in zip(left, pool.map(_align_chapter, left), strict=True):
            aligned, failed = aligned + good, failed + bad
            log.info("%s: %d aligned, %d not", chapter.stem.name, good, bad)
    if failed:
        log.warning("%d of %d utterances could not be aligned: see *%s", failed, aligned + failed, UNALIGNED)
    if left and not aligned:
        raise ValueError(f"no utterance of {root} could be aligned: see {left[0].stem}{UNALIGNED}")


def _chapters(root: str, splits: Sequence[str]) -> list[Chapter]:
    folders = split_folders(CorpusSettings(roots=(root,), splits=tuple(splits)))
    files = list_files(folders)
    texts = {key: text for file in files if not file.is_audio for key, text in read_transcripts(file.path).items()}
    if not texts:
        raise ValueError(f"{root} has no transcripts (SPEAKER-CHAPTER.trans.txt) in {', '.join(splits)}")
    audio = sorted((file for file in files if file.is_audio), key=lambda file: file.path)
    chapters = []
    for (split, folder, parent), members in groupby(
        audio, key=lambda file: (file.split, file.folder, Path(file.path).parent)
    ):
        paths = {utterance_id(file.path): file.path for file in members}
        name = "-".join(parent.relative_to(folder).parts) or split
        spoken = {key: (path, texts.get(key, "")) for key, path in paths.items()}
        chapters.append(Chapter(Path(folder).parent / ALIGNMENTS / split / name, spoken))
    return chapters


def _is_finished(chapter: Chapter) -> bool:
    return _beside(chapter, ".tsv").exists() and not _beside(chapter, UNALIGNED).exists()


def _beside(chapter: Chapter, suffix: str) -> Path:
    return chapter.stem.with_name(chapter.stem.name + suffix)


_aligner: PhoneAligner | None = None


def _start(words: dict[str, list[str]]) -> None:
    global _aligner
    _aligner = PhoneAligner(words)


def _align_chapter(chapter: Chapter) -> tuple[int, int]:
    """Write a chapter's files; how many utterances were aligned, and how many not."""
    assert _aligner is not None
    found: dict[str, list[Segment]] = {}
    problems: list[str] = []
    for key, (path, text) in sorted(chapter.utterances.items()):
        try:
            found[key] = _aligner.align(read_audio(path, SAMPLE_RATE, resample=True), text)
        except AlignmentError as error:
            problems.append(f"{key}\t{error}\n")
    if found:
        write_alignment(_beside(chapter, ".tsv"), found)
    _beside(chapter, UNALIGNED).unlink(missing_ok=True)
    if problems:
        write_text(_beside(chapter, UNALIGNED), "".join(problems))
    return len(found), len(problems)
