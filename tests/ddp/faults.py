"""Take one mechanism of growth away (for negative controls), and watch what becomes of DDP's old wrappers."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from callbacks import ddp
from lightning_modules.distillation import DistillationModule


@contextlib.contextmanager
def replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Other functions in place of those of the same names, for a while."""
    real = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(owner, name, function)


class Wrappers:
    """Weak references to the DDP wrappers that were dropped.

    Attributes:
        alive: at each re-wrap, how many of them still were.
    """

    def __init__(self) -> None:
        self.dropped: list[weakref.ref[DistributedDataParallel]] = []
        self.alive: list[int] = []
        self._held: list[Any] = []

    @contextlib.contextmanager
    def watched(self, hold: bool) -> Iterator[None]:
        """Count drops; with ``hold`` keep the wrappers alive, as a leak would."""
        real_unwrap, real_rewrap = ddp.unwrap, ddp.rewrap

        def unwrap(trainer: L.Trainer, module: L.LightningModule) -> None:
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                self.dropped.append(weakref.ref(trainer.strategy.model))
                self._held += [trainer.strategy.model] if hold else []
            real_unwrap(trainer, module)

        def rewrap(trainer: L.Trainer) -> None:
            self.alive.append(sum(wrapper() is not None for wrapper in self.dropped))
            real_rewrap(trainer)

        with replaced(ddp, unwrap=unwrap, rewrap=rewrap):
            yield


class Perturb(Callback):
    """Change one number of rank 1 by 1e-6 after the first step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != 1 or trainer.current_epoch != 0 or batch_idx != 0:
            return
        parameter = pl_module.student.hubert.encoder.layers[0].attention.q_proj.weight
        state = trainer.optimizers[0].state[parameter]
        target = parameter if self.what == "weight" else state["exp_avg"]
        with torch.no_grad():
            target[0, 0] += 1e-6


class LessMemory(Callback):
    """Rank 1 has a smaller device, for which it cuts batches into twice the parts when the run is set up."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.accumulate_grad_batches *= 1 + trainer.global_rank


class NewScaler(Callback):
    """Start another gradient scaler with every stage."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch and batch_idx == 0:
            old = trainer.precision_plugin.scaler
            new = GradScaler("cpu", init_scale=2.0**8, growth_interval=old.get_growth_interval())
            trainer.precision_plugin.scaler = new


class Forget(Callback):
    """Resume without the optimizer's state, or without the place in the data."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.what == "optimizer":
            checkpoint["optimizer_states"][0]["state"] = {}
        else:
            del checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def sabotage(fault: str | None) -> tuple[contextlib.AbstractContextManager[None], list[Callback]]:
    """Patches and callbacks that take away what ``fault`` names; nothing for ``None`` and ``hold``."""

    def nothing(*_: Any) -> None:
        return None

    real_losses = DistillationModule.losses

    def own_mean(module: DistillationModule, batch: Any, scale: float = 1.0, targets: Any = None) -> Any:
        # As a loss does that takes the mean over the frames that it sees.
        return real_losses(module, batch._replace(global_num_samples=batch.num_samples), 1.0, targets)

    def counted(module: DistillationModule, batch: Any, scale: float = 1.0, targets: Any = None) -> Any:
        return real_losses(module, batch._replace(counts=True), scale, targets)

    def by_micro_batch(module: DistillationModule, batch: Any, batch_idx: int) -> None:
        words = np.random.SeedSequence([module.seed, module.trainer.current_epoch, batch_idx, module.global_rank])
        torch.manual_seed(int(words.generate_state(1)[0]))
        np.random.seed(int(words.generate_state(2)[1]))  # noqa: NPY002

    patches: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "no_rewrap": lambda: replaced(ddp, rewrap=nothing),
        "same_wrapper": lambda: replaced(ddp, unwrap=nothing, rewrap=nothing),
        "own_frames": lambda: replaced(DistillationModule, losses=own_mean),
        "counted": lambda: replaced(DistillationModule, losses=counted),
        "masks_by_micro_batch": lambda: replaced(DistillationModule, on_train_batch_start=by_micro_batch),
    }
    callbacks: dict[str, Callback] = {
        "perturb_weight": Perturb("weight"),
        "perturb_state": Perturb("state"),
        "less_memory": LessMemory(),
        "new_scaler": NewScaler(),
        "forget_optimizer": Forget("optimizer"),
        "forget_place": Forget("place"),
    }
    if fault not in (None, "hold", *patches, *callbacks):
        raise ValueError(f"unknown fault {fault!r}")
    patch = patches[fault]() if fault in patches else contextlib.nullcontext()
    return patch, [callbacks[fault]] if fault in callbacks else []
