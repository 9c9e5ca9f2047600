"""LibriSpeech for PR and ASR, with transcripts in the LibriSpeech layout and configurable splits."""

import os
from collections.abc import Sequence

from datamodules.corpus import CorpusSettings
from datamodules.errors import InputError
from datamodules.manifest import prepare_manifest
from datamodules.scanning import Problem
from datamodules.superb.missing import Published
from datamodules.superb.rows import MIN_SAMPLES, Reading, Row, SuperbCorpus

PUBLISHED = Published(
    "LibriSpeech",
    "https://www.openslr.org/12 (train-clean-100, dev-clean, test-clean)",
    "ROOT/train-clean-100/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac (or .wav, .mp3; ROOT/LibriSpeech/... works too)\n"
    "ROOT/train-clean-100/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt   lines of 'SPEAKER-CHAPTER-NUMBER TEXT'\n"
    "ROOT/dev-clean/...\nROOT/test-clean/...",
)


def read_librispeech(
    root: str,
    train_splits: Sequence[str] = ("train-clean-100",),
    dev_splits: Sequence[str] = ("dev-clean",),
    test_splits: Sequence[str] = ("test-clean",),
    reading: Reading = Reading(),  # noqa: B008
    cache_dir: str | None = None,
) -> SuperbCorpus:
    """Read rows with transcripts; every test split is a separate test. The manifest is cached.

    Raises:
        InputError: the corpus or a split is missing, an utterance has no transcript, or audio is bad.
    """
    require_librispeech(root, [*train_splits, *dev_splits, *test_splits])
    skipped: list[Problem] = []

    def rows(splits: Sequence[str]) -> list[Row]:
        settings = CorpusSettings(
            roots=(root,),
            splits=tuple(splits),
            min_samples=MIN_SAMPLES,
            resample=reading.resample,
            on_bad_audio=reading.on_bad_audio,
            transcripts="required",
        )
        manifest = prepare_manifest(settings, cache_dir)
        skipped.extend(manifest.skipped)
        return [
            Row(
                manifest.utterance_id(row),
                manifest.path(row),
                int(manifest.num_samples[row]),
                # The recipe only converts transcripts to upper case.
                (manifest.transcript(row) or "").upper(),
                manifest.speaker(row),
            )
            for row in range(len(manifest))
        ]

    tests = {split: rows([split]) for split in test_splits}
    return SuperbCorpus(rows(train_splits), rows(dev_splits), tests, [], skipped)


def require_librispeech(root: str, splits: Sequence[str]) -> None:
    """Check that ``root``, or a folder in it, has the splits.

    Raises:
        InputError: the folder or a split is missing.
    """
    PUBLISHED.require(root)
    root = os.path.abspath(os.path.expanduser(root))
    homes = [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]
    for split in splits:
        if not any(os.path.isdir(os.path.join(home, split)) for home in homes):
            raise InputError(PUBLISHED.missing(f"there is no split {split!r} in {root}"))
