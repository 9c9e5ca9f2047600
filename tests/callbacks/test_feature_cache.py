"""A front end that is trained until the first growth, and the cache of its features that is written then."""

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks import feature_cache
from callbacks.checkpointing import RunCheckpoint
from callbacks.ema import StudentEMA
from callbacks.feature_cache import FeatureCache
from callbacks.requeue import EXIT_SIGTERM
from datamodules import loading
from datamodules.loading import AudioBatch
from datamodules.target_writing import Computed
from experiments.training.cache_targets import TargetsTrainer
from lightning_modules.distillation import DistillationModule
from lightning_modules.student import Student
from tests.cached_runs import SaveAt, data_of, distance, equal, features_alone, train
from tests.helpers import (
    POLICY_STAGES,
    make_module,
    make_stacking,
    make_trainer,
    save_corpus,
    save_teacher,
    some_policies,
)
from tests.slurm_task import pretend_task

CHECKPOINTS = {"enable_checkpointing": True}
ALONE = 0.01  # seconds per forward pass, so that every segment is computed alone
UNTIL = "trained_until_growth"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a corpus and a cache of targets."""
    folder = tmp_path_factory.mktemp("home")
    save_teacher(folder / "teacher")
    save_corpus(folder / "corpus", {"train": 12, "dev": 3})
    writer = TargetsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    writer.cache_targets(make_module(folder / "teacher"), data_of(folder), str(folder / "targets"))
    return folder


def train_until_growth(
    home: Path, folder: Path, *callbacks: Any, targets: bool = True, seed: int = 0, **settings: Any
) -> tuple[list[Tensor], float]:
    """12 steps of two accumulated batches, through the depths 1, 2, 3 and 4."""
    data = data_of(home, targets=str(home / "targets") if targets else None, seed=seed, num_workers=1)
    return train(make_module(home / "teacher", front_end=UNTIL), data, folder, *callbacks, **settings)


def convolutions(student: Student) -> list[Tensor]:
    return [weight.detach().clone() for weight in student.hubert.feature_extractor.parameters()]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features_alone(monkeypatch)


@pytest.mark.parametrize("policy", some_policies(least_stages=2))
def test_the_first_growth_freezes_the_front_end(policy: str, home: Path, tmp_path: Path) -> None:
    class Watch(FeatureCache):
        """What the student has right after each growth."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[Tensor]] = []
            self.names: list[set[str]] = []

        def store(self, trainer: Any, module: DistillationModule) -> None:
            names = {name for group in trainer.optimizers[0].param_groups for name in group["param_names"]}
            self.seen.append(convolutions(module.student))
            self.names.append({name for name in names if "feature_extractor" in name})

    module, watch = make_module(home / "teacher", num_layers=POLICY_STAGES[policy][-1], front_end=UNTIL), Watch()
    drawn = convolutions(module.student)
    trainer = make_trainer(tmp_path, make_stacking(policy), watch, max_epochs=len(POLICY_STAGES[policy]))
    trainer.fit(module, datamodule=data_of(home, targets=str(home / "targets")))
    assert module.student.frozen_front_end
    start, _, _, grown, *_ = watch.seen  # three times before the first epoch, then after the first growth
    assert equal(drawn, start)
    assert not equal(start, grown)
    assert equal(grown, convolutions(module.student))
    assert watch.names[0]
    assert watch.names[3] == set()
    (optimizer,) = trainer.optimizers
    assert set(optimizer.state) == {weight for group in optimizer.param_groups for weight in group["params"]}


@pytest.mark.ci
@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("targets", [True, False], ids=["cached targets", "teacher"])
def test_a_run_from_exact_features_is_the_run_that_computes_them(targets: bool, home: Path, tmp_path: Path) -> None:
    """Bit for bit, through three growths and accumulation, validation included."""
    computed, validation = train_until_growth(home, tmp_path / "computed", targets=targets)
    read, same = train_until_growth(home, tmp_path / "read", FeatureCache("float32", ALONE), targets=targets)
    assert equal(computed, read)
    assert validation == same
    rounded, near = train_until_growth(home, tmp_path / "rounded", FeatureCache("bf16", ALONE), targets=targets)
    other, _ = train_until_growth(home, tmp_path / "other", targets=targets, seed=1)
    assert not equal(computed, rounded)
    assert distance(computed, rounded) < 0.02 * distance(computed, other)
    assert abs(near - validation) < 2e-3 * validation


def test_no_audio_is_read_after_the_growth(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[tuple[int, bool]] = []
    step = DistillationModule.training_step

    def training_step(self: DistillationModule, batch: AudioBatch, batch_idx: int) -> Any:
        carried.append((self.student.depth, batch.waveforms is None))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    train_until_growth(home, tmp_path, FeatureCache())
    assert set(carried) == {(1, False), (2, True), (3, True), (4, True)}


@pytest.mark.ci
@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_continues_exactly(
    kept: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch before and after the growth, and right before it; features that are gone are made again."""
    savers = [*(SaveAt(step, tmp_path / f"{step}.ckpt") for step in (1, 8)), RunCheckpoint(keep=100)]
    whole, _ = train_until_growth(home, tmp_path / "whole", FeatureCache("int8", ALONE), *savers, **CHECKPOINTS)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "stage_1.ckpt", tmp_path / "3.ckpt")
    for step in (1, 3, 8):
        folder = tmp_path / f"resumed_{step}"
        if kept:
            shutil.copytree(tmp_path / "whole" / "features", folder / "features")
        checkpoint = tmp_path / f"{step}.ckpt"
        resumed, _ = train_until_growth(home, folder, FeatureCache("int8", ALONE), resume=checkpoint)
        assert equal(whole, resumed)
        if kept and step == 8:
            with monkeypatch.context() as patched:
                patched.setattr(loading, "read_audio", None)  # features that are there are not made again
                train_until_growth(home, folder, FeatureCache("int8", ALONE), resume=checkpoint)
    other, _ = train_until_growth(home, tmp_path / "other", FeatureCache("int8", ALONE), seed=1)
    assert not equal(whole, other)
    for cache, message in (([FeatureCache("bf16")], "was int8, is bf16"), ([], "was int8, is not set")):
        with pytest.raises(ValueError, match=rf"feature_cache\.dtype {message}"):
            train_until_growth(home, tmp_path / "another", *cache, resume=tmp_path / "8.ckpt")


@pytest.mark.usefixtures("one_by_one")
def test_a_signal_breaks_the_writing_off_and_the_next_start_continues(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run stops at the growth, before another step, and ends as one that was not stopped."""

    def fit(folder: str, **more: Any) -> list[Tensor]:
        stored = FeatureCache("bf16", ALONE)
        stored.shard_megabytes = 5e-4  # one or two utterances
        return train_until_growth(home, tmp_path / folder, stored, RunCheckpoint(), **CHECKPOINTS, **more)[0]

    whole = fit("whole")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    compute, written = feature_cache.compute_features, list[int]()

    def then_signal(batches: Sequence[np.ndarray], **more: Any) -> Iterator[Computed]:
        for number, computed in enumerate(compute(batches, **more)):
            written.append(number)
            yield computed
            if number == 3:
                signal.raise_signal(signal.SIGTERM)

    made = set[int]()
    for resume in (None, last):  # in an epoch's start, and in a resumed run's
        with monkeypatch.context() as patched:
            patched.setattr(feature_cache, "compute_features", then_signal)
            with pytest.raises(SIGTERMException) as stop:
                fit("run", resume=resume)
        assert stop.value.code == EXIT_SIGTERM
        assert torch.load(last, weights_only=True)["global_step"] == 3
        made.add((tmp_path / "run" / ".unfinished-features" / "00000.targets").stat().st_mtime_ns)
    assert written == [0, 1, 2, 3] * 2
    assert caplog.text.count("a signal stops the run while it writes features: continue with --ckpt_path last") == 2
    assert equal(whole, fit("run", resume=last))
    assert made == {(tmp_path / "run" / "features" / "00000.targets").stat().st_mtime_ns}  # written once


def test_slurms_signal_while_features_are_written_requeues_the_job(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend_task(tmp_path, monkeypatch)

    def then_signal(*arguments: Any, **more: Any) -> Iterator[Computed]:
        signal.raise_signal(signal.SIGUSR1)
        return compute(*arguments, **more)

    compute = feature_cache.compute_features
    monkeypatch.setattr(feature_cache, "compute_features", then_signal)
    with pytest.raises(SIGTERMException) as stop:
        train_until_growth(home, tmp_path / "run", FeatureCache(), RunCheckpoint(), **CHECKPOINTS)
    assert stop.value.code == EXIT_SIGTERM
    assert asked.read_text() == "requeue 123\n"


def test_an_average_of_the_weights_grows_with_it(home: Path, tmp_path: Path) -> None:
    average = StudentEMA(0.5)
    train_until_growth(home, tmp_path, average, FeatureCache())
    assert average.student.frozen_front_end


def test_an_average_has_the_front_end_that_the_growth_froze(home: Path, tmp_path: Path) -> None:
    """Its features are cached, for validation too, and those of a front end that lags behind are others."""

    class Keep(Callback):
        def __init__(self) -> None:
            self.found: list[tuple[list[Tensor], Tensor]] = []

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DistillationModule)
            for student in (pl_module.student, average.student):
                layer = student.hubert.encoder.layers[0].attention.k_proj.weight
                self.found.append((convolutions(student), layer.detach().clone()))

    average, keep = StudentEMA(0.99), Keep()
    train_until_growth(home, tmp_path, keep, average, FeatureCache())
    (own, layer), (averaged, averaged_layer) = keep.found
    assert equal(own, averaged)
    assert not torch.equal(layer, averaged_layer)  # control: the other weights are averaged


def test_a_new_run_from_its_weights_trains_the_front_end_again(home: Path, tmp_path: Path) -> None:
    train_until_growth(home, tmp_path / "first", SaveAt(12, tmp_path / "end.ckpt"))
    module = make_module(home / "teacher", front_end=UNTIL)
    module.init_from = str(tmp_path / "end.ckpt")
    make_trainer(tmp_path, max_epochs=1).fit(module, datamodule=data_of(home, targets=str(home / "targets")))
    assert not module.student.frozen_front_end


def test_what_cannot_be_cached_is_refused(home: Path, tmp_path: Path) -> None:
    def fit(front_end: str = UNTIL, cache: FeatureCache | None = None, **data: Any) -> None:
        module = make_module(home / "teacher", front_end=front_end)
        trainer = make_trainer(tmp_path, make_stacking(), cache or FeatureCache())
        trainer.fit(module, datamodule=data_of(home, **data))

    with pytest.raises(ValueError, match="front_end=trained_until_growth, not frozen"):
        fit("frozen")
    for settings in ({"crop": "random"}, {"length": "pad"}):
        with pytest.raises(ValueError, match=r"need data\.crop=fixed and data\.length=crop"):
            fit(**settings)
    with pytest.raises(ValueError, match=r"on_bad_audio=skip needs cached targets"):
        fit(on_bad_audio="skip")
    for settings in ({"dtype": "fp8"}, {"batch_seconds": 0.0}, {"shard_megabytes": 0}):
        with pytest.raises(ValueError, match="dtype must be bf16, int8 or float32, the others positive"):
            FeatureCache(**settings)  # type: ignore[arg-type]
