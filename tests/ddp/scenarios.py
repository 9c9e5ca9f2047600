"""Runs of a tiny growing student, described in plain values, for one process and for several alike.

In one process call :func:`run`. For several, ``tests.ddp.launch`` starts::

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/ddp/scenarios.py SPECS.json RESULTS.json

which runs the scenarios one after another in the same processes; rank 0 writes what all ranks recorded.
"""

import contextlib
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from callbacks import ddp
from callbacks.checkpointing import RunCheckpoint
from callbacks.fingerprint import ResumeGuard
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.optimisation import OptimizerConfig
from lightning_modules.student import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import make_data, make_module, make_stacking, make_trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05},
    "adamw-foreach": {"implementation": "foreach", "lr": 2e-3},
    "adamw-fused": {"implementation": "fused", "lr": 2e-3},
}


@dataclass
class Scenario:
    """One run. ``home`` holds ``teacher``, ``corpus`` and ``cache``; everything else has the plainest value.

    ``fault`` takes one mechanism away, for negative controls; see :func:`sabotage`.
    """

    name: str
    home: str
    kind: str = "fit"  # fit, validate, rewraps
    policy: str = "interleaved"
    stages: list[int] | None = None
    optimizer: str = "adamw-foreach"
    accumulate: int = 1
    limit_train_batches: int | None = None
    clip: float | None = None
    length: str = "crop"
    precision: str = "32-true"
    objective: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    every_n_steps: int | None = None  # checkpoints
    checkpoint: str | None = None  # to resume from, or to validate
    fault: str | None = None
    expect_error: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.home) / "runs" / self.name


class Recorder(Callback):
    """What this rank saw and held at every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.without_gradient: set[str] = set()
        self._loss, self._index = 0.0, []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        missing = (name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)
        self.without_gradient.update(missing)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulate = trainer.accumulate_grad_batches
        self._loss += float(outputs["terms"]["loss"]) / accumulate
        self._index += batch.index.tolist()
        if (batch_idx + 1) % accumulate and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        (optimizer,) = trainer.optimizers
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.steps.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "depth": pl_module.student.depth,
                "lr": optimizer.param_groups[0]["lr"],
                "loss": self._loss,
                "index": self._index,
                "checksum": ddp.checksum(pl_module, optimizer).tolist(),
                "scale": scaler.get_scale() if scaler else None,
            }
        )
        self._loss, self._index = 0.0, []


class Wrappers:
    """Weak references to the DDP wrappers that growths dropped, and whether each was dead before the next."""

    def __init__(self) -> None:
        self.dropped: list[weakref.ref[DistributedDataParallel]] = []
        self.alive: list[int] = []  # how many were alive when the new wrapper was made
        self.held: list[Any] = []

    @contextlib.contextmanager
    def watched(self, hold: bool) -> Iterator[None]:
        real_unwrap, real_rewrap = ddp.unwrap, ddp.rewrap

        def unwrap(trainer: L.Trainer, module: L.LightningModule) -> None:
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                self.dropped.append(weakref.ref(trainer.strategy.model))
                self.held += [trainer.strategy.model] if hold else []
            real_unwrap(trainer, module)

        def rewrap(trainer: L.Trainer) -> None:
            self.alive.append(sum(wrapper() is not None for wrapper in self.dropped))
            real_rewrap(trainer)

        with _replaced(ddp, unwrap=unwrap, rewrap=rewrap):
            yield


@contextlib.contextmanager
def _replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    real = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(owner, name, function)


class Perturb(Callback):
    """Change one number on rank 1 in the middle of the first stage, as a bit flip would."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank != 1 or trainer.current_epoch != 0 or batch_idx != 1:
            return
        parameter = pl_module.student.hubert.encoder.layers[0].attention.q_proj.weight
        state = trainer.optimizers[0].state[parameter]
        target = parameter if self.what == "weight" else state["exp_avg"]
        with torch.no_grad():
            target[0, 0] += 1e-6


class NewScalerAtGrowth(Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch and batch_idx == 0:
            trainer.precision_plugin.scaler = _scaler()


def sabotage(scenario: Scenario) -> tuple[contextlib.AbstractContextManager[None], list[Callback]]:
    """Take the mechanism that ``scenario.fault`` names away."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    real_losses = DistillationModule.losses

    def losses(module: DistillationModule, batch: Any, scale: float = 1.0) -> Any:
        # Divide by this share's own frames, as a loss that takes a plain mean does.
        return real_losses(module, batch._replace(global_num_samples=batch.num_samples), 1.0)

    patches: dict[str, contextlib.AbstractContextManager[None]] = {
        "no_rewrap": _replaced(ddp, rewrap=nothing),
        "same_wrapper": _replaced(ddp, unwrap=nothing, rewrap=nothing),
        "own_frames": _replaced(DistillationModule, losses=losses),
    }
    callbacks: dict[str, Callback] = {
        "perturb_weight": Perturb("weight"),
        "perturb_state": Perturb("state"),
        "new_scaler": NewScalerAtGrowth(),
    }
    fault = scenario.fault or ""
    extra = [callbacks[fault]] if fault in callbacks else []
    return patches.get(fault, contextlib.nullcontext()), extra


def _scaler() -> GradScaler:
    """One that doubles every other step until it overflows, so that its state tells its history."""
    return GradScaler("cpu", init_scale=2.0**13, growth_interval=2)


def _trainer(scenario: Scenario, world_size: int, callbacks: list[Callback]) -> L.Trainer:
    settings: dict[str, Any] = {
        "devices": world_size,
        "strategy": DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        "accumulate_grad_batches": scenario.accumulate,
        "gradient_clip_val": scenario.clip,
        "limit_train_batches": scenario.limit_train_batches,
    }
    if scenario.precision == "16-mixed":  # Lightning turns it into bf16-mixed on a CPU unless given the plugin
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", _scaler())]
    else:
        settings["precision"] = scenario.precision
    return make_trainer(scenario.folder, *callbacks, **settings)


def run(scenario: Scenario, world_size: int = 1) -> dict[str, Any]:
    """Run ``scenario`` in this process, one of ``world_size``; returns plain values."""
    if scenario.kind == "rewraps":
        return measure_rewraps(scenario, world_size)
    stacking = make_stacking(
        scenario.policy, verify=scenario.fault is None or scenario.expect_error, **_stages(scenario)
    )
    recorder, wrappers = Recorder(), Wrappers()
    patch, extra = sabotage(scenario)
    callbacks: list[Callback] = [ResumeGuard(), stacking, *extra, recorder]
    if scenario.every_n_steps is not None:
        callbacks.append(RunCheckpoint(scenario.every_n_steps, keep=1000))
    trainer = _trainer(scenario, world_size, callbacks)
    home = Path(scenario.home)
    module = make_module(
        home / "teacher",
        dropout=scenario.dropout,
        optimizer=OPTIMIZERS[scenario.optimizer],
        objective=scenario.objective,
    )
    data = make_data(home / "corpus", home / "cache", batch_size=5, length=scenario.length)
    error, start = None, trainer.fit if scenario.kind == "fit" else trainer.validate
    with patch, wrappers.watched(hold=scenario.fault == "hold"):
        try:
            start(module, datamodule=data, ckpt_path=scenario.checkpoint)
        except RuntimeError as problem:
            if not scenario.expect_error:
                raise
            error = str(problem)
    model = trainer.strategy.model
    return {
        "steps": recorder.steps,
        "without_gradient": sorted(recorder.without_gradient),
        "growths": [event["depth"] for event in stacking.events],
        "alive": wrappers.alive,
        "dropped": len(wrappers.dropped),
        "ddp_settings": _ddp_settings(trainer.strategy),
        "wrapped": type(model).__name__,
        "depth": module.student.depth,
        "originals": list(module.student.originals),
        "val_loss": float(trainer.callback_metrics.get("val/loss", torch.nan)),
        "error": error,
    }


def _stages(scenario: Scenario) -> dict[str, list[int]]:
    return {"stages": scenario.stages} if scenario.stages else {}


def _ddp_settings(strategy: Any) -> dict[str, Any]:
    return dict(getattr(strategy, "_ddp_kwargs", {}))


class Rewraps(Callback):
    """Drop and rebuild the wrapper after every batch, and note the resident memory in MB."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.find_unused: set[bool] = set()
        self.static_graph: set[bool] = set()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.find_unused.add(trainer.strategy.model.find_unused_parameters)
        self.static_graph.add(trainer.strategy.model.static_graph)
        trainer.optimizers[0].zero_grad(set_to_none=True)
        ddp.unwrap(trainer, pl_module)
        ddp.rewrap(trainer)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * 4096 / 1e6)


def measure_rewraps(scenario: Scenario, world_size: int) -> dict[str, Any]:
    """15 steps of a student of 6 million parameters (25 MB), each with a re-wrap after it."""
    rewraps, wrappers = Rewraps(), Wrappers()
    home = Path(scenario.home)
    teacher = HuggingFaceTeacher(str(home / "teacher"))
    module = DistillationModule(
        teacher, StudentConfig(256, 1024, 4, 8), ObjectiveConfig(intermediate="none"), OptimizerConfig("sgd")
    )
    data = make_data(home / "corpus", home / "cache", batch_size=5, val_splits=[])
    trainer = make_trainer(
        scenario.folder,
        rewraps,
        max_epochs=5,
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    with wrappers.watched(hold=scenario.fault == "hold"):
        trainer.fit(module, datamodule=data)
    return {
        "megabytes": rewraps.megabytes,
        "alive": wrappers.alive,
        "find_unused": sorted(rewraps.find_unused),
        "static_graph": sorted(rewraps.static_graph),
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all ranks: mean of the losses (each is scaled by the number of ranks), union of the rows."""
    merged = ranks[0] | {"ranks": len(ranks)}
    for key in ("alive", "without_gradient", "error", "megabytes"):
        merged[key] = [rank.get(key) for rank in ranks]
    if "steps" not in merged:
        return merged
    merged["steps"] = [
        step[0]
        | {
            "loss": sum(part["loss"] for part in step) / len(ranks),
            "index": sorted(row for part in step for row in part["index"]),
            "checksums": [part["checksum"] for part in step],
        }
        for step in zip(*(rank["steps"] for rank in ranks), strict=True)
    ]
    return merged


def run_alone(scenario: Scenario) -> dict[str, Any]:
    """Run in this one process; the record looks like that of several."""
    return merge([run(scenario)])


def main() -> None:
    specs, results = Path(sys.argv[1]), Path(sys.argv[2])
    world_size = int(os.environ["WORLD_SIZE"])
    merged = {}
    for spec in json.loads(specs.read_text()):
        scenario = Scenario(**spec)
        own = run(scenario, world_size)
        ranks: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(ranks, own)
        merged[scenario.name] = merge(ranks)
    if torch.distributed.get_rank() == 0:
        results.write_text(json.dumps(merged))
    torch.distributed.destroy_process_group()


def dump(scenarios: list[Scenario]) -> str:
    return json.dumps([asdict(scenario) for scenario in scenarios])


if __name__ == "__main__":
    main()
