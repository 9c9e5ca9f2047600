"""Flags of Lightning's Trainer: each is honoured, or refused by name before anything is loaded.

A test goes through Lightning's signature, so that a flag of a later version must be added to one of the lists here.
"""

import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins import LayerSync

from datamodules.errors import InputError

HONOURED = frozenset(
    {
        *("accelerator", "strategy", "num_nodes", "deterministic", "benchmark", "logger", "callbacks"),
        *("detect_anomaly", "enable_progress_bar", "enable_model_summary"),
        *("log_every_n_steps", "enable_autolog_hparams", "inference_mode", "reload_dataloaders_every_n_epochs"),
        *("fast_dev_run", "min_epochs", "min_steps", "max_time", "limit_val_batches", "num_sanity_val_steps"),
        *("val_check_interval", "check_val_every_n_epoch", "gradient_clip_val", "gradient_clip_algorithm"),
    }
)
"""Flags that work as Lightning documents them; it refuses invalid values. Callbacks refuse what needs one process."""

PRECISIONS = (None, "32-true", "16-mixed", "bf16-mixed", 32, 16, "32", "16", "bf16")


def plugin_classes(plugins: Any) -> list[type]:
    """List the classes that ``--trainer.plugins`` names."""
    listed = plugins if isinstance(plugins, list) else [plugins]
    return [pkgutil.resolve_name(plugin.class_path) for plugin in listed if hasattr(plugin, "class_path")]


def _no_devices(devices: Any) -> bool:
    if isinstance(devices, str):
        return devices == "0" or re.fullmatch(r"auto|-1|\d+(,\d+)*,?", devices) is None
    return devices in (0, [])


def _no_run(folder: Any) -> bool:
    """Whether the folder holds no run; configurations saved by earlier versions name the run's own, which is fine."""
    return folder is not None and not (Path(folder) / "run.json").is_file()


Refused = Callable[[Any], bool]
REFUSED: dict[str, tuple[Refused, str]] = {
    "devices": (
        _no_devices,
        "give a number of devices, a list such as [0, 1], or auto",
    ),
    "precision": (
        lambda value: value not in PRECISIONS,
        "weights and losses are float32; use 32-true, bf16-mixed or 16-mixed",
    ),
    "accumulate_grad_batches": (
        lambda value: value < 1,
        "give 1 or more",
    ),
    "profiler": (
        lambda value: str(getattr(value, "class_path", value)).endswith(("pytorch", "PyTorchProfiler")),
        "it fails within the training loop; use `interstack bench profile`, or the profilers simple and advanced",
    ),
    "plugins": (
        lambda value: any(issubclass(kind, CheckpointIO | LayerSync) for kind in plugin_classes(value)),
        "checkpoints are written in one way only, and no part of a student has batch norm; leave this plugin out",
    ),
    "max_epochs": (
        lambda value: value is None or value < 1,
        "a run is measured in epochs; give 1 or more",
    ),
    "max_steps": (
        lambda value: value != -1,
        "a run is measured in epochs; leave it at -1, give --trainer.max_epochs, and shape the epochs with "
        "--data.batches_per_epoch",
    ),
    "limit_train_batches": (
        lambda value: value is not None and value <= 0,
        "nothing would be trained; give more, or use `interstack validate` to measure only",
    ),
    "overfit_batches": (
        lambda value: value != 0,
        "order and crops are drawn anew in every epoch, so the utterances would differ each time; to overfit, name a "
        "small folder with --data.train_splits, and add --data.crop fixed",
    ),
    "limit_test_batches": (
        lambda value: value is not None,
        "there is no test stage; --trainer.limit_val_batches limits validation",
    ),
    "limit_predict_batches": (
        lambda value: value is not None,
        "there is no prediction stage; --trainer.limit_val_batches limits validation",
    ),
    "enable_checkpointing": (
        lambda value: value is False,
        "a run without checkpoints could not be resumed; set their number with --checkpoint.every_n_steps and "
        "--checkpoint.keep",
    ),
    "barebones": (
        bool,
        "it leaves out the checkpoints, logs and callbacks that a run needs; to measure speed use `interstack bench`",
    ),
    "use_distributed_sampler": (
        bool,
        "the data module cuts global batches by rank itself; leave it at false",
    ),
    "sync_batchnorm": (
        bool,
        "no part of a student has batch norm; leave it at false",
    ),
    "default_root_dir": (
        _no_run,
        "the run's folder is RUNS_DIR/NAME; leave this out, also in a configuration, and give --runs_dir and --name",
    ),
    "model_registry": (
        lambda value: value is not None,
        "checkpoints stay in the run's folder; use `interstack export` for a model to upload",
    ),
}
"""Refused values of each flag, and the message with the reason and the alternative."""


def refuse_flags(trainer: Any) -> None:
    """Check the settings of a trainer, as the command line gives them.

    Raises:
        InputError: a value would not work as documented.
    """
    for name, (refused, why) in REFUSED.items():
        if refused(value := getattr(trainer, name)):
            raise InputError(f"--trainer.{name} {value}: {why}")
