"""Runs from cached features of a frozen front end: no audio, no convolution, and the numbers of the run with both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import loading
from experiments.cli import run
from lightning_modules.student import Student
from lightning_modules.teacher import HuggingFaceTeacher
from tests.experiments.training.test_cache_targets import (
    SaveAt,
    data_of,
    distance,
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


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def forbidden(name: str) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was used")

    return call


def test_a_run_from_exact_features_is_the_run_that_computes_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through three growths and accumulation, validation and measured growths included."""
    features, together = Student.features, train_from(home, "targets", tmp_path / "together")

    def alone(self: Student, waveforms_BT: Tensor) -> Tensor:
        """As the caches were made: the last bits of a convolution depend on what else is in its batch."""
        return torch.cat([features(self, waveform_T[None]) for waveform_T in waveforms_BT])

    with monkeypatch.context() as patched:
        patched.setattr(Student, "features", alone)
        computed, validation = train_from(home, "targets", tmp_path / "computed")
    assert distance(together[0], computed) < 1e-6
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


@pytest.mark.parametrize(("features", "bound"), [("true", 0.02), ("int8", 0.06)])
def test_rounded_features_stay_near(features: str, bound: float, home: Path, tmp_path: Path) -> None:
    exact, validation = train_from(home, "float32", tmp_path / "exact")
    rounded, near = train_from(home, features, tmp_path / "rounded")
    other_order, _ = train_from(home, "float32", tmp_path / "other_order", seed=1)
    assert not equal(exact, rounded)
    assert distance(exact, rounded) < bound * distance(exact, other_order)
    assert abs(validation - near) < 2e-3 * validation


def test_a_resumed_run_continues_exactly(home: Path, tmp_path: Path) -> None:
    whole, _ = train_from(home, "int8", tmp_path / "whole", SaveAt(5, tmp_path / "5.ckpt"))
    resumed, _ = train_from(home, "int8", tmp_path / "resumed", resume=tmp_path / "5.ckpt")
    assert equal(whole, resumed)
    reseeded, _ = train_from(home, "int8", tmp_path / "reseeded", seed=1)
    assert not equal(whole, reseeded)
    for cache, message in (("true", "was int8, is bf16"), ("targets", "was int8, is not set")):
        with pytest.raises(ValueError, match=rf"data\.features {message}"):
            train_from(home, cache, tmp_path / "other", resume=tmp_path / "5.ckpt")


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
    start = make_module(home / "teacher", front_end="frozen")
    with torch.no_grad():
        next(start.student.hubert.feature_extractor.parameters()).mul_(1.5)
    trainer = make_trainer(tmp_path, max_epochs=0)
    trainer.strategy.connect(start)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    module = make_module(home / "teacher", front_end="frozen")
    module.init_from = str(tmp_path / "start.ckpt")
    with pytest.raises(ValueError, match="features of another front end"):
        make_trainer(tmp_path).fit(module, datamodule=data_of(home, targets=str(home / "float32")))


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
