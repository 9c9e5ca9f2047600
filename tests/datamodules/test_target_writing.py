"""Writing a cache: shards, batches for the teacher, interrupts, room, and what is refused."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import target_writing
from datamodules.batching import FixedSegments
from datamodules.cached_records import RecordLayout
from datamodules.shards import unfinished_folder
from datamodules.target_cache import MARKER, TargetCache
from datamodules.target_writing import Computed, TargetPlan, is_cached, plan_targets, room_for, write_targets
from tests.datamodules.test_target_cache import FRAMES, LAYERS, SEGMENTS, WIDTH, made, source


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".targets.json")}


def test_every_row_has_one_place_and_batches_have_one_length() -> None:
    segments = FixedSegments(np.zeros(200, np.int64), np.random.default_rng(0).integers(1, 6, 200) * 320)
    plan = plan_targets(segments, segments.num_samples // 320, RecordLayout(2, 8, "bf16"), shard_bytes=1000)
    batches = [batch for shard in range(len(plan.shards)) for batch in plan.batches(shard, batch_samples=2000)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        lengths = segments.num_samples[batch]
        assert len(set(lengths.tolist())) == 1
        assert len(batch) == 1 or lengths.sum() <= 2000
    assert max(len(batch) for batch in batches) > 1
    for shard in plan.shards:
        assert plan.row_bytes[plan.rows[shard.start : shard.stop]].sum() <= 1000
    assert plan.num_bytes == segments.num_samples.sum() // 320 * 2 * 8 * 2


def test_a_row_larger_than_a_shard_gets_one_of_its_own() -> None:
    plan = plan_targets(SEGMENTS, FRAMES, RecordLayout(3, WIDTH, "bf16"), shard_bytes=1)
    assert [len(shard) for shard in plan.shards] == [1] * 7
    assert plan.batches(0, batch_samples=1)[0].tolist() == [1]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_an_interrupted_call_goes_on_where_it_stopped(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "whole", dtype)
    asked: list[int] = []

    def stops(batches: Sequence[np.ndarray], features: bool) -> Iterator[Computed]:
        for targets in source(batches):
            asked.append(1)
            if len(asked) == 4:
                raise KeyboardInterrupt
            yield targets

    with monkeypatch.context() as patched:
        patched.setattr("tests.datamodules.test_target_cache.source", stops)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cache", dtype)
    assert not (tmp_path / "cache").exists()
    left = {path.name for path in unfinished_folder(tmp_path / "cache").iterdir()}
    assert "00000.targets" in left
    first = unfinished_folder(tmp_path / "cache") / "00000.targets"
    second = unfinished_folder(tmp_path / "cache") / "00001.targets"
    kept = second.stat().st_mtime_ns
    first.write_bytes(first.read_bytes()[:-1] + b"x")  # damaged since: is written again
    calls: list[int] = []

    def counted(batches: Sequence[np.ndarray], features: bool) -> Iterator[Computed]:
        calls.append(len(batches))
        return source(batches, features)

    with monkeypatch.context() as patched:
        patched.setattr("tests.datamodules.test_target_cache.source", counted)
        made(tmp_path / "cache", dtype)
    assert len(calls) == 1 < calls[0]  # one loader for all missing shards, not one for each
    assert (tmp_path / "cache" / "00001.targets").stat().st_mtime_ns == kept
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_an_unfinished_cache_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    made(tmp_path / "whole", **{"data.segment_seed": 1})
    made(tmp_path / "other", **{"data.segment_seed": 0})
    (tmp_path / "other").rename(unfinished_folder(tmp_path / "cache"))
    (unfinished_folder(tmp_path / "cache") / "00099.targets").write_bytes(b"of smaller shards")
    made(tmp_path / "cache", **{"data.segment_seed": 1})
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_finished_cache_is_verified_and_another_is_not_replaced_unasked(tmp_path: Path) -> None:
    made(tmp_path / "cache")
    settings: dict[str, Any] = json.loads((tmp_path / "cache" / MARKER).read_text())["settings"]
    assert is_cached(tmp_path / "cache", settings, overwrite=False)
    assert not is_cached(tmp_path / "elsewhere", settings, overwrite=False)
    with pytest.raises(ValueError, match=r"teacher\.output_layer 4 instead of 5: set overwrite"):
        is_cached(tmp_path / "cache", settings | {"teacher.output_layer": 5}, overwrite=False)
    assert not is_cached(tmp_path / "cache", settings | {"teacher.output_layer": 5}, overwrite=True)
    shard = tmp_path / "cache" / "00000.targets"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"00000\.targets has changed"):
        is_cached(tmp_path / "cache", settings, overwrite=False)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="was not made by this command"):
        is_cached(tmp_path / "corpus", settings, overwrite=True)


def test_a_remade_cache_is_read_anew(tmp_path: Path) -> None:
    made(tmp_path / "cache", "bf16")
    before = TargetCache(str(tmp_path / "cache")).read(np.array([0]))
    made(tmp_path / "cache", "int8")
    cache = TargetCache(str(tmp_path / "cache"))
    cache.verify()
    assert TargetCache(str(tmp_path / "cache")).read(np.array([0])).layout != before.layout


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_targets(SEGMENTS, FRAMES, RecordLayout(3, WIDTH, "bf16"), 150)
    assert room_for(tmp_path / "cache", plan) > plan.num_bytes
    written = unfinished_folder(tmp_path / "cache") / "00000.targets"
    monkeypatch.setattr(target_writing, "free_bytes", lambda *_: plan.num_bytes - 1)
    with pytest.raises(ValueError, match=r"cache has room for 0\.0 GB, the targets need 0\.0 GB: choose another"):
        room_for(tmp_path / "cache", plan)
    assert not written.exists()


def test_what_an_earlier_call_wrote_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_targets(SEGMENTS, FRAMES, RecordLayout(3, WIDTH, "bf16"), 150)
    before = room_for(tmp_path / "cache", plan)
    (unfinished_folder(tmp_path / "cache") / "00000.targets").write_bytes(b"x" * 10**7)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0})())
    assert before > room_for(tmp_path / "cache", plan) == 10**7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: Computed(x.targets[:, :, :-1]), r"targets have shape \(3, 2, 0, 10\) instead of \(3, 2, 1, 10\)"),
        (lambda x: Computed(x.targets * float("nan")), r"not finite in one of the rows \[1, 4\]"),
        (lambda x: Computed(x.targets, torch.ones(2, 1, 9)), r"features have shape \(2, 1, 9\) instead of \(2, 1, 0\)"),
    ],
)
def test_a_source_that_goes_wrong_is_an_error(change: Any, message: str, tmp_path: Path) -> None:
    plan: TargetPlan = plan_targets(SEGMENTS, FRAMES, RecordLayout(3, WIDTH, "bf16"), 150)
    settings = {"layers": LAYERS, "width": WIDTH, "dtype": "bf16"}
    with pytest.raises(ValueError, match=message):
        write_targets(tmp_path / "cache", settings, plan, lambda rows: map(change, source(rows)), 1500)
    assert not (tmp_path / "cache").exists()
    assert torch.equal(*(next(source([np.array([1, 4])])).targets for _ in range(2)))
