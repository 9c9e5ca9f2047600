"""ResumeGuard: refuses to resume from the checkpoint of another run."""

import logging
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from callbacks.ema import StudentEMA
from callbacks.feature_cache import FeatureCache
from callbacks.lookup import find_callback
from callbacks.stacking import StackingCallback
from datamodules.errors import InputError
from datamodules.files import flatten
from datamodules.speech_data import speech_data
from lightning_modules.distillation import DistillationModule
from lightning_modules.export import STUDENT_PREFIX
from lightning_modules.growth.layers import state_dict_depth
from lightning_modules.student_config import OWN_DROPOUT, StudentConfig
from lightning_modules.teacher_identity import teacher_digest

log = logging.getLogger(__name__)

COMPUTE_ONLY_SETTINGS = frozenset({"compile", "compile_backend", "kernels"})
"""Settings of student and teacher that change how they are computed but not what is learned."""
SETTINGS_COVERED_ELSEWHERE = frozenset({"model", "revision", "normalize", "attn_implementation"})
"""Settings of a teacher that other entries of the fingerprint cover, and the implementation of its attention."""
STUDENT_BEFORE = (
    *("conv_channels", "conv_layers", "front_end_gradient", "feature_norm", "feature_projection", "input_dropout"),
    *("init_layers", "time_reduction", "reuse_attention", "scale_layer_gradients", "architecture", "options"),
)
"""Settings of the student that are not in older checkpoints, which have the defaults of today."""
OBJECTIVE_BEFORE = {
    "loss": None,
    "normalize_targets": "none",
    "output_weight": 1.0,
    "unmatched": "refuse",
    "head": "linear",
    "targets": "hidden",
    "masked": "none",
}
"""Settings of the objective that are not in older checkpoints, and the values that these have."""
TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm")
"""Settings of the trainer that change what is learned; stages and steps cover the length of the run."""


@rank_zero_only
def _tell(text: str) -> None:
    log.info(text)


def _plain(value: Any) -> Any:
    """The string value of one of Lightning's enumerations; other values do not change."""
    return str(value.value) if isinstance(value, Enum) else value


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A phrase for each setting that differs, sorted by name."""
    old, new = flatten(saved), flatten(current)
    return [
        f"{name} was {old.get(name, 'not set')}, is {new.get(name, 'not set')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def decisive(model: dict[str, Any]) -> dict[str, Any]:
    """Settings of the model without those that are not used, which checkpoints from before they existed lack."""
    student, objective = dict(model["student"]), dict(model["objective"])
    defaults = asdict(StudentConfig())
    unused: dict[str, tuple[Any, ...]] = {name: (defaults[name],) for name in STUDENT_BEFORE}
    unused |= dict.fromkeys(OWN_DROPOUT, (None, student.get("dropout")))
    for name in student.keys() & (COMPUTE_ONLY_SETTINGS | unused.keys()):
        if name in COMPUTE_ONLY_SETTINGS or student[name] in unused[name]:
            del student[name]
    if student.get("front_end") == "shared":  # the same features, only computed once
        student["front_end"] = "frozen"
    if objective.get("normalize_targets") != "standardize":
        objective.pop("statistics_seconds", None)
    if objective.get("masked") != "fixed":
        objective.pop("mask_seed", None)
    for name in objective.keys() & OBJECTIVE_BEFORE.keys():
        if objective[name] == OBJECTIVE_BEFORE[name]:
            del objective[name]
    return model | {"student": student, "objective": objective}


class ResumeGuard(Callback):
    """Stores a run's settings in its checkpoints, and refuses to resume from another run's checkpoint.

    Acts: when a checkpoint is saved, and in ``fit`` before the weights of one are loaded.

    It compares the growth settings and stage lengths, the steps of the learning-rate schedule, student, objective,
    optimizer, clipping, precision (of trainer and teacher), average of the weights, seed, the teacher's weights,
    settings and waveforms, and the corpus. The number of devices, accumulation steps, compilation and kernels,
    validation, folders and loggers may change. A run that starts or stops averaging is another run too. Settings that
    an older checkpoint does not record are not compared.

    It also refuses a finished run's checkpoint in another run's folder, because nothing would be left to train.

    Args:
        allow_config_change: resume with other settings all the same; the new settings apply.
    """

    def __init__(self, allow_config_change: bool = False) -> None:
        self.allow_config_change = allow_config_change

    def fingerprint(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Settings that identify this run, in plain values."""
        assert isinstance(module, DistillationModule)
        stacking = find_callback(trainer, StackingCallback)
        average = find_callback(trainer, StudentEMA)
        features = find_callback(trainer, FeatureCache)
        datamodule = speech_data(trainer)
        model = {key: module.hparams[key] for key in ("student", "objective", "optimizer", "seed")}
        return {
            "growth": stacking.settings if stacking else {},
            "ema": average.settings if average else {},
            "feature_cache": {"dtype": features.dtype} if features else {},
            "model": decisive(model),
            "teacher": teacher_digest(module.teacher),
            "data": datamodule.fingerprint() if datamodule is not None else {},
            "waveforms": {"normalize": module.teacher.normalize, "sample_rate": module.teacher.sample_rate},
            "trainer": {name: _plain(getattr(trainer, name)) for name in TRAINER},
            "cuda": {"float32": module.cuda_settings.float32},
            "teacher_settings": {
                key: value
                for key, value in module.teacher.init_args.items()
                if key not in COMPUTE_ONLY_SETTINGS | SETTINGS_COVERED_ELSEWHERE
            },
            "steps": {
                "per_epoch": module.steps_per_epoch() if datamodule is not None else None,
                "total": module.total_steps,
            },
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("interstack", {})["fingerprint"] = self.fingerprint(trainer, pl_module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A callback's own hook runs after the weights are loaded. Those of another student or teacher would fail
        # before it, with an error about shapes instead of settings.
        if stage == "fit" and isinstance(pl_module, DistillationModule):
            pl_module.check_checkpoint_with(partial(self.check, trainer, pl_module))

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse ``checkpoint`` if it belongs to another run; one without a fingerprint passes.

        Raises:
            InputError: a setting differs. The message names each with both values, and how to start a new run.
        """
        path, depth = Path(trainer.ckpt_path or ""), state_dict_depth(checkpoint["state_dict"], STUDENT_PREFIX)
        anew = (
            f"A new run, with a schedule of its own, starts from these weights by --model.init_from {path} and another "
            f"--name (--growth.policy none, or a policy whose first stage has {depth} layers)"
        )
        saved = checkpoint.get("interstack", {}).get("fingerprint")
        if not self.allow_config_change and saved is not None:
            if "model" in saved:
                saved = saved | {"model": decisive(saved["model"])}  # which an earlier version may have left in
            current = {part: value for part, value in self.fingerprint(trainer, pl_module).items() if part in saved}
            if changed := differences(saved, current):
                raise InputError(
                    f"this checkpoint belongs to another run: {'; '.join(changed)}. Resume with the settings that made "
                    f"it, or pass --allow-config-change. {anew}"
                )
        loops = checkpoint.get("loops")  # missing in a checkpoint of weights alone, which Lightning refuses later
        done = loops["fit_loop"]["epoch_progress"]["current"]["processed"] if loops else 0
        if done >= (trainer.max_epochs or 0):
            finished = f"{path} is of a finished run of {done} epochs: nothing is left to train. {anew}"
            if Path(trainer.default_root_dir).resolve() not in path.resolve().parents:
                raise InputError(finished)
            _tell(finished)
