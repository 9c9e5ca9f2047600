"""Normalised targets: the numbers themselves, where statistics come from, and that nothing else changes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.ema import StudentEMA
from callbacks.resume_guard import ResumeGuard
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.target_normalization import TargetNormalizer, TargetStatistics, measure
from lightning_modules.teacher import TeacherTargets
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus
from tests.lightning_modules.teachers import FAMILIES, save_model

STANDARDIZE = {"normalize_targets": "standardize", "statistics_seconds": 2.0}


def targets(width: int = 6, frames: int = 40) -> TeacherTargets:
    """One dimension far larger than the others, as Whisper has it."""
    generator = torch.Generator().manual_seed(0)
    scale_D = torch.tensor([300.0, *[1.0] * (width - 1)])
    made = [torch.randn(2, frames, width, generator=generator) * scale_D + 5 for _ in range(3)]
    return TeacherTargets(made[0], {2: made[1], 4: made[2]})


def test_layer_gives_every_frame_mean_0_and_variance_1() -> None:
    given = targets()
    normalised = TargetNormalizer("layer", [2, 4], 6)(given)
    for before_BFD, after_BFD in zip(given.named().values(), normalised.named().values(), strict=True):
        centred_BFD = before_BFD - before_BFD.mean(-1, keepdim=True)
        expected_BFD = centred_BFD / (centred_BFD.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(after_BFD, expected_BFD, atol=1e-5)
        assert not torch.allclose(before_BFD, expected_BFD, atol=1e-1)


def test_standardize_gives_every_dimension_mean_0_and_variance_1_over_what_was_measured() -> None:
    given = targets()
    normalizer = TargetNormalizer("standardize", [2, 4], 6)
    assert normalizer.statistics is None
    halves = [
        TeacherTargets(given.output_BFD[i : i + 1], {k: v[i : i + 1] for k, v in given.hidden.items()}) for i in (0, 1)
    ]
    normalizer.use(measure(halves, [2, 4]))
    for target_BFD in normalizer(given).named().values():
        flat_ND = target_BFD.flatten(0, 1)
        assert torch.allclose(flat_ND.mean(0), torch.zeros(6), atol=1e-4)
        assert torch.allclose(flat_ND.std(0, correction=0), torch.ones(6), atol=1e-2)
    assert not torch.allclose(targets().output_BFD.flatten(0, 1).std(0, correction=0), torch.ones(6), atol=0.1)


def test_a_dimension_that_hardly_changes_is_not_blown_up() -> None:
    given = targets()
    given.output_BFD[..., 1] = 5 + 1e-5 * given.output_BFD[..., 1]  # what rounding of the large one would make
    normalizer = TargetNormalizer("standardize", [2, 4], 6)
    normalizer.use(measure([given], [2, 4]))
    normalised_BFD = normalizer(given).output_BFD
    assert normalised_BFD[..., 1].std() < 0.1
    assert normalised_BFD[..., 2].std() > 0.9


def test_a_dimension_that_never_changes_becomes_0_and_no_frame_is_refused() -> None:
    constant = TeacherTargets(torch.full((1, 5, 3), 7.0), {})
    normalizer = TargetNormalizer("standardize", [], 3)
    normalizer.use(measure([constant], []))
    assert torch.allclose(normalizer(constant).output_BFD, torch.zeros(1, 5, 3), atol=1e-2)
    with pytest.raises(ValueError, match="hold no frame"):
        measure([], [])


def test_none_hands_out_the_same_tensors_and_has_no_state() -> None:
    given = targets()
    assert TargetNormalizer("none", [2, 4], 6)(given) is given
    for kind in ("none", "layer"):
        assert TargetNormalizer(kind, [2, 4], 6).state_dict() == {}


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"normalize_targets='batch': choose none, layer, standardize"):
        ObjectiveConfig(normalize_targets="batch")
    with pytest.raises(ValueError, match=r"statistics_seconds=0 must be positive"):
        ObjectiveConfig(statistics_seconds=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normalised")
    save_model(folder / "teacher", FAMILIES["hubert"]())  # whose layers do not end in an untouched layer norm
    save_corpus(folder / "corpus", {"train": 12, "dev": 3})
    return folder


def train(home: Path, folder: Path, objective: dict[str, Any], *callbacks: Any, **settings: Any) -> DistillationModule:
    """A run that grows 1, 2, 3, 4."""
    optimizer = {"name": "sgd", "lr": 0.02}  # Adam's first steps are signs of gradients, rounding errors included
    module = make_module(home / "teacher", objective=objective, optimizer=optimizer, dropout=0.0)
    resume = settings.pop("resume", None)
    trainer = make_trainer(folder, make_stacking(), ResumeGuard(), *callbacks, **settings)
    trainer.fit(module, datamodule=make_data(home / "corpus", home / "manifests"), ckpt_path=resume)
    if resume is None:
        trainer.save_checkpoint(folder / "end.ckpt")
    return module


def parameters(module: DistillationModule) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def farthest(one: DistillationModule, other: DistillationModule) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(parameters(one), parameters(other), strict=True))


def test_statistics_are_those_of_the_training_data_and_travel_with_the_checkpoint(home: Path, tmp_path: Path) -> None:
    module = train(home, tmp_path / "whole", STANDARDIZE, max_epochs=4)
    data = make_data(home / "corpus", home / "manifests")
    data.prepare_data()
    data.setup()
    expected = measure((module.teacher(b.waveforms) for b in data.statistics_batches(2.0)), module.objective.layers)
    assert module.objective.normalizer.statistics is not None
    assert module.objective.normalizer.statistics.close_to(expected)
    other = measure((module.teacher(b.waveforms) for b in data.statistics_batches(0.1)), module.objective.layers)
    assert not module.objective.normalizer.statistics.close_to(other)  # control: another part of the corpus
    saved = torch.load(tmp_path / "whole" / "end.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["objective.normalizer.mean_SD"], expected.mean_SD)


def test_a_resumed_run_takes_its_statistics_from_the_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SaveAfter(StudentEMA):
        """Also keeps an average of the weights, which must leave the statistics alone."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = train(home, tmp_path / "whole", STANDARDIZE, SaveAfter(0.5), max_epochs=4)
    monkeypatch.setattr(DistillationModule, "measure_targets", None)  # not to be called again
    resumed = train(
        home, tmp_path / "again", STANDARDIZE, SaveAfter(0.5), max_epochs=4, resume=tmp_path / "middle.ckpt"
    )
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    assert torch.equal(whole.objective.normalizer.mean_SD, resumed.objective.normalizer.mean_SD)
    assert bool(resumed.objective.normalizer.measured)
    # Control: with other statistics in the checkpoint the run is another one.
    checkpoint = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    checkpoint["current_model_state"]["objective.normalizer.mean_SD"] += 0.01
    checkpoint["state_dict"]["objective.normalizer.mean_SD"] += 0.01
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    other = train(home, tmp_path / "other", STANDARDIZE, SaveAfter(0.5), max_epochs=4, resume=tmp_path / "changed.ckpt")
    assert farthest(whole, other) > 1e-4


@pytest.mark.ci
@pytest.mark.parametrize("objective", [{"normalize_targets": "layer"}, STANDARDIZE], ids=["layer", "standardize"])
def test_accumulation_leaves_normalised_runs_as_they_are(objective: dict[str, Any], home: Path, tmp_path: Path) -> None:
    whole = train(home, tmp_path / "whole", objective)
    parts = train(home, tmp_path / "parts", objective, accumulate_grad_batches=2)
    plain = train(home, tmp_path / "plain", {})
    assert farthest(whole, parts) < 1e-3 * farthest(whole, plain)


def test_a_data_module_without_such_a_part_is_told_so(home: Path) -> None:
    module = make_module(home / "teacher", objective=STANDARDIZE)
    with pytest.raises(ValueError, match="needs a data module with `statistics_batches`"):
        module.measure_targets(None, torch.device("cpu"))


def test_statistics_that_differ_are_told_apart() -> None:
    one = TargetStatistics(torch.zeros(1, 3), torch.ones(1, 3))
    assert one.close_to(TargetStatistics(torch.zeros(1, 3) + 1e-6, torch.ones(1, 3)))
    assert not one.close_to(TargetStatistics(torch.zeros(1, 3) + 1e-2, torch.ones(1, 3)))
