"""NonFiniteGuard: a bad step changes nothing, is counted, and too many of them stop the run."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.checkpointing import RunCheckpoint
from callbacks.guards import DivergedError, NonFiniteGuard
from callbacks.summary import RunSummary
from experiments.records.csv_logger import AppendingCSVLogger
from tests.callbacks.faults import PoisonLoss
from tests.helpers import make_data, make_module, make_trainer


class Snapshots(Callback):
    """Everything that an optimizer step may change, after each of them, and the learning rate."""

    def __init__(self) -> None:
        self.tensors: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        (optimizer,) = trainer.optimizers
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = [value for p in parameters for value in optimizer.state[p].values() if torch.is_tensor(value)]
        self.tensors.append([tensor.detach().clone() for tensor in (*parameters, *state)])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def changed(self, step: int) -> bool:
        pairs = zip(self.tensors[step - 1], self.tensors[step], strict=True)
        return not all(torch.equal(before, after) for before, after in pairs)


def fit(
    folder: Path,
    teacher: Path,
    corpus: Path,
    *callbacks: Callback,
    optimizer: dict[str, object] | None = None,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, Snapshots]:
    snapshots = Snapshots()
    trainer_ = make_trainer(folder, *callbacks, snapshots, **({"max_epochs": 2} | trainer))
    module = make_module(teacher, optimizer=optimizer)
    trainer_.fit(module, datamodule=make_data(corpus, folder / "cache"), ckpt_path=ckpt_path)
    return trainer_, snapshots


OPTIMIZERS: list[dict[str, object]] = [
    {"name": "sgd"},
    {"name": "adamw", "implementation": "auto"},
    {"name": "adamw", "implementation": "foreach"},
    {"name": "adamw", "implementation": "fused"},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_a_bad_step_changes_nothing(
    optimizer: dict[str, object], kind: Any, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    guard = NonFiniteGuard()
    settings = optimizer | {"weight_decay": 0.1}
    poison = [PoisonLoss({2}, kind), guard]
    trainer, run = fit(tmp_path, teacher, corpus, *poison, optimizer=settings, gradient_clip_val=1.0)
    assert [step for step in range(1, 6) if not run.changed(step)] == [2]
    assert (guard.skipped_steps, guard.skipped_in_a_row) == (1, 0)
    assert trainer.global_step == 6
    assert all(tensor.isfinite().all() for tensor in run.tensors[-1])
    assert len(set(run.rates)) == 6  # the learning rate goes on over the skipped step

    _, control = fit(tmp_path, teacher, corpus, PoisonLoss({2}, kind), optimizer=settings, gradient_clip_val=1.0)
    assert control.changed(2)
    assert kind == "infinite" or control.tensors[2][0].isnan().any()


def test_one_bad_micro_batch_costs_its_accumulation_window(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    guard = NonFiniteGuard()
    _, run = fit(tmp_path, teacher, corpus, PoisonLoss({2}), guard, accumulate_grad_batches=2)
    assert [step for step in range(1, 6) if not run.changed(step)] == [1]
    assert guard.skipped_steps == 1


def test_a_good_run_is_the_same_with_the_guard_bit_for_bit(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    _, plain = fit(tmp_path, teacher, corpus, precision="bf16-mixed")
    _, guarded = fit(tmp_path, teacher, corpus, NonFiniteGuard(), precision="bf16-mixed")
    assert all(map(torch.equal, plain.tensors[-1], guarded.tensors[-1]))
    _, control = fit(tmp_path, teacher, corpus, NonFiniteGuard(), PoisonLoss({2}), precision="bf16-mixed")
    assert not all(map(torch.equal, plain.tensors[-1], control.tensors[-1]))


def test_a_gradient_scaler_skips_by_itself(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    def run(*callbacks: Callback) -> tuple[Snapshots, float]:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        _, snapshots = fit(tmp_path, teacher, corpus, *callbacks, plugins=[plugin], gradient_clip_val=1.0)
        assert plugin.scaler is not None
        return snapshots, plugin.scaler.get_scale()

    guard = NonFiniteGuard()
    guarded, scale = run(PoisonLoss({2}), guard)
    plain, plain_scale = run(PoisonLoss({2}))
    assert (scale, plain_scale, guard.skipped_steps) == (512.0, 512.0, 1)
    assert not guarded.changed(2)
    assert all(map(torch.equal, plain.tensors[-1], guarded.tensors[-1]))
    with pytest.raises(RuntimeError, match="2 optimizer steps in a row"):
        run(PoisonLoss({1, 2}), NonFiniteGuard(max_skipped_steps=2))


def test_too_many_in_a_row_stop_the_run_also_over_a_resume(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    logger = AppendingCSVLogger(tmp_path)
    callbacks = (RunCheckpoint(every_n_steps=1), PoisonLoss({0, 2, 3, 4, 5}))
    with pytest.raises(RuntimeError, match=r"not finite in 3 optimizer steps in a row, up to step 5") as error:
        fit(tmp_path, teacher, corpus, *callbacks, NonFiniteGuard(3), logger=logger, enable_checkpointing=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert str(last) in str(error.value)
    saved = torch.load(last, weights_only=True)
    assert saved["callbacks"]["NonFiniteGuard"] == {"skipped_steps": 3, "skipped_in_a_row": 2}
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if torch.is_tensor(value))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    counts = [(row["step"], row["train/skipped_steps"]) for row in rows if row["train/skipped_steps"]]
    assert counts == [("1", "1"), ("3", "2"), ("4", "3"), ("5", "4")]

    with pytest.raises(RuntimeError, match="in 3 optimizer steps in a row, up to step 5"):
        fit(tmp_path, teacher, corpus, PoisonLoss({0}), NonFiniteGuard(3), ckpt_path=str(last))


def test_without_a_checkpoint_the_error_says_so(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no checkpoint yet"):
        fit(tmp_path, teacher, corpus, PoisonLoss({0}), NonFiniteGuard(1))


def test_a_run_of_skipped_steps_alone_does_not_end_as_if_it_had_worked(
    tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    def train(folder: Path, bad: set[int], step: int | None = None) -> Path:
        callbacks = (RunSummary(), RunCheckpoint(every_n_steps=1, keep=100), PoisonLoss(bad), NonFiniteGuard())
        start = None if step is None else str(folder / "checkpoints" / f"step={step:09d}.ckpt")
        fit(folder, teacher, corpus, *callbacks, enable_checkpointing=True, ckpt_path=start)
        return folder / "summary.json"

    # From the start; from its middle, also by a resume with nothing left to train.
    for step in (None, 5, 6):
        with pytest.raises(DivergedError, match="not finite in any of 6 optimizer steps, so that nothing was learned"):
            train(tmp_path, set(range(6)), step)
        assert not (tmp_path / "summary.json").exists()
    assert train(tmp_path, set(), step=5).is_file()  # controls: one good step, at the end or at the beginning
    assert train(tmp_path / "first", set(range(1, 6))).is_file()
    assert train(tmp_path / "first", {0}, step=5).is_file()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "val/loss is nan"), (float("inf"), "val/loss is inf")])
def test_a_validation_that_is_not_finite_is_warned_of(
    value: float, words: str, tmp_path: Path, teacher: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class PoisonValidation(Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                pl_module.log("val/loss", value)

    fit(tmp_path, teacher, corpus, NonFiniteGuard(), PoisonValidation())
    assert [record.getMessage() for record in caplog.records if "validation" in record.getMessage()] == [
        f"validation after step 6: {words}; look at the data, or lower the learning rate"
    ]


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"guard\.max_skipped_steps=0 must be at least 1"):
        NonFiniteGuard(0)


class RefuseReading(TorchDispatchMode):
    """Reading a value of a tensor makes the host wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_fused_optimizer_leaves_a_step_out_without_a_wait(implementation: str, tmp_path: Path) -> None:
    trainer, guard = make_trainer(tmp_path), NonFiniteGuard()
    guard.setup(trainer, L.LightningModule(), "fit")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], **{implementation: True})  # type: ignore[arg-type]

    def step(gradient: float) -> Tensor:
        parameter.grad = torch.full((3,), gradient)
        with RefuseReading():
            guard.on_before_optimizer_step(trainer, L.LightningModule(), optimizer)
        optimizer.step()
        return parameter.detach().clone()

    if implementation == "foreach":  # control: it cannot leave a step out by itself
        with pytest.raises(RuntimeError, match="a value was read"):
            step(1.0)
        return
    assert torch.equal(step(torch.nan), torch.ones(3))
    assert guard.skipped_steps == 0  # not known yet
    assert guard.state_dict() == {"skipped_steps": 1, "skipped_in_a_row": 1}
    assert not torch.equal(step(1.0), torch.ones(3))
    assert guard.state_dict() == {"skipped_steps": 1, "skipped_in_a_row": 0}


FUSED = {"name": "adamw", "implementation": "fused"}


@pytest.mark.parametrize(("bad", "last"), [({2, 3, 4}, 5), ({3, 4, 5}, 6)])
def test_a_fused_optimizer_stops_the_run_one_step_later(
    bad: set[int], last: int, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    with pytest.raises(RuntimeError, match=f"in 3 optimizer steps in a row, up to step {last}"):
        fit(tmp_path, teacher, corpus, PoisonLoss(bad), NonFiniteGuard(3), optimizer=FUSED)
    fit(tmp_path, teacher, corpus, PoisonLoss(bad), NonFiniteGuard(4), optimizer=FUSED)  # control


def test_a_checkpoint_counts_the_step_before_it(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    callbacks = (RunCheckpoint(every_n_steps=1, keep=100), PoisonLoss({2, 4, 5}), NonFiniteGuard())
    fit(tmp_path, teacher, corpus, *callbacks, optimizer=FUSED, enable_checkpointing=True)
    counts = []
    for path in sorted((tmp_path / "checkpoints").glob("step=*.ckpt")):
        saved = torch.load(path, weights_only=True)["callbacks"]["NonFiniteGuard"]
        counts.append((saved["skipped_steps"], saved["skipped_in_a_row"]))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(("bad", "last"), [({2, 3, 4}, 5), ({3, 4, 5}, 6)])
def test_a_checkpoint_after_each_step_does_not_keep_the_run_from_stopping(
    bad: set[int], last: int, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    """Its counts hold the step before it, which the guard itself would have looked at only later."""

    def train(folder: Path, max_skipped_steps: int) -> None:
        callbacks = (RunCheckpoint(every_n_steps=1, keep=100), PoisonLoss(bad), NonFiniteGuard(max_skipped_steps))
        fit(folder, teacher, corpus, *callbacks, optimizer=FUSED, enable_checkpointing=True)

    with pytest.raises(RuntimeError, match=f"in 3 optimizer steps in a row, up to step {last}"):
        train(tmp_path, 3)
    train(tmp_path / "control", 4)
    saved = str(tmp_path / "checkpoints" / "step=000000005.ckpt")
    trainer, _ = fit(tmp_path, teacher, corpus, NonFiniteGuard(3), optimizer=FUSED, ckpt_path=saved)
    assert trainer.global_step == 6  # a run that is continued may try again
