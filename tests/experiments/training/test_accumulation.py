"""Accumulation derived from what a device holds; schedules that do not know how many devices there are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from experiments.training.accumulation import accumulation_steps, utterances_that_fit
from experiments.training.fit import DistillationCLI, _utterances_that_fit
from tests.helpers import make_data, make_module, make_stacking, make_trainer
from tests.tiny_run import TINY


@pytest.mark.parametrize(
    ("batch_size", "devices", "limit", "expected"),
    [(64, 1, 16, 4), (64, 2, 16, 2), (64, 4, 16, 1), (64, 8, 16, 1), (64, 1, 64, 1), (64, 3, 10, 3), (7, 2, 1, 4)],
)
def test_no_device_holds_more_than_its_limit(batch_size: int, devices: int, limit: int, expected: int) -> None:
    steps = accumulation_steps(batch_size, devices, limit)
    assert steps == expected
    assert -(-batch_size // (devices * steps)) <= limit
    assert steps == 1 or -(-batch_size // (devices * (steps - 1))) > limit  # the fewest that do


def test_a_larger_gpu_holds_more() -> None:
    held = [utterances_that_fit(memory_gb, 15.625, "bf16-mixed") for memory_gb in (8, 24, 48, 80)]
    assert held == [5, 21, 44, 75]
    assert utterances_that_fit(24, 15.625, "32-true") == 14
    assert utterances_that_fit(1, 15.625, "bf16-mixed") == 1  # too little for any: the user will see it fail


@pytest.mark.parametrize(
    ("device", "changed", "expected"),
    [
        ("cuda", {}, 21),
        ("cpu", {}, None),
        ("cuda", {"accumulate": 2}, None),
        ("cuda", {"limit": 0.5}, None),
        ("cuda", {"batch_size": None}, None),
    ],
)
def test_memory_decides_where_nothing_else_does(
    device: str, changed: dict[str, Any], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=24e9))
    values = {"accumulate": 1, "limit": None, "batch_size": 64} | changed
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(
        strategy=strategy, accumulate_grad_batches=values["accumulate"], precision="bf16-mixed"
    )
    config = SimpleNamespace(
        trainer=SimpleNamespace(limit_train_batches=values["limit"]),
        data=SimpleNamespace(batch_size=values["batch_size"], max_samples=250_000, sample_rate=16_000),
    )
    assert _utterances_that_fit(trainer, config) == expected


def test_the_smallest_of_several_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {0: 48e9, 1: 24e9}
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=memory[device.index])
    )
    devices = [torch.device("cuda", index) for index in memory]
    strategy = SimpleNamespace(root_device=devices[0], parallel_devices=devices)
    trainer: Any = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1, precision="bf16-mixed")
    data = SimpleNamespace(batch_size=64, max_samples=250_000, sample_rate=16_000)
    config = SimpleNamespace(trainer=SimpleNamespace(limit_train_batches=None), data=data)
    assert _utterances_that_fit(trainer, config) == 21
    del strategy.parallel_devices
    assert _utterances_that_fit(trainer, config) == 44


class Sizes(Callback):
    """Utterances of each validation batch that a device holds at once."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append(len(batch.num_samples))


def test_validation_holds_no_more_at_once_than_training(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for accumulate in (1, 2, 100):
        sizes = Sizes()
        trainer = make_trainer(tmp_path, sizes, accumulate_grad_batches=accumulate)
        data = make_data(inputs / "corpus", inputs / "cache", val_batch_size=4, length="pad")
        module = make_module(inputs / "teacher")
        trainer.validate(module, datamodule=data, verbose=False)
        found[accumulate] = float(trainer.callback_metrics["val/loss"]), sizes.seen
    whole, at_once = found[1]
    assert [max(seen) for _, seen in found.values()] == [4, 2, 1]
    for loss, seen in found.values():
        assert sum(seen) == sum(at_once)
        assert loss == pytest.approx(whole, rel=1e-6)


def test_what_contradicts_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"counts utterances, but data.batch_size is not set"):
        accumulation_steps(None, 1, 4)
    with pytest.raises(ValueError, match=r"also given \(2\): leave one of them out"):
        accumulation_steps(64, 1, 4, given=2)
    for limit in (1, 0.5):
        with pytest.raises(ValueError, match=rf"limit_train_batches={limit} counts micro-batches"):
            accumulation_steps(64, 1, 4, limit=limit)
    assert accumulation_steps(64, 1, 4, limit=1.0) == 16


def arguments(inputs: Path, runs: Path, *more: str) -> list[str]:
    places = ["--data.root", str(inputs / "corpus"), "--model.teacher.init_args.model", str(inputs / "teacher")]
    return ["fit", *TINY, *places, "--data.cache_dir", str(inputs / "cache"), "--runs_dir", str(runs), *more]


def test_the_command_line_derives_accumulation(inputs: Path, tmp_path: Path) -> None:
    cli = DistillationCLI(arguments(inputs, tmp_path, "--max_batch_per_device", "3"))
    assert cli.trainer.accumulate_grad_batches == 2
    assert cli.trainer.global_step == 12
    assert cli.datamodule.train_dataloader().batch_sampler.accumulate == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "leave one of them out"),
        (["--data.batch_size", "null", "--data.batch_seconds", "3"], "batch_size is not set"),
        (["--trainer.limit_train_batches", "3"], "set data.batches_per_epoch"),
    ],
)
def test_the_command_line_refuses_contradictions(more: list[str], message: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationCLI(arguments(inputs, tmp_path, "--max_batch_per_device", "3", *more))
    with pytest.raises(SystemExit):
        DistillationCLI(arguments(inputs, tmp_path, "--max_batch_per_device", "0"))


class Rates(Callback):
    """Learning rate after each optimizer step."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_learning_rate_does_not_depend_on_how_a_batch_is_cut(accumulate: int, inputs: Path, tmp_path: Path) -> None:
    """Ranks and accumulation steps cut it alike (``cut`` of ``datamodules.batching``); two: ``ddp/test_ddp_growth``."""
    rates = {}
    for steps in (1, accumulate):
        recorder = Rates()
        trainer = make_trainer(tmp_path / str(steps), recorder, make_stacking(), accumulate_grad_batches=steps)
        trainer.fit(make_module(inputs / "teacher"), datamodule=make_data(inputs / "corpus", inputs / "cache"))
        rates[steps] = recorder.rates
        assert trainer.global_step == 12
    rates[accumulate].pop(0, None)  # before the first step
    assert rates[accumulate] == rates[1]
    assert len(set(rates[1].values())) > 6
