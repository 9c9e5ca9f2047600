"""Runs of a tiny growing student, described in plain values, for one process and for several alike.

In one process call :func:`run_alone`. For several, ``tests.ddp.launch`` starts::

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.ddp.scenarios SPECS.json RESULTS.json

which runs the scenarios one after another in the same processes; rank 0 writes what all ranks recorded.
"""

import ctypes
import json
import os
import sys
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
from callbacks.ema import StudentEMA
from callbacks.feature_cache import FeatureCache
from callbacks.resume_guard import ResumeGuard
from datamodules.errors import InputError
from lightning_modules.distillation import DistillationModule
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.optimisation import OptimizerConfig
from lightning_modules.student_config import StudentConfig
from lightning_modules.teacher import HuggingFaceTeacher
from tests.ddp.faults import Wrappers, sabotage
from tests.helpers import make_data, make_module, make_stacking, make_trainer

Record = dict[str, Any]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.02},
    "adamw-foreach": {"implementation": "foreach", "lr": 2e-3},
    "adamw-fused": {"implementation": "fused", "lr": 2e-3},
}
# 10 utterances in batches of 5: every global batch is cut into unequal shares.
UTTERANCES, BATCH_SIZE, STEPS_PER_EPOCH, STEPS = 10, 5, 2, 8
PARTS = ("alive", "without_gradient", "error", "megabytes", "scales", "average")


@dataclass
class Scenario:
    """One run; ``home`` holds ``teacher``, ``corpus``, caches and manifests, and takes the run's folder."""

    name: str
    home: str
    kind: str = "fit"  # or validate, rewraps
    policy: str = "interleaved"
    stages: list[int] | None = None  # default: the policy's in tests.helpers
    optimizer: str = "adamw-foreach"
    batch_size: int = BATCH_SIZE
    accumulate: int = 1
    limit_train_batches: int | None = None
    clip: float | None = None
    length: str = "crop"
    precision: str = "32-true"
    init_scale: float = 2.0**8  # of the gradient scaler, which doubles every other step
    objective: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    averaged: bool = False  # keep an average of the weights
    stored: bool = False  # the features, once the front end is frozen
    cached: str | None = None  # folder under ``home`` with the teacher's targets, and perhaps features
    segments_per_utterance: int = 1
    every_n_steps: int | None = None  # write checkpoints
    checkpoint: str | None = None  # resume from it, or validate it
    fault: str | None = None  # see tests.ddp.faults
    verify: bool = True
    expect_error: bool = False
    accelerator: str = "cpu"  # or gpu: all processes share the first one
    backend: str = "gloo"  # of the process group

    @property
    def folder(self) -> Path:
        return Path(self.home) / "runs" / self.name

    def checkpoint_after(self, step: int) -> str:
        return str(self.folder / "checkpoints" / f"step={step:09d}.ckpt")


class Recorder(Callback):
    """What this rank saw and held at every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Record] = []
        self.without_gradient: set[str] = set()
        self.wrapper_settings: set[tuple[bool, bool]] = set()
        self.scales: list[float] = []
        self.norms: list[float] = []  # of the student's parameters after the last step
        self._loss = 0.0
        self._index: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        missing = (name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)
        self.without_gradient.update(missing)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        accumulate = trainer.accumulate_grad_batches
        self._loss += float(outputs["terms"]["loss"]) / accumulate
        self._index += batch.index.tolist() if batch.counts else []
        if (batch_idx + 1) % accumulate and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        (optimizer,) = trainer.optimizers
        self.steps.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "depth": pl_module.student.depth,
                "lr": optimizer.param_groups[0]["lr"],
                "loss": self._loss,
                "index": self._index,
                "checksum": ddp.checksum(pl_module, optimizer).tolist(),
            }
        )
        self._loss, self._index = 0.0, []
        self.norms = norms(pl_module.student)
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            self.scales.append(scaler.get_scale())
        if isinstance(model := trainer.strategy.model, DistributedDataParallel):
            self.wrapper_settings.add((model.find_unused_parameters, model.static_graph))


def norms(module: torch.nn.Module) -> list[float]:
    """L2 norm of each parameter."""
    return [float(parameter.detach().double().norm()) for parameter in module.parameters()]


def run(scenario: Scenario, world_size: int = 1) -> Record:
    """Run ``scenario`` in this process, one of ``world_size``; returns plain values."""
    if scenario.kind == "rewraps":
        return measure_rewraps(scenario, world_size)
    stages = {"stages": scenario.stages} if scenario.stages else {}
    stacking = make_stacking(scenario.policy, verify=scenario.verify, **stages)
    recorder, wrappers = Recorder(), Wrappers()
    patch, extra = sabotage(scenario.fault)
    callbacks: list[Callback] = [ResumeGuard(), stacking, *extra, recorder]
    average = StudentEMA(0.8) if scenario.averaged else None
    if average is not None:
        callbacks.append(average)
    if scenario.stored:
        callbacks.append(FeatureCache("float32"))
    if scenario.every_n_steps is not None:
        callbacks.append(RunCheckpoint(scenario.every_n_steps, keep=1000))
    trainer = _trainer(scenario, world_size, callbacks)
    home = Path(scenario.home)
    optimizer = OPTIMIZERS[scenario.optimizer]
    settings = {"dropout": scenario.dropout, "optimizer": optimizer, "objective": scenario.objective}
    module = make_module(home / "teacher", **settings, **scenario.student)
    cached: dict[str, Any] = {}
    if scenario.cached:
        cached = {"crop": "fixed", "targets": str(home / scenario.cached)}
        cached["segments_per_utterance"] = scenario.segments_per_utterance
    data = make_data(home / "corpus", home / "cache", batch_size=scenario.batch_size, length=scenario.length, **cached)
    error, start = None, trainer.fit if scenario.kind == "fit" else trainer.validate
    with patch, wrappers.watched(hold=scenario.fault == "hold"):
        try:
            start(module, datamodule=data, ckpt_path=scenario.checkpoint)
        except (InputError, RuntimeError) as problem:
            if not scenario.expect_error:
                raise
            error = str(problem)
    return {
        "steps": recorder.steps,
        "without_gradient": sorted(recorder.without_gradient),
        "wrapper_settings": sorted(recorder.wrapper_settings),
        "scales": recorder.scales,
        "norms": recorder.norms,
        "average": norms(average.student) if average is not None else [],
        "compiled": all(layer._compiled_call_impl is not None for layer in module.student.hubert.encoder.layers),
        "growths": [event.depth for event in stacking.events],
        "alive": wrappers.alive,
        "depth": module.student.depth,
        "val_loss": float(trainer.callback_metrics.get("val/loss", torch.nan)),
        "error": error,
    }


def _place(scenario: Scenario, world_size: int) -> dict[str, Any]:
    """Settings of a trainer: which devices, and how the processes talk."""
    distributed = world_size > 1 or scenario.backend == "nccl"
    strategy = DDPStrategy(process_group_backend=scenario.backend) if distributed else "auto"
    if scenario.accelerator == "cpu":
        return {"devices": world_size, "strategy": strategy}
    # Lightning refuses to list a GPU twice, so that each process poses as a machine of its own.
    os.environ |= {"GROUP_RANK": os.environ.get("RANK", "0"), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {"accelerator": "gpu", "devices": 1, "num_nodes": world_size, "strategy": strategy}


def _trainer(scenario: Scenario, world_size: int, callbacks: list[Callback]) -> L.Trainer:
    settings: dict[str, Any] = {
        **_place(scenario, world_size),
        "accumulate_grad_batches": scenario.accumulate,
        "gradient_clip_val": scenario.clip,
        "limit_train_batches": scenario.limit_train_batches,
        "enable_checkpointing": scenario.every_n_steps is not None,
    }
    if scenario.precision == "16-mixed":  # Lightning makes bf16-mixed of it on a CPU unless given the plugin
        scaler = GradScaler("cpu", init_scale=scenario.init_scale, growth_interval=2)
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        settings["precision"] = scenario.precision
    return make_trainer(scenario.folder, *callbacks, **settings)


class Rewraps(Callback):
    """Drop and rebuild the wrapper after every batch, and note the resident memory in MB."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.optimizers[0].zero_grad(set_to_none=True)
        ddp.unwrap(trainer, pl_module)
        ddp.rewrap(trainer)
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is no leak, and varies by 40 MB
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def measure_rewraps(scenario: Scenario, world_size: int) -> Record:
    """16 steps of a student of 7 million parameters (27 MB), each with a re-wrap after it."""
    rewraps, wrappers = Rewraps(), Wrappers()
    home = Path(scenario.home)
    module = DistillationModule(
        HuggingFaceTeacher(str(home / "teacher")),
        StudentConfig(256, 1024, 4, 8),
        ObjectiveConfig(intermediate="none"),
        OptimizerConfig("sgd"),
    )
    data = make_data(home / "corpus", home / "cache", batch_size=BATCH_SIZE, val_splits=[])
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(scenario.folder, rewraps, max_epochs=8, devices=world_size, strategy=strategy)
    with wrappers.watched(hold=scenario.fault == "hold"):
        trainer.fit(module, datamodule=data)
    return {"megabytes": rewraps.megabytes, "alive": wrappers.alive}


def merge(ranks: list[Record]) -> Record:
    """One record of all ranks: per step the mean of the losses (each is scaled by the number of ranks), all rows
    and every rank's checksum; of the rest rank 0's, or a list over ranks for ``PARTS``."""
    merged = ranks[0] | {key: [rank.get(key) for rank in ranks] for key in PARTS}
    merged["steps"] = [
        parts[0]
        | {
            "loss": sum(part["loss"] for part in parts) / len(ranks),
            "index": sorted(row for part in parts for row in part["index"]),
            "checksums": [part["checksum"] for part in parts],
        }
        for parts in zip(*(rank.get("steps", []) for rank in ranks), strict=True)
    ]
    return merged


def run_alone(scenario: Scenario) -> Record:
    """Run in this one process; the record looks like that of several."""
    return merge([run(scenario)])


def dump(scenarios: list[Scenario]) -> str:
    return json.dumps([asdict(scenario) for scenario in scenarios])


def run_ranks(specs: str, results: Path) -> None:
    """Run dumped scenarios as one of the processes of a launch; rank 0 writes the ``results``."""
    world_size, merged = int(os.environ["WORLD_SIZE"]), {}
    scenarios = [Scenario(**spec) for spec in json.loads(specs)]
    torch.distributed.init_process_group(scenarios[0].backend)  # Lightning takes one that is there
    for scenario in scenarios:
        ranks: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(ranks, run(scenario, world_size))
        merged[scenario.name] = merge(ranks)
    if torch.distributed.get_rank() == 0:
        results.write_text(json.dumps(merged))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]).read_text(), Path(sys.argv[2]))
