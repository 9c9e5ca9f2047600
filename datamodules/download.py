"""Download of LibriSpeech's splits."""

import contextlib
import logging
import os
import shutil
from collections.abc import Sequence

from datamodules.files import FolderLock

logger = logging.getLogger(__name__)


def download_missing(roots: Sequence[str], splits: Sequence[str]) -> None:
    """Download splits that no root has into the first root, through torchaudio (openslr.org).

    torchaudio treats a split whose extraction was interrupted as complete. So a split is extracted in a separate
    folder and moved when it is complete. Of several processes, also on other machines, one downloads and the others
    wait.
    """
    first = os.path.abspath(os.path.expanduser(roots[0]))
    home = first if os.path.basename(first) == "LibriSpeech" else os.path.join(first, "LibriSpeech")
    given = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    places = [*given, *(os.path.join(root, "LibriSpeech") for root in given)]
    for split in splits:
        if any(os.path.isdir(os.path.join(place, split)) for place in places):
            continue
        lock = f".download-{split}.lock"
        with FolderLock(home, lock, "wait for its download", wait=True):
            if not os.path.isdir(os.path.join(home, split)):  # else another process has downloaded it meanwhile
                _download(home, split)
            with contextlib.suppress(FileNotFoundError):  # those that wait hold the file open
                os.unlink(os.path.join(home, lock))


def _download(home: str, split: str) -> None:
    from torchaudio.datasets import LIBRISPEECH

    staging = os.path.join(home, f".download-{split}")
    shutil.rmtree(os.path.join(staging, "LibriSpeech"), ignore_errors=True)
    os.makedirs(staging, exist_ok=True)
    logger.info("downloading %s to %s", split, home)
    LIBRISPEECH(staging, url=split, download=True)
    os.replace(os.path.join(staging, "LibriSpeech", split), os.path.join(home, split))
    shutil.rmtree(staging)
