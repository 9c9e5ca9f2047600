"""``interstack cache-targets``: write the teacher's outputs for a run's fixed segments to disk.

The command takes the config files and options of ``interstack fit``, so that teacher, layers, corpus and segments are
those of the run that will read the cache::

    interstack cache-targets --config interleave_equal --data.root CORPUS --data.crop fixed --output TARGETS
    interstack fit --config interleave_equal --data.root CORPUS --data.crop fixed --data.targets TARGETS
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules.errors import InputError
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.target_cache import MARKER, NOT_IN_OLDER_CACHES
from datamodules.target_writing import TargetPlan, is_cached, plan_targets, room_for, write_targets
from experiments.training.data_class import accepts
from experiments.training.fit import DistillationCLI
from lightning_modules.distillation import DistillationModule
from lightning_modules.teacher_identity import teacher_settings


class TargetsTrainer(Trainer):
    """A trainer with the one subcommand that LightningCLI looks for."""

    def cache_targets(
        self,
        model: DistillationModule,
        datamodule: LibriSpeechDataModule,
        output: str,
        dtype: Literal["bf16", "int8"] = "bf16",
        shard_megabytes: int = 1024,
        batch_seconds: float = 80.0,
        overwrite: bool = False,
    ) -> None:
        """Store the teacher's outputs for fixed segments. The same call continues an interrupted one and checks a
        finished cache against its checksums.

        The teacher runs in float32 on one device, whatever ``trainer.devices`` and ``trainer.precision`` are.

        Args:
            model: the run's module, for its teacher and layers.
            datamodule: the run's data module, for its training data.
            output: folder of the cache.
            dtype: bf16, or int8 with one scale per frame: half the size, a larger error (measured and printed).
            shard_megabytes: maximum size of a file in MB, and the most work that an interrupt can lose.
            batch_seconds: seconds of audio per forward pass of the teacher; memory sets the limit.
            overwrite: replace a cache of another teacher, corpus or segments.
        """
        if self.global_rank:
            return  # only one process writes
        if shard_megabytes < 1 or batch_seconds <= 0:
            raise InputError(f"shard_megabytes={shard_megabytes} and batch_seconds={batch_seconds} must be positive")
        if not isinstance(datamodule, LibriSpeechDataModule):
            raise InputError(
                f"cache-targets needs the fixed segments of LibriSpeechDataModule, which {type(datamodule).__name__} "
                "lacks: leave out --data"
            )
        datamodule.trainer = self
        datamodule.prepare_data()
        datamodule.setup()
        folder, layers = Path(output), list(model.teacher.hidden_layers)
        made_with = _made_with(model, datamodule, layers, dtype, shard_megabytes)
        plan = plan_targets(
            datamodule.segments,
            model.teacher.num_frames(torch.from_numpy(datamodule.segments.num_samples)).numpy(),
            1 + len(layers),
            model.teacher.hidden_size,
            dtype,
            shard_megabytes * 10**6,
        )
        print(_description(model, datamodule, plan, dtype))
        if is_cached(folder, made_with, overwrite):
            print(f"{folder} is finished, and every file has its checksum")
            return
        print(f"{folder}: {room_for(folder, plan) / 1e9:.2f} GB free", flush=True)
        source = TeacherSource(model, datamodule, self.strategy.root_device)
        measured = source.settle_statistics if model.objective.normalizer.kind == "standardize" else None
        errors = write_targets(folder, made_with, plan, source, int(batch_seconds * datamodule.sample_rate), measured)
        found = ", ".join(f"{name} {100 * error:.3f} %" for name, error in errors.items())
        print(f"{folder / MARKER}: relative L2 error of {dtype}: {found}")


class TargetsCLI(DistillationCLI):
    """The command line of ``fit`` with the subcommand ``cache_targets`` instead."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(args, TargetsTrainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"cache_targets": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if accepts(self._data_class, "run_dir"):
            self.config[self.subcommand].data.run_dir = None  # nothing is trained, so there is no run folder


class TeacherSource:
    """Computes targets (S, B, F, D) in float32 on ``device`` for batches of rows."""

    def __init__(self, model: DistillationModule, datamodule: LibriSpeechDataModule, device: torch.device) -> None:
        self.model, self.datamodule, self.device = model.to(device), datamodule, device
        model.teacher.to(device)
        model.cuda_settings.apply(device)

    def settle_statistics(self) -> np.ndarray:
        """Measure mean and deviation (2, S, D), and standardize the targets by them from now on."""
        statistics = self.model.measure_targets(self.datamodule, self.device)
        self.model.objective.normalizer.use(statistics)
        return torch.stack(list(statistics)).numpy()

    @torch.no_grad()
    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for batch in self.datamodule.segment_loader(batches):
            moved = self.datamodule.transfer_batch_to_device(batch, self.device, 0)
            targets = self.model.objective.normalizer(self.model.targets(moved))
            yield torch.stack([targets.output_BFD, *targets.hidden.values()]).float()


def _made_with(
    model: DistillationModule, datamodule: LibriSpeechDataModule, layers: list[int], dtype: str, shard_megabytes: int
) -> dict[str, Any]:
    normalization = model.objective.normalizer.settings
    return {
        "layers": layers,
        "width": model.teacher.hidden_size,
        "dtype": dtype,
        "shard_megabytes": shard_megabytes,
        **teacher_settings(model.teacher),
        **({} if normalization == NOT_IN_OLDER_CACHES else normalization),
        **datamodule.segment_settings(),
    }


def _description(model: DistillationModule, datamodule: LibriSpeechDataModule, plan: TargetPlan, dtype: str) -> str:
    teacher, hours = model.teacher, plan.num_samples.sum() / datamodule.sample_rate / 3600
    layers = f"layer {teacher.output_layer} (output)"
    if teacher.hidden_layers:
        layers += f" and {', '.join(map(str, teacher.hidden_layers))}"
    return (
        f"{teacher.init_args.get('model', type(teacher).__name__)}: {layers}, width {teacher.hidden_size}\n"
        f"{len(plan.rows)} segments, {hours:.2f} h, {plan.num_frames.sum()} frames: {plan.num_bytes / 1e9:.2f} GB in "
        f"{dtype}, {len(plan.shards)} files"
    )
