"""Download of LibriSpeech's splits."""

import logging
import os
import shutil
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def download_missing(roots: Sequence[str], splits: Sequence[str]) -> None:
    """Download splits that no root has into the first root, through torchaudio (openslr.org).

    torchaudio treats a split whose extraction was interrupted as complete. So a split is extracted in a separate
    folder and moved when it is complete.
    """
    first = os.path.abspath(os.path.expanduser(roots[0]))
    home = first if os.path.basename(first) == "LibriSpeech" else os.path.join(first, "LibriSpeech")
    given = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    places = [*given, *(os.path.join(root, "LibriSpeech") for root in given)]
    for split in splits:
        if not any(os.path.isdir(os.path.join(place, split)) for place in places):
            _download(home, split)


def _download(home: str, split: str) -> None:
    from torchaudio.datasets import LIBRISPEECH

    staging = os.path.join(home, f".download-{split}")
    shutil.rmtree(os.path.join(staging, "LibriSpeech"), ignore_errors=True)
    os.makedirs(staging, exist_ok=True)
    logger.info("downloading %s to %s", split, home)
    LIBRISPEECH(staging, url=split, download=True)
    os.replace(os.path.join(staging, "LibriSpeech", split), os.path.join(home, split))
    shutil.rmtree(staging)
