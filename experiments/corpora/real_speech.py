"""``python -m experiments.corpora.real_speech --data DIR --output DIR``: make the corpus of study ``table1_whisper``.

DIR holds parts of LibriSpeech, each in its layout: ``LibriSpeech/{train-clean-100,test-clean,test-other}``,
``LibriSpeech_mp3/dev-clean``, ``LibriSpeech_many_speakers/train-clean-100``, and ``manifest.tsv``, which lists the
files with their transcripts. OUTPUT gets, in LibriSpeech's layout::

    OUTPUT/LibriSpeech/train         all speech but the held-out part, in pieces of at most 5 s, to train students
    OUTPUT/LibriSpeech/labelled      links to those of its utterances that have transcripts, to train probes
    OUTPUT/LibriSpeech/dev           three speakers of dev-clean, held out
    OUTPUT/LibriSpeech/test-other    twelve speakers, held out
    OUTPUT/tables/*.tsv              tables for the probes of speakers and keywords

Files are cut into pieces because a run with cached targets trains on one segment per file, and short segments make
attention cheap. ``interstack align`` then makes the phone labels of the last three splits.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from datamodules.audio import AUDIO_SUFFIXES
from datamodules.errors import InputError
from datamodules.files import replacing
from experiments.superb.real_speech import HELD_OUT_SPEAKERS, write_tables

TRANSCRIBED = ("LibriSpeech/train-clean-100", "LibriSpeech/test-clean", "LibriSpeech_mp3/dev-clean")
SOURCES = {
    "train": (*TRANSCRIBED, "LibriSpeech_many_speakers/train-clean-100"),
    "labelled": TRANSCRIBED,
    "dev": ("LibriSpeech_mp3/dev-clean",),
    "test-other": ("LibriSpeech/test-other",),
}
"""Folders of each split. The recordings hold dev-clean twice; only its MP3 files have all of its utterances."""
LONGEST_PIECE = 80_000


def real_speech_corpus(data: str, output: str) -> None:
    """Write pieces, links and tables; existing ones are kept.

    Args:
        data: folder of the recordings, with manifest.tsv.
        output: folder of the corpus.

    Raises:
        InputError: a folder of recordings is missing.
    """
    root, folder = Path(data).resolve(), Path(output)
    for split, sources in SOURCES.items():
        for source in sources:
            if not (root / source).is_dir():
                raise InputError(f"{root} has no folder {source}: --data is the folder that holds it")
            for path in _files(root / source, split):
                place = folder / "LibriSpeech" / split / path.relative_to(root / source)
                place.parent.mkdir(parents=True, exist_ok=True)
                if split == "train":
                    _write_pieces(path, place)
                elif place.suffix.lower() not in AUDIO_SUFFIXES:
                    shutil.copyfile(path, place)
                elif not place.is_symlink():
                    place.symlink_to(path)
    write_tables(root, folder / "tables")


def _write_pieces(path: Path, place: Path) -> None:
    """Write pieces of equal length as FLAC, ``NAME-0.flac``, ``NAME-1.flac``, ...; transcripts are left out."""
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        return
    samples_T, rate = soundfile.read(path, dtype="int16")
    for number, piece_T in enumerate(np.array_split(samples_T, math.ceil(len(samples_T) / LONGEST_PIECE))):
        piece = place.with_name(f"{place.stem}-{number}.flac")
        if not piece.exists():
            with replacing(piece) as temporary:
                soundfile.write(temporary, piece_T, rate, format="FLAC")


def _files(source: Path, split: str) -> Iterator[Path]:
    """Yield audio and transcripts SPEAKER/CHAPTER/NAME of a split; only dev has the held-out speakers."""
    for path in sorted(source.glob("*/*/*")):
        held_out = split != "test-other" and path.parent.parent.name in HELD_OUT_SPEAKERS
        if held_out == (split == "dev") and path.suffix.lower() in (*AUDIO_SUFFIXES, ".txt"):
            yield path


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(real_speech_corpus)
