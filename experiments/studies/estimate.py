"""Estimate the cost of a plan: FLOPs by formula, seconds by a stated rate, disk by the number of weights."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, HubertConfig, HubertModel, PretrainedConfig, WhisperConfig

from callbacks.hardware import machine
from datamodules.audio import SAMPLE_RATE
from datamodules.corpus import TRAIN_SPLITS_960H, audio_below
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.target_cache import TargetCache
from experiments.corpora.pretrain_teacher import pretrain_teacher
from experiments.records.accounting import Growth, hears_30_seconds, run_flops, step_cost
from experiments.studies.job import Workspace, is_done
from experiments.studies.matching import matched
from experiments.studies.plan import Job, Plan
from experiments.superb.options import PROBE_UPDATES
from experiments.training.defaults import default_of, max_epochs
from lightning_modules.architectures import build_model
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.pretraining import PretrainingConfig
from lightning_modules.pretraining import hubert_config as pretraining_config
from lightning_modules.student_config import StudentConfig, hubert_config
from lightning_modules.superb.recipes import TASK_RECIPES

LIBRISPEECH_UTTERANCES = 281_241
# Mean seconds of an utterance: in LibriSpeech, and in the synthetic corpus after cropping to its batch's shortest.
MEAN_SECONDS = {"root": 12.3, "corpus": 3.0}
GPU_RATE = 4e13
"""FLOP/s of a training step on one GPU, assumed: a careful 4 % of an H100's peak in bf16. Not measured."""
CPU_RATE = 4e10
"""FLOP/s of a quick start's training step on two x86_64 cores, measured."""
CPU_SECONDS = {"corpus": 2.0, "teacher": 3.0, "export": 3.5, "evaluate": 4.0, "similarity": 8.0}
"""Seconds of a mini study's other jobs on two x86_64 cores, measured, with the start of the process."""
CPU_STEP_SECONDS = {"teacher": 0.16, "evaluate": 0.05}
"""Seconds of each of their steps, also of a mini study's; steps on longer speech take longer."""
REFERENCE_STEP = 0.15
"""Seconds of the step of :func:`measured_slowness` on that machine."""
WHISPER_SIZES = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24), "large": (1280, 32)}
"""Width and layers of the encoders of ``openai/whisper-*``."""
CPU_START = 10.0
"""Seconds before the first step of a distillation and after its last, validation and checkpoints included."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one job; ``seconds`` are on one device."""

    flops: float = 0.0
    seconds: float = 0.0
    disk_bytes: float = 0.0


class Estimator:
    """Estimates for the jobs of a plan.

    Args:
        plan: the jobs.
        on_gpu: whether they will run on GPUs.
        slowness: seconds that this machine takes for one of the machine that the constants were measured on; it does
            not change an estimate for GPUs.
    """

    def __init__(self, plan: Plan, on_gpu: bool, slowness: float = 1.0) -> None:
        self.plan, self.on_gpu, self.slowness = plan, on_gpu, slowness
        self._utterances: int | None = None

    def of(self, job: Job) -> Estimate:
        """Estimate one job; FLOPs are counted for distillation only, since all else is small or not comparable."""
        if job.kind != "distil":
            return Estimate(seconds=0.0 if self.on_gpu else self.slowness * _seconds_of_others(job))
        flops, settings = self._flops(job)
        student = StudentConfig(**settings.get("model", {}).get("student", {}))
        # Without the teacher's convolutions, which hardly count.
        weights = _parameters(hubert_config(replace(student, feature_projection=True), None), student.architecture)
        # Checkpoints hold weights and two moments: the last one, the newest one and one of each stage.
        disk = weights * 4 * 3 * 3 + weights * 4
        seconds = flops / GPU_RATE + CPU_START if self.on_gpu else self.slowness * (flops / CPU_RATE + CPU_START)
        return Estimate(flops, seconds, disk)

    def _flops(self, job: Job) -> tuple[float, Mapping[str, Any]]:
        settings = job.settings
        if job.match:
            target, reference = (self._flops(self.plan.jobs[job.match[part]])[0] for part in ("target", "reference"))
            settings = matched(settings, target / reference)  # seconds are assumed proportional to FLOPs
        model, data = settings.get("model", {}), settings.get("data", {})
        student, objective = StudentConfig(**model.get("student", {})), ObjectiveConfig(**model.get("objective", {}))
        epochs = max_epochs(settings)
        growth = Growth.of(settings.get("growth", {}), student.num_layers, epochs)
        longest = data.get("max_samples", default_of(LibriSpeechDataModule, "max_samples"))
        samples = min(longest, round(MEAN_SECONDS[self.plan.study.data] * SAMPLE_RATE))
        batch_size = data.get("batch_size") or default_of(LibriSpeechDataModule, "batch_size")
        if seconds := data.get("batch_seconds"):
            batch_size = max(1, round(seconds * SAMPLE_RATE / samples))
        per_epoch = (data.get("batches_per_epoch") or self._corpus_size(data) // batch_size) * batch_size
        cache, targets = self.plan.study.cache_of(self.plan.study.row(job.row)), data.get("targets")
        cached = cache != "none" or targets is not None
        features = cache == "features" or (Path(targets or "nowhere").is_dir() and TargetCache(targets).has_features)
        cost = step_cost(self._teacher(), student, objective, samples, cached, hears_30_seconds(model), features)
        return run_flops(cost, growth.stages, [epochs * per_epoch for epochs in growth.epochs])[-1], settings

    def _corpus_size(self, data: Mapping[str, Any]) -> int:
        if self.plan.inputs.root is None:
            return LIBRISPEECH_UTTERANCES
        if self._utterances is None:
            root, splits = Path(self.plan.inputs.root), data.get("train_splits") or TRAIN_SPLITS_960H
            folders = [folder for split in splits for folder in root.rglob(split)] or [root]
            self._utterances = sum(1 for folder in folders for _ in audio_below(str(folder)))
        return self._utterances

    def _teacher(self) -> Any:
        settings: dict[str, Any] = self.plan.teacher_settings
        if "model" not in settings:
            return pretraining_config(PretrainingConfig(**(settings.get("recipe") or {})))
        return teacher_config(settings["model"])


def teacher_config(model: str) -> PretrainedConfig:
    """Configuration of the teacher in a folder or in the cache of the hub, without a download.

    Of other hub names only Whisper's sizes are known; the rest are counted as HuBERT Base.
    """
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except OSError:
        size = re.match(r"openai/whisper-(\w+)", model)
    if size is None or size[1] not in WHISPER_SIZES:
        return HubertConfig()
    width, layers = WHISPER_SIZES[size[1]]
    return WhisperConfig(d_model=width, encoder_layers=layers, encoder_ffn_dim=4 * width)


def _seconds_of_others(job: Job) -> float:
    """Seconds of a job that distils nothing, by the number of its steps if it has any."""
    steps = 0
    if job.kind == "teacher":
        steps = job.settings.get("steps", default_of(pretrain_teacher, "steps"))
    elif job.kind == "evaluate":
        task, _, probe = job.task.partition("_")
        steps = job.settings.get("updates", PROBE_UPDATES if probe else TASK_RECIPES[task].updates)
    return CPU_SECONDS.get(job.kind, 0.0) + CPU_STEP_SECONDS.get(job.kind, 0.0) * steps


def _parameters(config: HubertConfig, architecture: str | None) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config.to_dict(), architecture).parameters())


def measured_slowness(steps: int = 6) -> float:
    """Time training steps of a small model here; 1 is the machine that the constants above were measured on.

    The model is the quick start's teacher. The fastest of a few steps counts, since other work only adds time.
    """
    config = PretrainingConfig()
    with torch.random.fork_rng(devices=[]):
        model = HubertModel(pretraining_config(config)).train()
        waveforms_BT = torch.randn(config.batch_size, round(config.crop_seconds * SAMPLE_RATE))
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            model(waveforms_BT).last_hidden_state.square().mean().backward()
            seconds.append(time.perf_counter() - started)
    return min(seconds) / REFERENCE_STEP


def estimate_table(plan: Plan, workspace: Workspace, slowness: float | None = None) -> Table:
    """Make a table of jobs, FLOPs, time and disk by row; finished jobs have no further cost.

    ``slowness`` is that of :class:`Estimator` if this machine was measured.
    """
    asked = {job.settings.get("trainer", {}).get("accelerator") for job in plan.distil.values()}
    paper = plan.study.data == "root" and "model" in plan.teacher_settings
    on_gpu = asked != {"cpu"} and (torch.cuda.is_available() or "gpu" in asked or paper)
    estimator, unit = Estimator(plan, on_gpu, slowness or 1.0), "GPU hours" if on_gpu else "seconds"
    table = Table("row", "jobs", "done", "PFLOP", unit, "disk, MB", title=f"{plan.study.name}: what is left to do")
    rows: dict[str, list[float]] = {}
    for job in plan.to_run:
        counts = rows.setdefault(job.row or "shared", [0, 0, 0.0, 0.0, 0.0])
        done = is_done(workspace.output, job.id)
        cost = Estimate() if done else estimator.of(job)
        added = (1, done, cost.flops / 1e15, cost.seconds / (3600 if on_gpu else 1), cost.disk_bytes / 1e6)
        rows[job.row or "shared"] = [old + new for old, new in zip(counts, added, strict=True)]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, (jobs, finished, flops, spent, disk) in rows.items():
        table.add_row(name, f"{jobs:.0f}", f"{finished:.0f}", f"{flops:.3g}", f"{spent:.1f}", f"{disk:.0f}")
    rate = f"{GPU_RATE:.0e} FLOP/s on one GPU, assumed" if on_gpu else f"{CPU_RATE:.0e} FLOP/s on two CPU cores"
    if slowness is not None and not on_gpu:
        rate = f"{CPU_RATE / slowness:.1e} FLOP/s, measured here"
    others = "" if on_gpu else "; other jobs roughly, with the seconds of a mini study"
    only = "FLOPs, GPU hours and disk" if on_gpu else "FLOPs and disk"
    table.caption = f"at {rate}; only distillation (its checkpoints) in {only}{others}; this machine: {machine()}"
    return table
