"""FeatureCache: store the output of a front end once a growth has frozen it, and read it from then on."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.stop_signals import signals_of
from datamodules.cached_records import FEATURES_ALONE, RecordLayout
from datamodules.data_settings import require_fixed
from datamodules.errors import InputError, numbered
from datamodules.folders import is_finished
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.speech_data import speech_data
from datamodules.target_cache import MARKER
from datamodules.target_writing import Computed, plan_targets, room_for, write_targets
from lightning_modules.distillation import DistillationModule
from lightning_modules.teacher_identity import front_end_digest

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A signal has come while features were written."""


class FeatureCache(Callback):
    """Store the output of a front end that is trained until the first growth, and read it in every later epoch.

    With ``model.student.front_end=trained_until_growth`` the convolutions give the same numbers in every epoch after
    the first growth. With cached targets (``data.targets``) the run then needs neither audio nor convolutions.

    Acts: after a growth, and at the start of a resumed run. Rank zero computes the features of all fixed segments in
    float32 and writes them to ``RUN/features``; the others wait. A signal that stops the run breaks the writing off,
    and the next start continues it. Features that are finished are used as they are. The clock of the run goes on,
    since this is part of the run's cost; of a writing that was broken off only the last attempt counts.

    Refuses: another kind of front end or data module, random crops, and students that share their batches.

    Args:
        dtype: type of the stored features: bf16, int8 with one scale per frame, or float32, which is exact.
        batch_seconds: seconds of audio per forward pass of the front end; memory sets the limit.
        shard_megabytes: maximum size of a file in MB, and the most work that an interrupt can lose.
    """

    def __init__(
        self,
        dtype: Literal["bf16", "int8", "float32"] = "bf16",
        batch_seconds: float = 80.0,
        shard_megabytes: int = 1024,
    ) -> None:
        if dtype not in ("bf16", "int8", "float32") or batch_seconds <= 0 or shard_megabytes < 1:
            raise InputError(
                f"FeatureCache has dtype={dtype}, batch_seconds={batch_seconds} and shard_megabytes={shard_megabytes}: "
                "dtype must be bf16, int8 or float32, the others positive"
            )
        self.dtype, self.batch_seconds, self.shard_megabytes = dtype, batch_seconds, shard_megabytes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = speech_data(trainer)
        kind = pl_module.student.config.front_end if isinstance(pl_module, DistillationModule) else "none"
        if kind != "trained_until_growth":
            raise InputError(
                f"FeatureCache needs model.student.front_end=trained_until_growth, not {kind}: the features of a front "
                "end that is frozen from the start are stored by `interstack cache-targets --features true`"
            )
        if not isinstance(data, LibriSpeechDataModule) or data.relay is not None:
            raise InputError(
                "FeatureCache needs LibriSpeechDataModule, and a run of its own, not one of fit-together, whose "
                "students share their batches"
            )
        require_fixed(data.crop, data.length)
        if data.on_bad_audio == "skip" and data.targets is None:
            raise InputError(
                "FeatureCache computes the features of every segment, so data.on_bad_audio=skip needs cached targets "
                "(data.targets), which exist only where all can be decoded"
            )

    # The loaders of a resumed run, and their workers, exist before its training starts.
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.store(trainer, pl_module)

    def store(self, trainer: L.Trainer, module: DistillationModule) -> None:
        """Make the features of the frozen front end if they are missing, and read them from now on.

        The growing callback calls this whenever it has made sure of the student's depth.
        """
        data = speech_data(trainer)
        if not module.student.frozen_front_end or not isinstance(data, LibriSpeechDataModule) or data.reads_features:
            return
        folder, stopped, failure = Path(trainer.default_root_dir) / "features", False, None
        with _InfiniteBarrier():  # of a large corpus the features take longer than a collective may
            if trainer.is_global_zero:
                try:
                    for stage, part in data.stage_folders(folder):
                        self._write(part, stage, data, module)
                except _Stopped:
                    stopped = True
                except Exception as error:  # is raised below, when the others no longer wait
                    failure = error
        stopped, elsewhere = trainer.strategy.broadcast((stopped, failure and _kind(failure)))
        if failure is not None:
            raise failure
        if elsewhere:
            raise _of_the_first(*elsewhere)
        if stopped:
            raise SIGTERMException
        data.use_features(folder)
        # A run that resumes exactly at the first growth has asked for its first batches already, without features. One
        # that resumes in the middle of an epoch comes here before its loader has been asked.
        if trainer.fit_loop.is_resuming and (fetcher := trainer.fit_loop._data_fetcher) is not None:
            iter(fetcher)

    def _write(self, folder: Path, stage: str, data: LibriSpeechDataModule, module: DistillationModule) -> None:
        made_with: dict[str, Any] = {
            "layers": [],
            "width": 0,
            "dtype": FEATURES_ALONE,
            "features": self.dtype,
            "features_width": module.student.hubert.config.conv_dim[-1],
            "student.front_end_weights": front_end_digest(module.student.hubert),
            "shard_megabytes": self.shard_megabytes,
            "teacher.normalize": module.teacher.normalize,
            **data.segment_settings(stage),
        }
        if is_finished(folder, MARKER, made_with, overwrite=True):
            return
        segments = data.segments(stage)
        num_frames = module.student.num_frames(torch.from_numpy(segments.num_samples)).numpy()
        plan = plan_targets(segments, num_frames, RecordLayout.of(made_with), self.shard_megabytes * 10**6)
        room_for(folder, plan)
        log.info("features of the %s data: %.2f GB in %s, into %s", stage, plan.num_bytes / 1e9, self.dtype, folder)
        source = partial(compute_features, data=data, module=module, stage=stage)
        write_targets(folder, made_with, plan, source, int(self.batch_seconds * data.sample_rate))


def _kind(failure: Exception) -> tuple[type[Exception], int | None]:
    """What decides the exit status of a process with this error: its class, as far as that matters, and its number."""
    kind = next((kind for kind in (InputError, OSError) if isinstance(failure, kind)), RuntimeError)
    return kind, getattr(failure, "errno", None)


def _of_the_first(kind: type[Exception], number: int | None) -> Exception:
    """The error of the other processes, which is of the first one's kind: a job's script reads the highest status."""
    text = "the first process could not write the features: its error says why"
    return numbered(text, number) if kind is OSError else kind(text)


@torch.no_grad()
def compute_features(
    batches: Sequence[np.ndarray], data: LibriSpeechDataModule, module: DistillationModule, stage: str
) -> Iterator[Computed]:
    """Compute the features of batches of segments in float32; a signal that stops the run ends it between batches."""
    for batch in data.segment_loader(batches, stage):
        if (signals := signals_of(module.trainer)) is not None and signals.received:
            log.warning("a signal stops the run while it writes features: continue with --ckpt_path last")
            raise _Stopped
        moved = data.transfer_batch_to_device(batch, module.device, 0)
        waveforms_BT, _ = module.inputs(moved)
        with torch.autocast(module.device.type, enabled=False):
            yield Computed(None, module.student.features(waveforms_BT))
