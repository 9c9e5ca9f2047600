"""Reading a packed split: 16-bit samples of many utterances in a few large files.

Small compressed files cost decoding and, on network storage, a round trip each. A packed split (made by ``interstack
pack``, :mod:`datamodules.packing`) has the layout and name of the split that it was made from::

    ROOT/SPLIT/packed.json                   settings, sample rate, size and SHA-256 of every shard and of the index
    ROOT/SPLIT/index.jsonl                   [shard, first sample, number of samples, SPEAKER/CHAPTER/NAME] per line
    ROOT/SPLIT/00000.pcm, 00001.pcm, ...     samples, int16, little-endian, utterance after utterance
    ROOT/SPLIT/SPEAKER/CHAPTER/*.trans.txt   transcripts

so that ``data.root`` alone chooses it. An utterance in it has a path like that of a file,
``ROOT/SPLIT/00003.pcm/FIRST-NUMBER/SPEAKER/CHAPTER/NAME.flac``, for messages and manifests. Samples are exactly equal
to those of the 16-bit files, since both are int16 divided by 32768.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from datamodules.errors import InputError
from datamodules.files import read_json, read_lines
from datamodules.shards import MappedFile, allow_open_files, first_damage, forget_folders, read_marker, remembered

MARKER = "packed.json"
INDEX = "index.jsonl"
FULL_SCALE = 32768
BYTES_PER_SAMPLE = 2
_PATH = re.compile(r"(?P<shard>(?P<folder>.+)/\d{5}\.pcm)/(?P<first>\d+)-(?P<number>\d+)/(?P<relative>.+)", re.DOTALL)


class Piece(NamedTuple):
    """The location of an utterance's samples in a shard."""

    shard: str
    first: int
    num_samples: int

    @property
    def sample_rate(self) -> int:
        return int(read_marker(os.path.dirname(self.shard), MARKER)["sample_rate"])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples ``start`` to ``stop`` of the utterance as float32 in [-1, 1), (stop - start,).

        Raises:
            InputError: the shard is missing or has changed its size.
        """
        shard, first = _shard(self.shard), self.first + start
        shard.will_need(first, stop - start)
        return np.multiply(shard.values[first : self.first + stop], np.float32(1 / FULL_SCALE), dtype=np.float32)


def piece_of(path: str) -> Piece | None:
    """The piece to which a path refers; ``None`` for an ordinary file."""
    if ".pcm/" not in path or (match := _PATH.fullmatch(path)) is None:
        return None
    return Piece(match["shard"], int(match["first"]), int(match["number"]))


def unpacked_path(path: str) -> str:
    """Path ROOT/SPLIT/SPEAKER/CHAPTER/NAME of an utterance, packed or not."""
    if ".pcm/" not in path or (match := _PATH.fullmatch(path)) is None:
        return path
    return f"{match['folder']}/{match['relative']}"


def is_packed(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, MARKER))


def packed_digest(folder: str) -> str:
    """Hash of the packed data, from the stored checksums; the data are not read again."""
    parts = read_json(os.path.join(folder, MARKER))["parts"]  # not cached, since it may have been packed again
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def list_packed(folder: str) -> Iterator[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every utterance, in the order of the corpus that was packed.

    Size and time are those of its shard, so that a changed shard changes all of its utterances.
    """
    shards: dict[int, tuple[str, int, int]] = {}
    for line in read_lines(os.path.join(folder, INDEX)):
        number, first, num_samples, relative = json.loads(line)
        if number not in shards:
            shards[number] = _status(os.path.join(folder, shard_name(number)))
        shard, size, mtime_ns = shards[number]
        yield f"{shard}/{first}-{num_samples}/{relative}", size, mtime_ns


def shard_name(number: int) -> str:
    return f"{number:05d}.pcm"


def verify_packed(folder: str) -> None:
    """Compare every shard and the index with the stored checksums.

    Raises:
        InputError: a file is missing or differs; the first is named.
    """
    forget_folders()  # the split may have been packed again
    if (damage := first_damage(folder, read_marker(folder, MARKER)["parts"])) is not None:
        raise _damaged(*damage)


def _damaged(path: str, problem: str) -> InputError:
    return InputError(
        f"{path} {problem} since it was packed: copy the packed split again, or make it again with "
        f"`interstack pack --overwrite true`"
    )


def _status(shard: str) -> tuple[str, int, int]:
    try:
        status = os.stat(shard)
    except OSError:
        raise _damaged(shard, "is missing") from None
    return shard, status.st_size, status.st_mtime_ns


@remembered
def _shard(shard: str) -> MappedFile:
    folder, name = os.path.split(shard)
    _, size, _ = _status(shard)
    parts = read_marker(folder, MARKER)["parts"]
    allow_open_files(len(parts), folder, "`interstack pack --shard_megabytes`")
    # Reading past the end of a mapped file kills the process without a message.
    if size != parts[name]["bytes"]:
        raise _damaged(shard, "has changed its size")
    return MappedFile(shard, "<i2")
