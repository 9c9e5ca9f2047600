"""Batches of noise have LibriSpeech-like lengths that are cropped as the data module crops."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.batching import CropRule
from experiments.bench.noise import MAX_SECONDS, cropped_widths, like_librispeech, noise
from lightning_modules.distillation import DistillationModule
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_teacher


def test_lengths_are_like_librispeech() -> None:
    seconds = like_librispeech(20_000) / 16_000
    assert seconds.min() >= 2
    assert np.quantile(seconds, 0.5) == pytest.approx(14, abs=0.3)
    assert seconds.mean() == pytest.approx(0.75 * 14.5 + 0.25 * 8, abs=0.1)
    assert (seconds < 10).mean() == pytest.approx(0.25 * 8 / 12, abs=0.02)


def test_widths_are_a_function_of_the_epoch_and_fit_the_longest() -> None:
    widths = cropped_widths(32, 8, epoch=1)
    assert widths == cropped_widths(32, 8, epoch=1)
    assert widths != cropped_widths(32, 8, epoch=2)
    assert len(set(widths)) > 4
    assert max(widths) <= MAX_SECONDS * 16_000


def test_a_grid_rounds_the_same_batches_down() -> None:
    free, grid = (cropped_widths(32, 8, epoch=1, grid=grid) for grid in (1, 1600))
    assert grid == [width // 1600 * 1600 for width in free]
    assert grid != free


@pytest.mark.parametrize(("length", "taken"), [("crop", [3200] * 3), ("pad", [3300, 4000, 5000])])
def test_a_grid_is_for_cropped_batches(length: str, taken: list[int]) -> None:
    rule = CropRule(np.array([3300, 4000, 9000]), 5000, length, seed=0, grid=1600)
    batch = rule.resolve(np.arange(3), 0)
    assert batch.num_samples.tolist() == taken
    short = CropRule(np.array([700, 800]), 5000, "crop", seed=0, grid=1600).resolve(np.arange(2), 0)
    assert short.num_samples.tolist() == [700, 700]


def test_batches_are_views_of_one_piece_of_noise() -> None:
    batches = noise(2, [3, 5, 5], pinned=False)
    assert [tuple(batch.waveforms.shape) for batch in batches] == [(2, 3), (2, 5), (2, 5)]
    assert len({batch.waveforms.untyped_storage().data_ptr() for batch in batches}) == 1
    assert all(batch.waveforms.is_contiguous() for batch in batches)
    assert batches[0].num_samples.tolist() == batches[0].global_num_samples.tolist() == [3, 3]


def test_a_batch_of_a_cache_has_the_shapes_of_its_module(tmp_path: Path) -> None:
    teacher = HuggingFaceTeacher(str(save_teacher(tmp_path / "teacher", layers=3)))
    module = DistillationModule(teacher, StudentConfig(16, 24, 2, front_end="frozen", num_layers=3))
    for batch, width in zip(noise(2, [3200, 4800], False, module, "features"), (3200, 4800), strict=True):
        frames = int(module.student.num_frames(torch.tensor(width)))
        assert batch.waveforms is None
        values, features_BFC = batch.cached.targets.decoded(), batch.cached.features_BFC
        assert values.shape == (3, 2, frames, teacher.hidden_size)
        assert features_BFC.shape == (2, frames, module.student.hubert.config.conv_dim[-1])
        assert values.float().std() == pytest.approx(1, abs=0.1)
        assert features_BFC.std() == pytest.approx(1, abs=0.1)
        assert torch.isfinite(module.losses(batch).total)
    (batch,) = noise(2, [3200], False, module, "targets")
    assert (batch.waveforms.shape, batch.cached.features_BFC) == ((2, 3200), None)
    trained = DistillationModule(teacher, StudentConfig(16, 24, 2, num_layers=3))
    with pytest.raises(
        ValueError, match="cached=features needs a front end that is frozen from the start, not trained"
    ):
        noise(2, [3200], False, trained, "features")
