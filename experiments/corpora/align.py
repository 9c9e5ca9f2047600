"""``interstack align``: phone labels for transcribed speech, by forced alignment."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jsonargparse.typing import PositiveInt

from datamodules.alignments import ALIGNMENTS, Segment, read_alignment, write_alignment
from datamodules.audio import SAMPLE_RATE, BadAudioError, read_audio
from datamodules.corpus import CorpusSettings, list_files, read_transcripts, split_folders, utterance_id
from datamodules.errors import InputError
from datamodules.files import FolderLock, write_text
from datamodules.forced_alignment import AlignmentError, PhoneAligner
from datamodules.packed import is_packed
from lightning_modules.superb.tokenizers import read_lexicon

log = logging.getLogger(__name__)

UNALIGNED = ".unaligned.txt"


class Chapter(NamedTuple):
    """Utterances of one folder: path and text of each, by id."""

    stem: Path  # path of its alignment files, without suffix
    utterances: dict[str, tuple[str, str]]


def align(
    root: str,
    splits: Sequence[str],
    lexicon: str | list[str] | None = None,
    output: str | None = None,
    workers: PositiveInt | None = None,
) -> None:
    """Write phone alignments beside a corpus, in the format that pretrain-teacher and the phone probes read.

    This needs `pip install 'interstack[align]'` (pocketsphinx, with an acoustic model and a dictionary of English).
    Later calls keep finished alignments. Utterances that cannot be aligned are listed with the reason in
    alignments/SPLIT/CHAPTER.unaligned.txt; the next call tries them again, for instance with a larger lexicon.

    Args:
        root: corpus in LibriSpeech layout, with transcripts; it gets the folder alignments/.
        splits: splits to align.
        lexicon: file of lines WORD PHONE PHONE ..., or a list of such files, for words that the dictionary lacks.
        output: folder that gets alignments/ and links to the splits instead of the corpus, for a read-only corpus; the
            commands that read the alignments then take it as root.
        workers: number of processes; default: one per core.

    Raises:
        InputError: the corpus or a split is missing, has no transcripts, or no utterance could be aligned.
    """
    words = read_lexicon([lexicon] if isinstance(lexicon, str) else lexicon or [])
    PhoneAligner()  # fails before anything is read if pocketsphinx is not installed
    folders = split_folders(CorpusSettings(roots=(root,), splits=tuple(splits)))
    home = Path(output) if output else Path(folders[0][1]).parent
    chapters = _chapters(folders, home)
    with (
        FolderLock(home / ALIGNMENTS, ".lock", "wait for it"),
        ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start, initargs=(words,)) as pool,
    ):
        for split, folder in folders if output else []:
            _link(home / split, Path(folder))
        aligned = failed = 0
        for chapter, (good, bad) in zip(chapters, pool.map(_align_chapter, chapters), strict=True):
            aligned, failed = aligned + good, failed + bad
            log.info("%s: %d aligned, %d not", chapter.stem.name, good, bad)
    told = f"{aligned} of {aligned + failed} utterances are aligned in {home / ALIGNMENTS}"
    if not aligned:
        raise InputError(f"{told}; the reasons are in *{UNALIGNED} there")
    log.info("%s%s", told, f"; the others are listed in *{UNALIGNED} there" if failed else "")


def _link(place: Path, folder: Path) -> None:
    """Link a split beside its alignments, so that readers of alignments find the audio."""
    if not os.path.lexists(place):
        place.symlink_to(folder)
    elif place.resolve() != folder.resolve():
        raise InputError(f"{place} is not a link to {folder}: choose another --output, or remove it")


def _chapters(folders: Sequence[tuple[str, str]], home: Path) -> list[Chapter]:
    if packed := [folder for _, folder in folders if is_packed(folder)]:
        raise InputError(f"{packed[0]} is packed, and a pack has no alignments: align the files that it was made of")
    files = list_files(folders)
    texts = {
        (os.path.dirname(file.path), key): text
        for file in files
        if not file.is_audio
        for key, text in read_transcripts(file.path).items()
    }
    if not texts:
        where = ", ".join(folder for _, folder in folders)
        raise InputError(f"there are no transcripts (SPEAKER-CHAPTER.trans.txt) below {where}")
    chapters: dict[Path, dict[str, tuple[str, str]]] = {}
    for file in files:
        if file.is_audio:
            parent, key = os.path.dirname(file.path), utterance_id(file.path)
            name = "-".join(Path(parent).relative_to(file.folder).parts) or file.split
            utterances = chapters.setdefault(home / ALIGNMENTS / file.split / name, {})
            utterances[key] = (file.path, texts.get((parent, key), ""))
    return [Chapter(stem, utterances) for stem, utterances in chapters.items()]


_aligner: PhoneAligner | None = None


def _start(words: dict[str, list[str]]) -> None:
    global _aligner
    _aligner = PhoneAligner(words)


def _align_chapter(chapter: Chapter) -> tuple[int, int]:
    """Align the remaining utterances, write the chapter's files, and count aligned and failed utterances."""
    assert _aligner is not None
    stem, utterances = chapter
    written, list_of_failed = (stem.with_name(stem.name + suffix) for suffix in (".tsv", UNALIGNED))
    before: dict[str, list[Segment]] = read_alignment(written) if written.is_file() else {}
    found = {key: segments for key, segments in before.items() if key in utterances}  # the audio of others is gone
    problems: list[str] = []
    new = sorted(utterances.keys() - found.keys())
    for key in new:
        path, text = utterances[key]
        try:
            found[key] = _aligner.align(read_audio(path, SAMPLE_RATE, resample=True), text)
        except (AlignmentError, BadAudioError) as error:
            problems.append(f"{key}\t{error}\n")
    if len(problems) < len(new) or len(found) < len(before):
        write_alignment(written, {key: found[key] for key in sorted(found)})
    if problems:
        write_text(list_of_failed, "".join(problems))
    else:
        list_of_failed.unlink(missing_ok=True)
    return len(found), len(problems)
