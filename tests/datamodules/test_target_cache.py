"""Rounding of targets, and the reading of a cache: the right rows and layers, and one clear error for what is wrong."""

import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.batching import FixedSegments
from datamodules.cached_records import CachedRecords, RecordLayout, encode
from datamodules.target_cache import PLACES, TargetCache
from datamodules.target_writing import Computed, plan_targets, write_targets

WIDTH, LAYERS, FEATURES_WIDTH = 10, [2, 3], 7
SEGMENTS = FixedSegments(np.zeros(7, np.int64), np.array([640, 320, 640, 960, 320, 640, 640]))
FRAMES = SEGMENTS.num_samples // 320


def targets_of(row: int) -> Tensor:
    """(S, F, D), heavy-tailed as hidden states are."""
    generator = torch.Generator().manual_seed(row)
    return torch.randn(3, int(FRAMES[row]), WIDTH, generator=generator) ** 3


def features_of(row: int) -> Tensor:
    """(F, C)."""
    generator = torch.Generator().manual_seed(100 + row)
    return torch.randn(int(FRAMES[row]), FEATURES_WIDTH, generator=generator)


def source(batches: Sequence[np.ndarray], features: bool = False) -> Iterator[Computed]:
    for rows in batches:
        targets = torch.stack([targets_of(int(row)) for row in rows], dim=1)
        yield Computed(targets, torch.stack([features_of(int(row)) for row in rows]) if features else None)


def made(
    folder: Path, dtype: str = "bf16", shard_bytes: int = 150, features: str | None = None, **more: Any
) -> dict[str, float]:
    settings = {"layers": LAYERS, "width": WIDTH, "dtype": dtype, "teacher.output_layer": 4, **more}
    if features:
        settings |= {"features": features, "features_width": FEATURES_WIDTH, "student.front_end_weights": "abc"}
    plan = plan_targets(SEGMENTS, FRAMES, RecordLayout.of(settings), shard_bytes)
    return write_targets(folder, settings, plan, partial(source, features=bool(features)), batch_samples=1500)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_is_read_is_what_the_source_said_rounded(dtype: str, tmp_path: Path) -> None:
    made(tmp_path / "cache", dtype)
    assert len(list((tmp_path / "cache").glob("*.targets"))) > 2
    cache = TargetCache(str(tmp_path / "cache"))
    for rows in ([0, 2, 5, 6], [4, 1], [3]):
        expected = encode(torch.stack([targets_of(row) for row in rows], dim=1), dtype)
        found = pickle.loads(pickle.dumps(cache)).read(np.array(rows))
        assert found.features_BFC is None
        assert found.targets.values.dtype == expected.values.dtype
        assert torch.equal(found.targets.decoded(), expected.decoded())
        assert not torch.equal(found.targets.decoded()[0], expected.decoded()[1])
        if len(rows) > 1:
            assert not torch.equal(found.targets.decoded(), cache.read(np.array(rows[::-1])).targets.decoded())


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("features", ["float32", "bf16", "int8"])
def test_features_are_read_with_the_targets_or_left_out(features: str, dtype: str, tmp_path: Path) -> None:
    errors = made(tmp_path / "cache", dtype, features=features)
    assert (errors["features"] == 0) == (features == "float32")
    folder, rows = str(tmp_path / "cache"), [0, 2, 5]
    both, alone = TargetCache(folder).read(np.array(rows)), TargetCache(folder, features=False).read(np.array(rows))
    expected = torch.stack([features_of(row) for row in rows])
    assert both.features_BFC is not None
    assert torch.equal(both.features_BFC, encode(expected, features).decoded().float())
    assert torch.equal(both.features_BFC, expected) == (features == "float32")
    assert not torch.equal(both.features_BFC[0], both.features_BFC[1])
    assert alone.features_BFC is None
    assert torch.equal(both.targets.decoded(), alone.targets.decoded())
    assert TargetCache(folder).front_end == "abc" != TargetCache(folder, features=False).front_end
    one = TargetCache(folder, [3]).read(np.array(rows))
    assert torch.equal(one.targets.decoded(), both.targets.decoded()[[0, 2]])
    assert one.features_BFC is not None
    assert torch.equal(one.features_BFC, both.features_BFC)


def test_a_record_of_one_type_is_one_copy() -> None:
    layout = RecordLayout(3, 768, "bf16", 512, "bf16")
    assert layout.spans(64, [0, 1, 2], features=True) == [(0, 0, layout.num_bytes(64))]
    assert len(layout.spans(64, [0, 2], features=True)) == 2
    assert layout.spans(64, [1], features=False) == [(64 * (512 + 768) * 2, 0, 64 * 768 * 2)]


def test_layers_that_a_run_does_not_need_are_not_read(tmp_path: Path) -> None:
    made(tmp_path / "cache", "int8")
    everything = TargetCache(str(tmp_path / "cache")).read(np.array([0, 2])).targets.decoded()
    chosen = TargetCache(str(tmp_path / "cache"), [3]).read(np.array([0, 2])).targets.decoded()
    assert torch.equal(chosen, everything[[0, 2]])
    assert TargetCache(str(tmp_path / "cache"), []).read(np.array([3])).targets.values.shape == (1, 1, 3, WIDTH)


def test_rounding_errors_are_those_of_the_formats() -> None:
    targets = torch.randn(1, 4, 50, 768, generator=torch.Generator().manual_seed(0))
    targets[0, 0, 0] = 0.0
    for dtype, bound in (("bf16", 2.0**-8), ("int8", 0.012)):
        stored = encode(targets, dtype)
        error = (stored.decoded().float() - targets).norm() / targets.norm()
        assert bound / 4 < error < bound
        assert not stored.decoded()[0, 0, 0].any()
    assert int(encode(targets, "int8").values.abs().max()) == 127


def test_measured_errors_are_over_all_rows(tmp_path: Path) -> None:
    for dtype in ("bf16", "int8"):
        errors = made(tmp_path / dtype, dtype)
        whole = [torch.cat([targets_of(row)[place] for row in range(7)]) for place in range(3)]
        for target_FD, name in zip(whole, ("output", "layer_2", "layer_3"), strict=True):
            expected = (encode(target_FD, dtype).decoded().float() - target_FD).norm() / target_FD.norm()
            assert errors[name] == pytest.approx(float(expected), rel=1e-4)


def test_sizes_of_librispeech() -> None:
    """The numbers of docs/caching.md: 960 h at 50 frames a second, three targets and features of HuBERT Base."""
    frames = 960 * 3600 * 50
    for dtype, targets, features in (("bf16", 796.3, 176.9), ("int8", 400.2, 89.2)):
        layout = RecordLayout(3, 768, dtype, 512, dtype)
        assert frames * layout.target_bytes / 1e9 == pytest.approx(targets, abs=0.05)
        assert frames * layout.feature_bytes / 1e9 == pytest.approx(features, abs=0.05)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    made(tmp_path / "cache", **{"data.segment_seed": 0, "teacher.layer_2_weights": "abc"})
    cache = TargetCache(str(tmp_path / "cache"))
    cache.require({"teacher.output_layer": 4, "teacher.layer_2_weights": "abc"})
    with pytest.raises(ValueError, match=r"segment_seed was 0, is 1; teacher\.layer_6_weights is not in it\. Use the"):
        cache.require({"data.segment_seed": 1, "teacher.output_layer": 4, "teacher.layer_6_weights": "abc"})


def test_no_cache_and_an_unfinished_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere holds no finished cache of targets: make one with `interstack"):
        TargetCache(str(tmp_path / "nowhere"))


def test_damage_names_the_file(tmp_path: Path) -> None:
    made(tmp_path / "cache")
    cache = TargetCache(str(tmp_path / "cache"))
    cache.verify()
    shard = tmp_path / "cache" / "00001.targets"
    content = shard.read_bytes()
    shard.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(ValueError, match=r"00001\.targets has changed since the targets were cached"):
        cache.verify()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"00001\.targets has changed its size"):
        cache.read(np.array([0]))
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.targets is missing"):
        cache.verify()
    shard.write_bytes(content)
    cache.verify()
    (tmp_path / "cache" / PLACES).write_bytes(b"")
    with pytest.raises(ValueError, match=r"places\.npy has changed"):
        cache.verify()


def test_records_move_as_one_tensor() -> None:
    layout = RecordLayout(2, 3, "int8", 4, "bf16")
    moved = CachedRecords(torch.zeros(1, 128, dtype=torch.uint8), layout, 2).to(torch.device("meta"))
    assert moved.features_BFC is not None
    assert {moved.targets.decoded().device.type, moved.features_BFC.device.type} == {"meta"}
