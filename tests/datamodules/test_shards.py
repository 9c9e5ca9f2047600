"""Pieces of large files are announced to the system before they are read."""

import json
import mmap
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import target_cache
from datamodules.packed import MARKER as PACKED
from datamodules.packed import Piece
from datamodules.shards import READ_AHEAD_BYTES, MappedFile, allow_open_files, forget_folders
from datamodules.target_cache import TargetCache
from tests.datamodules.test_target_cache import made
from tests.processes import ended, fork

CONTENT = np.random.default_rng(0).integers(0, 256, 3 * READ_AHEAD_BYTES, dtype=np.uint8)
PAGE = mmap.PAGESIZE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First byte and number of bytes of every piece that the system was asked to read."""
    found: list[tuple[int, int]] = []

    class Listening(mmap.mmap):
        def madvise(self, option: int, *piece: Any) -> None:
            assert option == mmap.MADV_WILLNEED
            found.append(piece)
            super().madvise(option, *piece)  # refuses a place that is no page's

    monkeypatch.setattr(mmap, "mmap", Listening)
    forget_folders()
    return found


def test_a_large_piece_is_announced_in_requests_that_the_system_does_not_cut(
    tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    (tmp_path / "file").write_bytes(CONTENT.tobytes())
    file = MappedFile(str(tmp_path / "file"), "<i2")
    assert np.array_equal(file.values, CONTENT.view("<i2"))
    file.will_need(PAGE // 2 + 50, (READ_AHEAD_BYTES + PAGE) // 2)
    assert asked == [(PAGE, READ_AHEAD_BYTES), (PAGE + READ_AHEAD_BYTES, 100 + PAGE)]
    asked.clear()
    file.will_need(3, 0)
    assert sum(size for _, size in asked) <= PAGE


def test_all_records_of_a_batch_are_announced_before_the_first_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "cache", "int8", features="bf16")
    calls: list[tuple[str, str, int, int]] = []
    open_shard = target_cache._shard

    class Listening:
        def __init__(self, folder: str, name: str) -> None:
            self.name, self.file, self.values = name, open_shard(folder, name), self

        def will_need(self, first: int, number: int) -> None:
            calls.append(("asked", self.name, first, number))

        def __getitem__(self, piece: slice) -> np.ndarray:
            calls.append(("read", self.name, piece.start, piece.stop - piece.start))
            return self.file.values[piece]

    rows = np.array([0, 2, 5])
    expected = TargetCache(str(tmp_path / "cache"), layers=[3]).read(rows).targets.decoded()
    monkeypatch.setattr(target_cache, "_shard", Listening)
    found = TargetCache(str(tmp_path / "cache"), layers=[3]).read(rows).targets.decoded()
    assert torch.equal(found, expected)
    half = len(calls) // 2
    assert [kind for kind, *_ in calls] == ["asked"] * half + ["read"] * half
    assert [piece for _, *piece in calls[:half]] == [piece for _, *piece in calls[half:]]


def test_samples_of_a_pack_are_announced(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    shard = tmp_path / "00000.pcm"
    shard.write_bytes(CONTENT.tobytes())
    (tmp_path / PACKED).write_text(f'{{"parts": {{"00000.pcm": {{"bytes": {len(CONTENT)}}}}}}}')
    piece = Piece(str(shard), first=PAGE, num_samples=100)
    assert np.array_equal(piece.read(10, 100) * 32768, CONTENT[2 * PAGE + 20 :][:180].view("<i2"))
    assert asked == [(2 * PAGE, 200)]


def limit_for(number: int, hard: int) -> int:
    """The limit of open files of a process that has opened a cache of ``number`` files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    allow_open_files(number, "cache", "--shard_megabytes")
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may() -> None:
    def check() -> None:
        assert limit_for(950, hard=4096) == 4096
        with pytest.raises(ValueError, match=r"cache has 4000 files.* hold 4096 open.*`ulimit -n 4256`"):
            allow_open_files(4000, "cache", "--shard_megabytes")

    assert ended(fork(check)) == 0  # a hard limit cannot be raised again


def test_a_pack_of_many_shards_raises_the_limit_when_it_is_read(tmp_path: Path) -> None:
    parts = {f"{number:05d}.pcm": {"bytes": len(CONTENT)} for number in range(1000)}
    (tmp_path / "00000.pcm").write_bytes(CONTENT.tobytes())
    (tmp_path / PACKED).write_text(json.dumps({"parts": parts}))

    piece = Piece(str(tmp_path / "00000.pcm"), first=0, num_samples=100)

    def raised() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
        piece.read(0, 100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 4096

    def refused() -> None:  # rather than with the thousandth shard
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1200))
        with pytest.raises(ValueError, match=r"has 1000 files.* hold 1200 open.*interstack pack --shard_megabytes"):
            piece.read(0, 100)

    assert ended(fork(raised)) == ended(fork(refused)) == 0
