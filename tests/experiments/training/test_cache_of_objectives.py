"""Caches of targets that depend on the objective: masked, feed-forward, layer 0, normalised."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.loading import AudioBatch
from datamodules.target_cache import TargetCache
from experiments.cli import run
from lightning_modules.distillation import DistillationModule
from lightning_modules.teacher import TeacherTargets
from tests.cached_runs import data_of, distance, equal, options, rounded, train
from tests.helpers import make_module, make_trainer, save_corpus, save_teacher


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus and a cache of it, ``bf16``; each row alone, as :func:`rounded` asks."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 3})
    run(["cache-targets", *options(folder), "--output", str(folder / "bf16")])
    return folder


MASKS = {"mask_time_prob": 0.8, "mask_time_length": 2}
MASKED = ["--model.objective.masked", "fixed", *(f"--model.student.{name}={value}" for name, value in MASKS.items())]


def masked_module(home: Path, seed: int = 0, mask_seed: int = 0, **masks: Any) -> DistillationModule:
    objective = {"masked": "fixed", "mask_seed": mask_seed}
    return make_module(home / "teacher", objective=objective, seed=seed, **(MASKS | masks))


@pytest.mark.ci
def test_a_cache_holds_the_targets_of_masked_input(home: Path, tmp_path: Path) -> None:
    """Bit for bit those that a run computes which draws the same masks, whatever its own seed is."""
    cache, two = str(tmp_path / "masked"), {"segments_per_utterance": 2}
    run(["cache-targets", *options(home), *MASKED, "--data.segments_per_utterance", "2", "--output", cache])
    found = {}
    for seed in (0, 1):
        reading = data_of(home, targets=cache, num_workers=1, **two)
        cached, validation = train(masked_module(home, seed), reading, tmp_path / f"{seed}")
        module = masked_module(home, seed)
        module.targets = rounded(module, "bf16")  # type: ignore[method-assign, assignment]
        reference, rounded_validation = train(module, data_of(home, **two), tmp_path / f"{seed}, rounded")
        assert equal(cached, reference)
        assert validation == pytest.approx(rounded_validation, rel=1e-3)  # in other batches
        found[seed] = cached
    assert not equal(found[0], found[1])
    # Control: other masks are another run.
    exact, _ = train(masked_module(home), data_of(home, **two), tmp_path / "exact")
    others, _ = train(masked_module(home, mask_seed=1), data_of(home, **two), tmp_path / "others")
    assert distance(exact, found[0]) < 0.1 * distance(exact, others)
    for module, message in (
        (masked_module(home, mask_seed=1), r"objective\.mask_seed was 0, is 1"),
        (masked_module(home, mask_time_prob=0.5), r"student\.mask_time_prob was 0\.8, is 0\.5"),
        (make_module(home / "teacher"), r"objective\.masked was fixed, is none"),
    ):
        with pytest.raises(ValueError, match=message):
            train(module, data_of(home, targets=cache, **two), tmp_path / "refused")
    with pytest.raises(ValueError, match=r"objective\.masked was none, is fixed"):
        train(masked_module(home), data_of(home, targets=str(home / "bf16")), tmp_path / "refused")
    with pytest.raises(ValueError, match=r"cannot be cached with model\.objective\.masked=drawn"):
        run(["cache-targets", *options(home), *MASKED, "--model.objective.masked", "drawn", "--output", cache])


@pytest.mark.ci
def test_a_cache_of_feed_forward_outputs_and_layer_0(home: Path, tmp_path: Path) -> None:
    blocks = {"targets": "feed_forward"}
    more = ["--model.objective.targets", "feed_forward", "--output", str(tmp_path / "blocks")]
    run(["cache-targets", *options(home), *more])
    layer_0 = ["--model.objective.layers", "[0,2]", "--output", str(tmp_path / "layer_0")]
    run(["cache-targets", *options(home), *layer_0])
    for name, objective in (("blocks", blocks), ("layer_0", {"layers": [0, 2]})):
        reading = data_of(home, targets=str(tmp_path / name))
        cached, _ = train(make_module(home / "teacher", objective=objective), reading, tmp_path / name / "run")
        module = make_module(home / "teacher", objective=objective)
        module.targets = rounded(module, "bf16")  # type: ignore[method-assign, assignment]
        reference, _ = train(module, data_of(home), tmp_path / name / "rounded")
        assert equal(cached, reference)
    for cache, module, message in (
        (
            home / "bf16",
            make_module(home / "teacher", objective=blocks),
            r"teacher\.targets was hidden, is feed_forward",
        ),
        (tmp_path / "blocks", make_module(home / "teacher"), r"teacher\.targets was feed_forward, is hidden"),
        (
            home / "bf16",
            make_module(home / "teacher", objective={"layers": [0, 2]}),
            r"teacher\.layer_0_weights is not in it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(module, data_of(home, targets=str(cache)), tmp_path / "refused")


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["layer", "standardize"])
def test_a_cache_holds_normalised_targets_and_their_statistics(kind: str, home: Path, tmp_path: Path) -> None:
    objective = {"normalize_targets": kind, "statistics_seconds": 2.0}
    more = ["--model.objective.normalize_targets", kind, "--model.objective.statistics_seconds", "2.0"]
    run(["cache-targets", *options(home), *more, "--output", str(tmp_path / "cache")])
    cached, _ = train(
        make_module(home / "teacher", objective=objective),
        data_of(home, targets=str(tmp_path / "cache")),
        tmp_path / "a",
    )
    module = make_module(home / "teacher", objective=objective)

    def normalised(batch: AudioBatch) -> TeacherTargets:
        return module.objective.normalizer(module.teacher(batch.waveforms))

    exact, _ = train(module, data_of(home), tmp_path / "b")
    other_segments = data_of(home, segment_seed=1)
    elsewhere, _ = train(make_module(home / "teacher", objective=objective), other_segments, tmp_path / "c")
    assert distance(exact, cached) < 0.1 * distance(exact, elsewhere)
    # Rounded after it was normalised: one step of bf16 of the normalised value, not of the raw one.
    data = data_of(home, targets=str(tmp_path / "cache"))
    data.prepare_data()
    make_trainer(tmp_path / "d", max_epochs=1, limit_val_batches=0).fit(
        make_module(home / "teacher", objective=objective), datamodule=data
    )
    batch = data.train_dataloader().dataset[data.segments().resolve(np.arange(1), 0)]
    assert batch.cached is not None
    assert batch.waveforms is not None
    expected_BFD = normalised(batch).output_BFD
    assert torch.allclose(batch.cached.targets.decoded()[0].float(), expected_BFD, rtol=1e-2, atol=1e-3)
    for other in ({}, {"normalize_targets": "standardize", "statistics_seconds": 1.0}):
        with pytest.raises(ValueError, match=r"objective\.\w+ was \S+, is|objective\.statistics_seconds is not in it"):
            train(
                make_module(home / "teacher", objective=other), data_of(home, targets=str(tmp_path / "cache")), tmp_path
            )
    with pytest.raises(ValueError, match=rf"objective\.normalize_targets was none, is {kind}"):
        train(make_module(home / "teacher", objective=objective), data_of(home, targets=str(home / "bf16")), tmp_path)


def test_a_shared_teachers_cache_has_statistics_of_more_layers(home: Path, tmp_path: Path) -> None:
    """Students that are trained together share a teacher that outputs the layers of all of them."""
    objective = {"normalize_targets": "standardize", "layers": [1, 2, 3]}
    more = ["--model.objective.normalize_targets", "standardize", "--model.objective.layers", "[1,2,3]"]
    run(["cache-targets", *options(home), *more, "--output", str(tmp_path / "cache")])
    statistics = TargetCache(str(tmp_path / "cache")).statistics
    assert statistics is not None
    for layers in ([1, 2, 3], [2], []):
        module = make_module(home / "teacher", objective=objective | {"layers": layers or None, "intermediate": "none"})
        if layers:
            module = make_module(home / "teacher", objective=objective | {"layers": layers})
        module.teacher.select_layers([1, 2, 3], None)
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(module, datamodule=data_of(home, targets=str(tmp_path / "cache")))
        found = module.objective.normalizer.statistics
        assert found is not None
        assert torch.equal(found.mean_SD, statistics[0][[0, *layers]])
