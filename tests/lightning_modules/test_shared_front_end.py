"""``student.front_end=shared`` against ``frozen``: the same numbers, and the convolutions run once."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.ema import StudentEMA
from callbacks.resume_guard import ResumeGuard
from lightning_modules.distillation import DistillationModule
from lightning_modules.export import export_student
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import make_data, make_module, make_stacking, make_trainer, save_corpus, save_teacher
from tests.lightning_modules.test_distillation import Filterbank, make_batch

LENGTHS = {"unpadded": [8000] * 3, "padded": [8000, 5000, 6000]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 8, "dev": 3})
    return folder


def make(home: Path, front_end: str, **settings: Any) -> DistillationModule:
    return make_module(home / "teacher", dropout=0.0, front_end=front_end, teacher_settings=settings)


def step(module: DistillationModule, lengths: list[int]) -> list[torch.Tensor]:
    """Loss and gradients."""
    loss = module.losses(make_batch(lengths)).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def runs_of(module: DistillationModule) -> list[str]:
    """A growing list of whose convolutions ran."""
    runs: list[str] = []
    for name, extractor in (
        ("teacher", module.teacher.model.feature_extractor),
        ("student", module.student.hubert.feature_extractor),
    ):
        extractor.register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("padding", LENGTHS)
def test_it_equals_a_frozen_front_end_bit_for_bit(padding: str, normalize: bool, home: Path) -> None:
    shared, frozen, trained = (
        make(home, name, normalize=normalize).train() for name in ("shared", "frozen", "trained")
    )
    runs = runs_of(shared)
    results = [step(module, LENGTHS[padding]) for module in (shared, frozen)]
    assert runs == ["teacher"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(step(trained, LENGTHS[padding])) > len(results[0])  # control: there the convolutions have gradients


def test_the_teachers_features_are_what_the_student_sees(home: Path) -> None:
    module, batch = make(home, "shared"), make_batch(LENGTHS["padded"])
    targets, runs = module.targets(batch), runs_of(module)
    assert targets.features_BFC is not None
    expected = module.losses(batch).total
    assert torch.equal(module.losses(batch, targets=targets).total, expected)
    other = targets._replace(features_BFC=targets.features_BFC.flip(1))
    assert not torch.allclose(module.losses(batch, targets=other).total, expected)
    assert runs == ["teacher"]  # for `expected` alone


def test_targets_without_features_leave_it_to_the_students_own_convolutions(home: Path) -> None:
    module, batch = make(home, "shared"), make_batch(LENGTHS["padded"])
    targets, runs = module.targets(batch)._replace(features_BFC=None), runs_of(module)
    assert torch.equal(module.losses(batch, targets=targets).total, module.losses(batch).total)
    assert runs == ["student", "teacher"]


def student(front_end: Any) -> StudentConfig:
    return StudentConfig(16, 24, 2, 3, dropout=0.0, front_end=front_end)


def test_other_students_leave_the_features_alone(home: Path) -> None:
    """Students of both kinds may share one teacher."""
    teacher = HuggingFaceTeacher(str(home / "teacher"))
    batch, losses = make_batch(LENGTHS["unpadded"]), []
    for names in (("frozen",), ("shared", "frozen")):
        modules = [DistillationModule(teacher, student(name), ObjectiveConfig(intermediate="none")) for name in names]
        targets = modules[-1].targets(batch)
        assert (targets.features_BFC is None) == (names == ("frozen",))
        runs = runs_of(modules[-1])
        losses.append(modules[-1].losses(batch, targets=targets).total)
        assert runs == ["student"]
    assert torch.equal(losses[0], losses[1])


def test_a_teacher_that_is_taken_over_hands_them_out_too(home: Path) -> None:
    module, teacher = make(home, "shared"), HuggingFaceTeacher(str(home / "teacher"))
    teacher.select_layers(module.objective.layers, module.objective.output_layer)
    assert teacher(make_batch([8000]).waveforms).features_BFC is None
    module.share_teacher(teacher)
    assert module.targets(make_batch([8000])).features_BFC is not None


def test_a_teacher_in_bf16_hands_out_features_near_those_of_float32(home: Path) -> None:
    shared, frozen = make(home, "shared", precision="bf16"), make(home, "frozen", precision="bf16")
    losses = []
    for module in (shared, frozen):
        module.teacher.prepare(torch.device("cpu"))
        assert module.teacher.precision_used == "bf16"
        losses.append(module.losses(make_batch(LENGTHS["unpadded"])).total)
    assert torch.allclose(losses[0], losses[1], rtol=5e-3)
    assert not torch.equal(losses[0], losses[1])
    features = shared.targets(make_batch(LENGTHS["unpadded"])).features_BFC
    assert features is not None
    assert features.dtype == torch.float32


class Watch(L.Callback):
    """The loss of every step; a checkpoint after the second epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "second.ckpt")


def fit(home: Path, folder: Path, front_end: str, ckpt_path: Path | None = None) -> L.Trainer:
    """A run of 4 epochs with 2 steps each that grows from 1 to 4 layers, with an average, padding and validation."""
    trainer = make_trainer(folder, ResumeGuard(), make_stacking(), StudentEMA(0.9), Watch())
    data = make_data(home / "corpus", home / "cache", length="pad")
    trainer.fit(make(home, front_end), datamodule=data, ckpt_path=ckpt_path)
    return trainer


def losses_of(trainer: L.Trainer) -> list[float]:
    (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, Watch)]
    return watch.losses


@pytest.mark.ci
def test_a_run_that_grows_and_resumes_is_that_of_a_frozen_front_end(home: Path, tmp_path: Path) -> None:
    shared, frozen = fit(home, tmp_path / "shared", "shared"), fit(home, tmp_path / "frozen", "frozen")
    assert losses_of(shared) == losses_of(frozen)
    assert len(set(losses_of(shared))) == 8
    assert shared.callback_metrics["val/loss"] == frozen.callback_metrics["val/loss"]
    second = tmp_path / "shared" / "second.ckpt"
    for front_end in ("shared", "frozen"):  # to the guard they are the same run
        resumed = fit(home, tmp_path / f"resumed_{front_end}", front_end, ckpt_path=second)
        assert losses_of(resumed) == losses_of(shared)[4:]
        assert resumed.callback_metrics["val/loss"] == shared.callback_metrics["val/loss"]
    exported = export_student(second, tmp_path / "exported").model
    theirs = HuggingFaceTeacher(str(home / "teacher")).model.feature_extractor.state_dict()
    for name, value in exported.feature_extractor.state_dict().items():
        assert torch.equal(value, theirs[name])


def test_weights_of_another_front_end_are_refused(home: Path, tmp_path: Path) -> None:
    fit(home, tmp_path / "trained", "trained")
    second, data = tmp_path / "trained" / "second.ckpt", make_data(home / "corpus", home / "cache")
    with pytest.raises(ValueError, match=r"front_end was trained, is frozen"):
        fit(home, tmp_path / "other", "shared", ckpt_path=second)
    modules = {front_end: make(home, front_end) for front_end in ("shared", "frozen")}
    for module in modules.values():
        module.load_state_dict(torch.load(second, weights_only=True)["state_dict"])
    for start in ("fit", "validate"):
        with pytest.raises(ValueError, match=r"conv_layers.0.conv.weight of the student's front end is not the teach"):
            getattr(make_trainer(tmp_path), start)(modules["shared"], datamodule=data)
    make_trainer(tmp_path).validate(modules["frozen"], datamodule=data)  # control


def test_what_cannot_be_shared_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"front_end=shared, but model.student.front_end_init=random"):
        make_module(home / "teacher", front_end="shared", front_end_init="random")
    with pytest.raises(ValueError, match="this teacher has no convolutional front end"):
        DistillationModule(Filterbank(), student("shared"))
    copied = Filterbank()
    copied.front_end = HuggingFaceTeacher(str(home / "teacher")).front_end
    with pytest.raises(ValueError, match="Filterbank does not hand out the features of its convolutions"):
        DistillationModule(copied, student("shared"))
