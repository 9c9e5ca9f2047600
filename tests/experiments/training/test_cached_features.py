"""Runs from cached features of a frozen front end: no audio, no convolution, and the numbers of the run with both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import loading
from experiments.cli import run
from experiments.training.cache_targets import TargetsTrainer
from lightning_modules.distillation import DistillationModule
from lightning_modules.student import Student
from lightning_modules.teacher import HuggingFaceTeacher
from tests.cached_runs import (
    SaveAt,
    data_of,
    distance,
    equal,
    features_alone,
    fit_options,
    options,
    train,
)
from tests.helpers import make_module, make_stacking, make_trainer, save_corpus, save_teacher

FROZEN = ["--model.student.front_end", "frozen"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus, a cache of targets (``targets``) and three with features too, named by their type."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 3})
    run(["cache-targets", *options(folder), *FROZEN, "--output", str(folder / "targets")])
    for features in ("float32", "true", "int8"):
        arguments = [*FROZEN, "--output", str(folder / features), "--features", features]
        run(["cache-targets", *options(folder), *arguments])
    return folder


def train_from(
    home: Path, cache: str, folder: Path, *callbacks: Any, seed: int = 0, front_end: str = "frozen", **settings: Any
) -> tuple[list[Tensor], float]:
    data = data_of(home, targets=str(home / cache), num_workers=1, seed=seed)
    return train(make_module(home / "teacher", front_end=front_end), data, folder, *callbacks, **settings)


def forbidden(name: str) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was used")

    return call


@pytest.mark.ci
def test_a_run_from_exact_features_is_the_run_that_computes_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through three growths and accumulation, validation and measured growths included."""
    together = train_from(home, "targets", tmp_path / "together")
    with monkeypatch.context() as patched:
        features_alone(patched)
        computed, validation = train_from(home, "targets", tmp_path / "computed")
    assert distance(together[0], computed) < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(loading, "read_audio", forbidden("audio"))
        patched.setattr(Student, "features", forbidden("the front end"))
        patched.setattr(HuggingFaceTeacher, "forward", forbidden("the teacher"))
        for front_end in ("frozen", "shared"):
            read, same = train_from(home, "float32", tmp_path / front_end, front_end=front_end)
            assert equal(computed, read)
            assert validation == same
        with pytest.raises(AssertionError, match="was used"):  # control: what is forbidden is used without them
            train_from(home, "targets", tmp_path / "control")


@pytest.mark.ci
@pytest.mark.parametrize(("features", "bound"), [("true", 0.02), ("int8", 0.06)])
def test_rounded_features_stay_near(features: str, bound: float, home: Path, tmp_path: Path) -> None:
    exact, validation = train_from(home, "float32", tmp_path / "exact")
    rounded, near = train_from(home, features, tmp_path / "rounded")
    other_order, _ = train_from(home, "float32", tmp_path / "other_order", seed=1)
    assert not equal(exact, rounded)
    assert distance(exact, rounded) < bound * distance(exact, other_order)
    assert abs(validation - near) < 2e-3 * validation


@pytest.mark.ci
def test_a_resumed_run_continues_exactly(home: Path, tmp_path: Path) -> None:
    whole, _ = train_from(home, "int8", tmp_path / "whole", SaveAt(5, tmp_path / "5.ckpt"))
    resumed, _ = train_from(home, "int8", tmp_path / "resumed", resume=tmp_path / "5.ckpt")
    assert equal(whole, resumed)
    reseeded, _ = train_from(home, "int8", tmp_path / "reseeded", seed=1)
    assert not equal(whole, reseeded)
    for cache, message in (("true", "was int8, is bf16"), ("targets", "was int8, is not set")):
        with pytest.raises(ValueError, match=rf"data\.features {message}"):
            train_from(home, cache, tmp_path / "other", resume=tmp_path / "5.ckpt")


@pytest.mark.ci
def test_a_trained_front_end_reads_the_targets_alone(home: Path, tmp_path: Path) -> None:
    with_features, _ = train_from(home, "float32", tmp_path / "a", front_end="trained")
    without, _ = train_from(home, "targets", tmp_path / "b", front_end="trained")
    assert equal(with_features, without)
    frozen, _ = train_from(home, "float32", tmp_path / "c")
    assert not equal(with_features, frozen)


def test_features_of_another_front_end_are_refused(home: Path, tmp_path: Path) -> None:
    data = data_of(home, targets=str(home / "float32"))
    student = make_module(home / "teacher", front_end="frozen", front_end_init="random")
    with pytest.raises(ValueError, match=r"data\.targets has the features of another front end \(hash \w+\) than this"):
        make_trainer(tmp_path).fit(student, datamodule=data)
    start = start_of(home, tmp_path)
    with pytest.raises(ValueError, match="features of another front end"):
        make_trainer(tmp_path).fit(start, datamodule=data_of(home, targets=str(home / "float32")))


def start_of(home: Path, folder: Path) -> DistillationModule:
    """A module that starts from a checkpoint of three layers, whose front end is not the teacher's."""
    other = make_module(home / "teacher", num_layers=3, front_end="frozen")
    with torch.no_grad():
        next(other.student.hubert.feature_extractor.parameters()).mul_(1.5)
    trainer = make_trainer(folder)
    trainer.strategy.connect(other)
    trainer.save_checkpoint(folder / "start.ckpt")
    module = make_module(home / "teacher", num_layers=3, front_end="frozen")
    module.init_from = str(folder / "start.ckpt")
    return module


def test_a_cache_has_the_front_end_that_a_run_starts_from(home: Path, tmp_path: Path) -> None:
    writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    deeper = make_module(home / "teacher", num_layers=4, front_end="frozen")
    deeper.init_from = start_of(home, tmp_path).init_from  # the depth of the student does not matter here
    writer.cache_targets(deeper, data_of(home), str(tmp_path / "cache"), features=True)
    data = data_of(home, targets=str(tmp_path / "cache"))
    make_trainer(tmp_path, max_epochs=1).fit(start_of(home, tmp_path), datamodule=data)
    narrow = make_module(home / "teacher", front_end="frozen", front_end_init="random", conv_channels=4)
    narrow.init_from = deeper.init_from
    with pytest.raises(ValueError, match=r"start\.ckpt has a front end of other sizes: "):
        writer.cache_targets(narrow, data_of(home), str(tmp_path / "other"), features=True)


def test_random_convolutions_can_be_cached_too(home: Path, tmp_path: Path) -> None:
    """Their weights depend on the run's seed, so another seed is another front end."""
    random = [*FROZEN, "--model.student.front_end_init", "random", "--model.student.conv_channels", "8"]
    arguments = ["cache-targets", *options(home), *random, "--output", str(tmp_path / "cache"), "--features", "true"]
    run([*arguments, "--seed_everything", "3"])
    fit = ["fit", *fit_options(home), *random, "--data.targets", str(tmp_path / "cache")]
    fit += ["--trainer.max_epochs", "1"]
    run([*fit, "--runs_dir", str(tmp_path / "runs"), "--seed_everything", "3"])
    with pytest.raises(ValueError, match="another front end"):
        run([*fit, "--runs_dir", str(tmp_path / "other"), "--seed_everything", "4"])


def test_features_need_a_frozen_front_end(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.student\.front_end=trained: set it to frozen or shared"):
        run(["cache-targets", *options(home), "--output", str(tmp_path / "cache"), "--features", "true"])


def test_validation_of_other_data_asks_the_teacher(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(home, targets=str(home / "float32"), val_splits=["train"])
    trainer = make_trainer(tmp_path, make_stacking())
    trainer.fit(make_module(home / "teacher", front_end="frozen"), datamodule=data)
    assert "the teacher runs in validation, whose cached targets are others: data.rows was 3, is 12" in caplog.text
    assert trainer.callback_metrics["val/loss"] > 0
