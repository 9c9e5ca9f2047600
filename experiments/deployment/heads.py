"""Heads that ``interstack superb`` trained, scored on other hidden states than they learnt from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from datamodules.errors import InputError
from experiments.deployment.trained_head import finished_run
from experiments.records.loggers import WandbSettings
from experiments.superb.checkpoint import load_best
from experiments.superb.options import Devices, RunSettings
from experiments.superb.preparation import Prepared, prepare
from experiments.superb.running import build_data, build_module, run_task
from lightning_modules.superb.recipes import TASK_RECIPES
from lightning_modules.superb.task_module import deterministic_cudnn
from lightning_modules.superb.upstream import Upstream

Scores = dict[str, dict[str, float]]
"""Metrics of each test set."""


@dataclass(frozen=True)
class Head:
    """A finished run of one task.

    Attributes:
        folder: its folder.
        settings: its settings, for one device, without W&B and without a feature cache on disk.
        prepared: task and corpus.
    """

    folder: Path
    settings: RunSettings
    prepared: Prepared

    @property
    def metric(self) -> str:
        """Name of the task's main metric."""
        return TASK_RECIPES[self.settings.task].monitor

    @deterministic_cudnn()
    def scores(self, upstream: Upstream) -> Scores:
        """Score the trained head on the test sets, with the hidden states of ``upstream``."""
        module = build_module(self.settings, upstream, self.prepared)
        load_best(self.folder, module)
        devices = self.settings.devices
        trainer = L.Trainer(
            accelerator=devices.accelerator,
            devices=1,
            precision=devices.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        data = build_data(self.settings, self.prepared)
        trainer.test(module, datamodule=data, verbose=False, weights_only=True)
        return module.test_scores

    def retrained_scores(self, upstream: Upstream, folder: Path) -> Scores:
        """Train another head like this one, on the hidden states of ``upstream``, and return its scores on test."""
        return run_task(replace(self.settings, output=str(folder)), upstream, self.prepared)["tests"]


def load_head(folder: Path, upstream: Upstream, accelerator: str, own: bool = True) -> Head:
    """Read the run in ``folder`` and its corpus.

    Args:
        folder: result folder of ``interstack superb``.
        upstream: the encoder that the head will be scored with.
        accelerator: device to compute on.
        own: whether it must be the encoder that the head was trained on, or only one of its sizes.

    Raises:
        InputError: the folder holds no finished run with a trained head, or that of another encoder.
    """
    config, result = finished_run(folder)
    found, wanted = (result["hidden_states"], result["width"]), (upstream.num_states, upstream.width)
    if found != wanted:
        raise InputError(
            f"--head {folder} sees {found[0]} hidden states of width {found[1]}, but {upstream.name} has {wanted[0]} "
            f"of width {wanted[1]}: give its own encoder, --upstream {config['upstream']}"
        )
    if own and config["upstream_digest"] != upstream.digest():
        raise InputError(
            f"--head {folder} was trained on an encoder of other weights or another --normalize than {upstream.name}: "
            f"give its own encoder, --upstream {config['upstream']}"
        )
    settings = _on_one_device(RunSettings.from_plain(config), accelerator)
    return Head(folder, settings, prepare(settings, upstream.rate))


def _on_one_device(settings: RunSettings, accelerator: str) -> RunSettings:
    changed: dict[str, Any] = {"feature_cache": None, "wandb": WandbSettings(mode="disabled")}
    devices = Devices(accelerator, precision=settings.devices.precision, progress_bar=False)
    return replace(settings, devices=devices, **changed)
