"""A speech corpus on disk in LibriSpeech's layout: its splits, files and transcripts.

::

    ROOT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac      (or .wav, .mp3)
    ROOT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt        lines of "UTTERANCE_ID TEXT"; may be missing

The audio of a split may be packed instead (:mod:`datamodules.packed`). An utterance has one audio file.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from datamodules.audio import AUDIO_SUFFIXES
from datamodules.errors import InputError
from datamodules.files import read_lines
from datamodules.packed import is_packed, list_packed, unpacked_path

TRANSCRIPT_SUFFIX = ".trans.txt"
TRAIN_SPLITS_960H = ("train-clean-100", "train-clean-360", "train-other-500")


@dataclass(frozen=True)
class CorpusSettings:
    """All settings that determine the rows of a corpus.

    Args:
        roots: folders that hold splits, or their parents.
        splits: names of the split folders.
        sample_rate: required sample rate in Hz.
        min_samples: smallest number of samples; shorter files are bad audio.
        resample: whether files of another rate or of several channels are good audio.
        on_bad_audio: ``error`` or ``skip``; see :mod:`datamodules.scanning`.
        transcripts: ``optional``, or ``required`` (an utterance without text is bad input).
    """

    roots: tuple[str, ...]
    splits: tuple[str, ...]
    sample_rate: int = 16000
    min_samples: int = 400
    resample: bool = False
    on_bad_audio: str = "error"
    transcripts: str = "optional"

    @property
    def absolute_roots(self) -> list[str]:
        return [os.path.abspath(os.path.expanduser(root)) for root in self.roots]


class CorpusFile(NamedTuple):
    """An audio or transcript file, with size and modification time to detect changes."""

    split: str
    folder: str  # folder of the split
    path: str
    size: int
    mtime_ns: int

    @property
    def is_audio(self) -> bool:
        return self.path.lower().endswith(AUDIO_SUFFIXES)

    @property
    def relative(self) -> str:
        """Path SPLIT/SPEAKER/CHAPTER/NAME from the corpus root, the same wherever the corpus is stored."""
        return "/".join((self.split, *self._parts))

    @property
    def speaker(self) -> str:
        return self._parts[0]

    @property
    def has_speaker_and_chapter(self) -> bool:
        return len(self._parts) >= 3

    @property
    def _parts(self) -> list[str]:
        return os.path.relpath(unpacked_path(self.path), self.folder).split(os.sep)


def split_folders(settings: CorpusSettings) -> list[tuple[str, str]]:
    """(split, folder) for every requested split in every root that has it.

    A root is the folder that holds the splits, or its parent.

    Raises:
        InputError: a root does not exist, no root has a split, or several subfolders of a root have the splits.
    """
    homes = list(dict.fromkeys(home_of_splits(root, settings.splits) for root in settings.absolute_roots))
    found: list[tuple[str, str]] = []
    for split in settings.splits:
        folders = [os.path.join(home, split) for home in homes if os.path.isdir(os.path.join(home, split))]
        if not folders:
            raise InputError(f"there is no split {split!r} in {', '.join(homes)}; it has {_subfolders(homes)}")
        found += [(split, folder) for folder in folders]
    return found


def list_files(folders: Sequence[tuple[str, str]]) -> list[CorpusFile]:
    """All audio and transcript files of the splits, in order of split, root and path.

    Raises:
        InputError: a split has no audio file, or an utterance has two.
    """
    files: list[CorpusFile] = []
    with ThreadPoolExecutor(max_workers=8) as pool:  # network file systems answer in parallel
        for split, folder in folders:
            per_speaker = pool.map(_files_below, _entries(folder))
            entries = [entry for speaker in per_speaker for entry in speaker]
            files += sorted(CorpusFile(split, folder, *entry) for entry in entries)
            if is_packed(folder):
                files += [CorpusFile(split, folder, *entry) for entry in list_packed(folder)]
    _require_audio(folders, files)
    refuse_twins(file.path for file in files if file.is_audio)
    return files


def audio_below(root: str) -> Iterator[str]:
    """Paths of all audio below a folder of any layout, unordered: files, and utterances of packed splits."""
    for folder, _, names in os.walk(root):
        yield from (os.path.join(folder, name) for name in names if name.lower().endswith(AUDIO_SUFFIXES))
        if is_packed(folder):
            yield from (path for path, _, _ in list_packed(folder))


def read_transcripts(path: str) -> dict[str, str]:
    """Texts of one transcript file by utterance id; spaces or a tab separate id and text in a line.

    Raises:
        InputError: the file is not UTF-8 text.
    """
    lines = [line.split(maxsplit=1) for line in read_lines(path)]
    return {line[0]: line[1].strip() if len(line) == 2 else "" for line in lines if line}


def refuse_twins(paths: Iterable[str]) -> None:
    """Refuse two files whose names differ in the suffix only, as in a corpus that was converted in place.

    Raises:
        InputError: there are two such files; the first two are named.
    """
    seen: dict[str, str] = {}
    for path in paths:
        name = unpacked_path(path).rpartition(".")[0]
        if (other := seen.setdefault(name, path)) != path:
            raise InputError(f"{other} and {path} are one utterance twice: remove one of them")


def utterance_id(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def home_of_splits(root: str, splits: Sequence[str]) -> str:
    """The root itself if it has any of the splits, else its one subfolder with splits (LibriSpeech first)."""
    if not os.path.isdir(root):
        raise InputError(f"the corpus folder {root} does not exist")
    children = [os.path.join(root, name) for name in sorted(os.listdir(root))]
    conventional = os.path.join(root, "LibriSpeech")
    for candidates in ([root], [conventional], children):
        homes = [home for home in candidates if any(os.path.isdir(os.path.join(home, split)) for split in splits)]
        if len(homes) == 1:
            return homes[0]
        if homes:
            raise InputError(f"{root} has several folders with these splits: name those to use, of {', '.join(homes)}")
    return conventional if os.path.isdir(conventional) else root


def _subfolders(homes: Sequence[str]) -> str:
    names = sorted({entry.name for home in homes for entry in os.scandir(home) if entry.is_dir()})
    return ", ".join(names) if names else "no folders"


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        # Names with a leading dot are leftovers of other programs, such as macOS' copies of attributes.
        return [entry for entry in entries if not entry.name.startswith(".")]


def _files_below(entry: os.DirEntry[str]) -> list[tuple[str, int, int]]:
    return list(_walk(entry))


def _walk(entry: os.DirEntry[str]) -> Iterator[tuple[str, int, int]]:
    if entry.is_dir():
        for child in _entries(entry.path):
            yield from _walk(child)
    elif entry.name.lower().endswith((*AUDIO_SUFFIXES, TRANSCRIPT_SUFFIX)):
        try:
            status = entry.stat()
        except OSError:  # a broken link: reported as bad audio
            yield entry.path, -1, -1
        else:
            yield entry.path, status.st_size, status.st_mtime_ns


def _require_audio(folders: Sequence[tuple[str, str]], files: Sequence[CorpusFile]) -> None:
    with_audio = {file.folder for file in files if file.is_audio}
    for split, folder in folders:
        if folder not in with_audio:
            kinds = ", ".join(AUDIO_SUFFIXES)
            raise InputError(f"the split {split!r} is empty: {folder} has no audio file ({kinds})")
