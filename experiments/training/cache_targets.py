"""``interstack cache-targets``: write the teacher's outputs for a run's fixed segments to disk.

With ``--features true`` it writes the output of the student's frozen front end beside them. The command takes the
config files and options of ``interstack fit``, so that teacher, layers, front end, corpus and segments are those of the
run that will read the cache::

    interstack cache-targets --config interleave_equal --data.root CORPUS --data.crop fixed --output TARGETS
    interstack fit --config interleave_equal --data.root CORPUS --data.crop fixed --data.targets TARGETS
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer

from datamodules.batching import FixedSegments
from datamodules.cached_records import RecordLayout
from datamodules.errors import InputError
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.target_cache import MARKER, NOT_IN_OLDER_CACHES, VALIDATION, TargetCache
from datamodules.target_writing import Computed, TargetPlan, is_cached, plan_targets, room_for, write_targets
from experiments.training.cache_sizes import limit_speakers, reading_needs
from experiments.training.data_class import accepts
from experiments.training.fit import DistillationCLI
from lightning_modules.distillation import DistillationModule
from lightning_modules.initial_weights import load_front_end
from lightning_modules.target_normalization import TargetStatistics
from lightning_modules.teacher_identity import front_end_digest, teacher_settings


class TargetsTrainer(Trainer):
    """A trainer with the one subcommand that LightningCLI looks for."""

    def cache_targets(
        self,
        model: DistillationModule,
        datamodule: LibriSpeechDataModule,
        output: str,
        dtype: Literal["bf16", "int8"] = "bf16",
        features: bool | Literal["bf16", "int8", "float32"] = False,
        shard_megabytes: int = 1024,
        batch_seconds: float = 80.0,
        max_gb: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Store the teacher's outputs for the fixed segments of the training and the validation data.

        The same call continues an interrupted one and checks a finished cache against its checksums. The teacher runs
        in float32 on one device, whatever ``trainer.devices`` and ``trainer.precision`` are.

        Args:
            model: the run's module, for its teacher, layers and front end.
            datamodule: the run's data module.
            output: folder of the cache.
            dtype: bf16, or int8 with one scale per frame: half the size, a larger error (measured and printed).
            features: store the features of the student's frozen front end too, so that a run needs no audio and no
                convolution: true or bf16, int8 (one scale per frame), or float32, which is exact.
            shard_megabytes: maximum size of a file in MB, and the most work that an interrupt can lose.
            batch_seconds: seconds of audio per forward pass of the teacher; memory sets the limit.
            max_gb: largest size of the cache in GB, without small files; whole speakers are left out of the training
                data, in an order drawn from data.segment_seed, and a run that reads the cache trains without them.
            overwrite: replace a cache of another teacher, corpus or segments.
        """
        if self.global_rank:
            return  # only one process writes
        if shard_megabytes < 1 or batch_seconds <= 0:
            raise InputError(f"shard_megabytes={shard_megabytes} and batch_seconds={batch_seconds} must be positive")
        if max_gb is not None and max_gb <= 0:
            raise InputError(f"max_gb is {max_gb}; it must be positive, or null for no limit")
        if not isinstance(datamodule, LibriSpeechDataModule):
            raise InputError(
                f"cache-targets needs the fixed segments of LibriSpeechDataModule, which {type(datamodule).__name__} "
                "lacks: leave out --data"
            )
        if features and not model.student.frozen_front_end:
            raise InputError(
                "features=true stores the output of a front end that does not change, but model.student.front_end="
                f"{model.student.config.front_end}: set it to frozen or shared"
            )
        if model.masks is not None:
            model.masks.require_fixed()
        if model.init_from is not None:
            load_front_end(Path(model.init_from), model.student)
        datamodule.trainer = self
        datamodule.targets = None  # an older cache would limit the speakers
        datamodule.prepare_data()
        datamodule.setup()
        settings = CacheSettings(dtype, "bf16" if features is True else features or None, shard_megabytes)
        source = Source(model, datamodule, self.strategy.root_device, bool(features))
        batch_samples = int(batch_seconds * datamodule.sample_rate)
        folder = Path(output)
        speakers = None if max_gb is None else _limit(source, settings, max_gb)
        _write(folder, "train", settings, source, batch_samples, overwrite, speakers)
        if datamodule.val_splits:
            source.statistics_from(folder)
            _write(folder / VALIDATION, "val", settings, source, batch_samples, overwrite)


class TargetsCLI(DistillationCLI):
    """The command line of ``fit`` with the subcommand ``cache_targets`` instead."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(args, TargetsTrainer)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {"cache_targets": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if accepts(self._data_class, "run_dir"):
            self.config[self.subcommand].data.run_dir = None  # nothing is trained, so there is no run folder


class CacheSettings(NamedTuple):
    """Settings of a cache that do not come from the run."""

    dtype: str
    features: str | None
    shard_megabytes: int


class Source:
    """Computes targets, and features if asked, in float32 on ``device`` for batches of rows of one stage's data."""

    def __init__(
        self, model: DistillationModule, datamodule: LibriSpeechDataModule, device: torch.device, features: bool
    ) -> None:
        self.model, self.datamodule, self.device, self.features = model.to(device), datamodule, device, features
        model.teacher.to(device)
        model.cuda_settings.apply(device)

    @property
    def standardizes(self) -> bool:
        return self.model.objective.normalizer.kind == "standardize"

    def settle_statistics(self) -> np.ndarray:
        """Measure mean and deviation (2, S, D), and standardize the targets by them from now on."""
        statistics = self.model.measure_targets(self.datamodule, self.device)
        self.model.objective.normalizer.use(statistics)
        return torch.stack(list(statistics)).numpy()

    def statistics_from(self, folder: Path) -> None:
        """Standardize the targets as those in ``folder`` from now on."""
        if self.standardizes:
            statistics = TargetCache(str(folder)).statistics
            assert statistics is not None
            self.model.objective.normalizer.use(TargetStatistics(*statistics))

    @torch.no_grad()
    def compute(self, batches: Sequence[np.ndarray], stage: str) -> Iterator[Computed]:
        for batch in self.datamodule.segment_loader(batches, stage):
            moved = self.datamodule.transfer_batch_to_device(batch, self.device, 0)
            mask_BF = self.model.mask_of(moved) if stage == "train" else None  # validation has no masks
            targets = self.model.objective.normalizer(self.model.targets(moved, mask_BF))
            features_BFC = targets.features_BFC
            if self.features and features_BFC is None:
                waveforms_BT, _ = self.model.inputs(moved)
                features_BFC = self.model.student.features(waveforms_BT)
            stacked_SBFD = torch.stack([targets.output_BFD, *targets.hidden.values()]).float()
            yield Computed(stacked_SBFD, features_BFC if self.features else None)


def _limit(source: Source, settings: CacheSettings, max_gb: float) -> Sequence[str] | None:
    """Leave out speakers until both parts of the cache fit, and tell how many; the speakers that are kept."""
    model, datamodule = source.model, source.datamodule
    layout = RecordLayout.of(_made_with(model, datamodule, "train", settings))

    def num_bytes(stage: str = "train") -> int:
        return int(layout.num_bytes(_num_frames(model, datamodule.segments(stage))).sum())

    validation = num_bytes("val") if datamodule.val_splits else 0
    speakers, kept = limit_speakers(datamodule, max_gb * 1e9 - validation, num_bytes)
    print(f"max_gb={max_gb:g}: {kept}")
    return speakers


def _num_frames(model: DistillationModule, segments: FixedSegments) -> np.ndarray:
    return model.teacher.num_frames(torch.from_numpy(segments.num_samples)).numpy()


def _write(
    folder: Path,
    stage: str,
    settings: CacheSettings,
    source: Source,
    batch_samples: int,
    overwrite: bool,
    speakers: Sequence[str] | None = None,
) -> None:
    """Write the cache of one stage's data, and tell its sizes before and its errors after."""
    model, datamodule = source.model, source.datamodule
    made_with = _made_with(model, datamodule, stage, settings)
    segments = datamodule.segments(stage)
    layout, num_frames = RecordLayout.of(made_with), _num_frames(model, segments)
    plan = plan_targets(segments, num_frames, layout, settings.shard_megabytes * 10**6)
    print(_description(model, datamodule, plan, stage, settings))
    if is_cached(folder, made_with, overwrite):
        print(f"{folder} is finished, and every file has its checksum")
        return
    print(f"{folder}: {room_for(folder, plan) / 1e9:.2f} GB free", flush=True)
    measured = source.settle_statistics if source.standardizes and stage == "train" else None
    compute = partial(source.compute, stage=stage)
    errors = write_targets(folder, made_with, plan, compute, batch_samples, measured, speakers)
    found = ", ".join(f"{name} {100 * error:.3f} %" for name, error in errors.items())
    print(f"{folder / MARKER}: relative L2 error of rounding: {found}")


def _made_with(
    model: DistillationModule, datamodule: LibriSpeechDataModule, stage: str, settings: CacheSettings
) -> dict[str, Any]:
    normalization = model.objective.normalizer.settings
    front_end = {
        "features": settings.features,
        "features_width": model.student.hubert.config.conv_dim[-1],
        "student.front_end_weights": front_end_digest(model.student.hubert),
    }
    return {
        "layers": list(model.teacher.hidden_layers),
        "width": model.teacher.hidden_size,
        "dtype": settings.dtype,
        "shard_megabytes": settings.shard_megabytes,
        **(front_end if settings.features else {}),
        **teacher_settings(model.teacher),
        **({} if normalization.items() <= NOT_IN_OLDER_CACHES.items() else normalization),
        **({} if model.masks is None else model.masks.settings),
        **datamodule.segment_settings(stage),
    }


def _description(
    model: DistillationModule,
    datamodule: LibriSpeechDataModule,
    plan: TargetPlan,
    stage: str,
    settings: CacheSettings,
) -> str:
    teacher, seconds = model.teacher, float(plan.num_samples.sum() / datamodule.sample_rate)
    layers = f"layer {teacher.output_layer} (output)"
    if teacher.hidden_layers:
        layers += f" and {', '.join(map(str, teacher.hidden_layers))}"
    types = settings.dtype + (f", features in {settings.features}" if settings.features else "")
    data = "training" if stage == "train" else "validation"
    return (
        f"{data} data, {teacher.init_args.get('model', type(teacher).__name__)}: {layers}, width "
        f"{teacher.hidden_size}\n{len(plan.rows)} segments, {seconds / 3600:.2f} h, {plan.num_frames.sum()} frames: "
        f"{plan.num_bytes / 1e9:.2f} GB in {types}, {len(plan.shards)} files"
        + (f"\n{reading_needs(plan.num_bytes, seconds)}" if stage == "train" else "")
    )
