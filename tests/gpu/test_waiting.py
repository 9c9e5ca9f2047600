"""What a step waits for, and what it leaves as it was."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.stop_signals import REQUEUE, TERMINATE, StopSignals
from tests.callbacks.faults import PoisonLoss
from tests.gpu.fits import Place
from tests.lightning_modules.graphs import TORCH_WARNINGS


class Snapshots(Callback):
    """Copies of all parameters and of the optimizer's state after each step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        (optimizer,) = trainer.optimizers
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = [optimizer.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
        self.steps.append([tensor.detach().clone() for tensor in (*parameters, *moments)])

    def unchanged(self) -> list[int]:
        """Steps (0-based) that left all as it was; a growth changes the number of tensors."""
        return [
            step
            for step in range(1, len(self.steps))
            if len(self.steps[step]) == len(self.steps[step - 1])
            and all(map(torch.equal, self.steps[step - 1], self.steps[step]))
        ]


@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_a_bad_step_leaves_weights_and_moments_bit_for_bit(kind: Any, place: Place) -> None:
    fused = {"optimizer": {"implementation": "fused", "weight_decay": 0.1}}
    guarded, unguarded = Snapshots(), Snapshots()
    run = place.fit(f"bad_{kind}", [PoisonLoss({2}, kind), guarded], module=fused)
    assert guarded.unchanged() == [2]
    assert bool(run.weights_N.isfinite().all())
    place.fit(f"unguarded_{kind}", [PoisonLoss({2}, "nan"), unguarded], module=fused, guard=False)
    assert unguarded.unchanged() == []


class RefuseWaits(Callback):
    """An error where the host waits for the device, from the third step of each epoch to its last.

    What Lightning does after the hooks of a batch is included.
    """

    def __init__(self, wait: str = "never") -> None:
        self.wait = wait

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 2 * trainer.accumulate_grad_batches:  # the first step is logged
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        if self.wait == "hook":
            outputs["loss"].item()
        if self.wait == "progress bar":  # Lightning reads what is logged for it, also without a bar
            pl_module.log("seen", outputs["loss"].detach(), prog_bar=True, logger=False)
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


LONG = {"batches_per_epoch": 6}
STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16, dropout": {
        "precision": "bf16-mixed",
        "module": {"dropout": 0.1, "teacher_settings": {"precision": "bf16"}},
    },
    "accumulated": {"accumulate_grad_batches": 2},
    "shared front end": {"module": {"front_end": "shared"}},
    "DDP": {"strategy": "ddp"},  # of one process; with more they also agree on signals, see below
    "compiled": {"module": {"compile": True, "teacher_settings": {"precision": "32", "compile": True}}},
}


@pytest.fixture
def _ends_its_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_ends_its_group")
@pytest.mark.filterwarnings(*[mark.args[0] for mark in TORCH_WARNINGS])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(name: str, cuda: torch.device, place: Place) -> None:
    place.fit(f"waits_{name}", [RefuseWaits()], data=LONG, log_every_n_steps=1000, **STEPS[name])


@pytest.mark.parametrize("wait", ["hook", "progress bar"])
def test_control_one_number_that_is_read_is_seen(wait: str, cuda: torch.device, place: Place) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        place.fit(f"waits_control_{wait}", [RefuseWaits(wait)], data=LONG, log_every_n_steps=1000)


@pytest.mark.usefixtures("_ends_its_group")
def test_ranks_agree_on_a_signal_without_waiting(cuda: torch.device, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=cuda)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=cuda), fit_loop=loop)
    signals = StopSignals()
    assert signals.agreed(trainer) == 0  # the first collective sets NCCL up
    torch.cuda.set_sync_debug_mode("error")
    agreed = []
    for received in (0, TERMINATE, REQUEUE, REQUEUE):
        signals.received = received
        agreed.append(signals.agreed_before(trainer))
    assert agreed == [0, 0, TERMINATE, REQUEUE]


class Pinned(Callback):
    """Whether each tensor of a batch lies in pinned memory before it moves."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        original = data.transfer_batch_to_device

        def noted(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            self.seen += [value.is_pinned() for value in batch if isinstance(value, Tensor)]
            return original(batch, device, dataloader_idx)

        data.transfer_batch_to_device = noted


@pytest.mark.parametrize("workers", [0, 2])
def test_every_tensor_of_a_batch_is_pinned(workers: int, cuda: torch.device, place: Place) -> None:
    here, on_the_cpu = Pinned(), Pinned()
    place.fit(f"pinned_{workers}", [here], data={"num_workers": workers})
    assert here.seen
    assert all(here.seen)
    place.fit(f"pageable_{workers}", [on_the_cpu], data={"num_workers": workers}, accelerator="cpu")
    assert not any(on_the_cpu.seen)
