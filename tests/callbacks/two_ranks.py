"""Run by each of two processes: faults that reach one rank. Writes one JSON per rank."""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import feature_cache
from callbacks.checkpointing import RunCheckpoint
from callbacks.feature_cache import FeatureCache, compute_features
from callbacks.guards import NonFiniteGuard
from callbacks.stop_signals import StopSignals
from datamodules.errors import InputError, is_foreseen, is_storage_error
from datamodules.target_writing import Computed
from lightning_modules.distillation import DistillationModule
from tests.callbacks.faults import AskToStop, PoisonLoss, SendSignal
from tests.helpers import make_data, make_module, make_stacking, make_trainer


def fit(
    folder: Path,
    *callbacks: Callback,
    ckpt_path: str | None = None,
    front_end: str = "trained",
    crop: str = "random",
    **settings: Any,
) -> tuple[DistillationModule, Any]:
    trainer = make_trainer(
        folder,
        make_stacking(),
        RunCheckpoint(every_n_steps=0),
        *callbacks,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        accumulate_grad_batches=2,
        enable_checkpointing=True,
        **settings,
    )
    module = make_module(folder.parent / "teacher", front_end=front_end)
    error: Any = None
    try:
        data = make_data(folder.parent / "corpus", folder.parent / "cache", crop=crop)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except (SIGTERMException, OSError, InputError) as raised:
        error = raised
    return module, error


def checksum(module: DistillationModule) -> str:
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def then_signal(*args: Any, **more: Any) -> Iterator[Computed]:
    """Compute features until a signal comes right after the first."""
    for computed in compute_features(*args, **more):
        yield computed
        signal.raise_signal(signal.SIGTERM)


def main(folder: Path) -> None:
    result: dict[str, Any] = {}
    guards = [NonFiniteGuard(), NonFiniteGuard()]
    with mock.patch.object(_TrainingEpochLoop, "_broadcast_sigterm_tensor") as waits:
        module, _ = fit(folder / "whole", guards[0])
        result["waits"] = [waits.call_count]
        with mock.patch.object(StopSignals, "listen"):  # as outside the main thread: Lightning's handlers stay
            fit(folder / "Lightning's")
        result["waits"].append(waits.call_count - result["waits"][0])
    result["whole"] = checksum(module)
    module, _ = fit(folder / "skip", guards[1], PoisonLoss({8}, "infinite", rank=1))
    result["skip"] = checksum(module)
    result["finite"] = all(bool(p.isfinite().all()) for p in module.parameters())
    result["skipped"] = [guard.skipped_steps for guard in guards]

    _, stop = fit(folder / "stop", SendSignal(1, 0, rank=1))
    result["code"] = stop.code
    last = folder / "stop" / "checkpoints" / "last.ckpt"
    result["step"] = torch.load(last, weights_only=True)["global_step"]
    kept = shutil.copy(last, folder / f"step_5_{os.environ['RANK']}.ckpt")
    module, _ = fit(folder / "stop", ckpt_path=str(last))
    result["resumed"] = checksum(module)

    _, stop = fit(folder / "asked", AskToStop(1, "on_train_batch_end", 1, rank=1))
    last = folder / "asked" / "checkpoints" / "last.ckpt"
    result["asked"] = [stop.code, torch.load(last, weights_only=True)["global_step"]]
    module, _ = fit(folder / "asked", ckpt_path=str(last))
    result["asked_resumed"] = checksum(module)

    until_growth = {"front_end": "trained_until_growth", "crop": "fixed"}
    with mock.patch.object(feature_cache, "compute_features", then_signal):  # by rank zero alone
        _, stop = fit(folder / "growth", FeatureCache(batch_seconds=0.01), **until_growth)
    last = folder / "growth" / "checkpoints" / "last.ckpt"
    result["growth"] = [stop.code, torch.load(last, weights_only=True)["global_step"]]
    module, _ = fit(folder / "growth", FeatureCache(), ckpt_path=str(last), **until_growth)
    result["unwritten"] = []
    for failure in (OSError(errno.ESTALE, "stale"), InputError("no layers"), KeyError("a bug")):
        with mock.patch.object(FeatureCache, "_write", side_effect=failure):
            try:
                _, error = fit(folder / "unwritten", FeatureCache(), **until_growth)
            except (KeyError, RuntimeError) as raised:
                error = raised
        result["unwritten"].append([str(error), is_storage_error(error), is_foreseen(error)])
    result["growth_resumed"] = [module.student.depth, (folder / "growth" / "features").is_dir()]

    _, error = fit(folder / "clocks", val_check_interval={"minutes": 30})
    result["clocks"] = str(error)

    # Two files of the same depth. Another depth, and so a rank that begins anew, is refused by DDP.
    seen = folder / "stop" / "checkpoints" / "stage_2.ckpt" if os.environ["RANK"] == "1" else kept
    _, error = fit(folder / "apart", ckpt_path=str(seen))
    result["apart"] = [str(error), is_storage_error(error)]
    with mock.patch.dict(os.environ, {"TORCHELASTIC_MAX_RESTARTS": "3"}):
        _, stop = fit(folder / "wanted", AskToStop(1, "on_train_batch_end", 1, rank=1))
        _, stopped = fit(folder / "signalled", SendSignal(1, 0, rank=1))
    result["under restarts"] = [stop.code, stopped.code]

    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("callbacks.checkpointing.os.fsync", side_effect=full):
        _, error = fit(folder / "full")
    result["error"] = str(error)
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
