"""LibriSpeech, or any corpus in its layout: manifest, length-bucketed batches, resumable loaders.

The corpus (960 h, the three train splits) is read in place; see :mod:`datamodules.corpus` for the layout. Its table is
built once and cached (:mod:`datamodules.manifest`). :mod:`datamodules.batching` assigns utterances to optimizer steps,
and :mod:`datamodules.loading` decodes them.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batching import (
    BatchPlan,
    CropRule,
    FixedSegments,
    GlobalBatchSampler,
    fix_segments,
    middle_rows,
    plan_by_samples,
    plan_by_utterances,
    segments_of_batches,
)
from datamodules.corpus import TRAIN_SPLITS_960H, CorpusSettings
from datamodules.data_settings import (
    ORDER_SETTINGS,
    SEGMENT_SETTINGS,
    VALIDATION_SETTINGS,
    check_settings,
    require_fixed,
)
from datamodules.download import download_missing
from datamodules.errors import InputError
from datamodules.loading import (
    SKIPPED_FILE,
    AudioBatch,
    AudioDataset,
    Relay,
    ResumableLoader,
    list_skipped,
    with_workers,
)
from datamodules.manifest import Manifest, load_manifest, prepare_manifest
from datamodules.placement import trains_on_cuda, workers_for
from datamodules.speaker_choice import of_cache, share
from datamodules.speech_data import SpeechDataModule, finished_epochs, validation_parts
from datamodules.target_cache import VALIDATION, TargetCache, open_caches

__all__ = ["AudioBatch", "LibriSpeechDataModule"]

logger = logging.getLogger(__name__)


class LibriSpeechDataModule(SpeechDataModule):
    """Batches of speech for distillation.

    Args:
        root: folder with the splits (LibriSpeech/) or its parent; several may be given.
        train_splits: folders to train on.
        val_splits: folders to validate on; may be empty.
        sample_rate: sample rate of the waveforms in Hz.
        batch_size: utterances per optimizer step, over all ranks and accumulation steps.
        batch_seconds: most seconds of audio per optimizer step, padding included; needs ``batch_size: null``.
        length: ``crop`` every item to the shortest of its global batch (no padding), or ``pad`` to the longest.
        crop: ``random`` takes crops at positions that change with the epoch. ``fixed`` takes one segment of each
            utterance for the whole run, as long as the shortest of its bucket. This is another recipe, but with it
            teacher targets can be cached.
        segment_seed: random seed of the positions of fixed segments. It is separate from ``seed``, so that runs of
            several seeds share the segments.
        segments_per_utterance: number of fixed segments of each utterance, all of one length. Passes over the corpus
            take them in turn. A cache of targets grows in proportion.
        targets: folder of teacher targets made by ``interstack cache-targets``, read instead of running the teacher;
            needs fixed segments. If it has the features of the student's frozen front end, they are read instead of
            audio. If it is limited to some speakers, the run trains on these alone. ``on_bad_audio="skip"`` then leaves
            out only files whose header shows that they cannot be used.
        length_grid: round the length that a batch is cropped to down to a multiple of this number of samples; 1 does
            not round. With fewer lengths a GPU plans and compiles less. 1600 gives at most 156 lengths and loses less
            than 1 % of the audio.
        max_samples: largest number of samples of an utterance; longer ones are cropped.
        min_samples: smallest number of samples of a file; shorter ones are bad audio. 400 samples make one frame.
        resample: convert files of another rate or several channels (to their mean) instead of treating them as bad.
        on_bad_audio: ``error`` stops at the first bad file; ``skip`` leaves bad files out, counts them and lists them
            in ``skipped_audio.tsv`` in the run's folder.
        batches_per_epoch: optimizer steps of a virtual epoch; by default an epoch is one pass over the corpus.
        val_batch_size: utterances per validation batch over all ranks; by default as in training.
        num_workers: loader processes per rank. The default is 2; on a GPU it is the number of cores per process minus
            one, from 2 to 8.
        download: download missing splits through torchaudio.
        cache_dir: folder of the cached manifests; by default interstack/ in $XDG_CACHE_HOME or ~/.cache.
        seed: random seed of the order of batches and the positions of random crops.
        run_dir: folder for the list of skipped audio; ``interstack fit`` sets it to the run's folder.

    Attributes:
        relay: makes the relay of the ``train`` and of the ``val`` loader if several data modules with equal
            settings share their micro-batches; ``None``: each loads its own.

    Raises:
        InputError: settings contradict each other; from ``prepare_data``, a split is missing or empty, or audio is
            bad; from the loaders, global batches are too small for the number of processes.
    """

    def __init__(
        self,
        root: str | list[str],
        train_splits: Sequence[str] = TRAIN_SPLITS_960H,
        val_splits: Sequence[str] = ("dev-clean",),
        sample_rate: int = 16000,
        batch_size: int | None = 64,
        batch_seconds: float | None = None,
        length: Literal["crop", "pad"] = "crop",
        crop: Literal["random", "fixed"] = "random",
        segment_seed: int = 0,
        segments_per_utterance: int = 1,
        targets: str | None = None,
        length_grid: int = 1,
        max_samples: int = 250_000,
        min_samples: int = 400,
        resample: bool = False,
        on_bad_audio: Literal["error", "skip"] = "error",
        batches_per_epoch: int | None = None,
        val_batch_size: int | None = None,
        num_workers: int | None = None,
        download: bool = False,
        cache_dir: str | None = None,
        seed: int = 0,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.roots = tuple(os.fspath(path) for path in ([root] if isinstance(root, str | os.PathLike) else root))
        self.train_splits, self.val_splits = tuple(train_splits), tuple(val_splits)
        self.sample_rate, self.resample = sample_rate, resample
        self.batch_size, self.batch_seconds, self.val_batch_size = batch_size, batch_seconds, val_batch_size
        self.length, self.max_samples, self.min_samples = length, max_samples, min_samples
        self.crop, self.segment_seed, self.targets, self.length_grid = crop, segment_seed, targets, length_grid
        self.segments_per_utterance = segments_per_utterance
        self.on_bad_audio, self.run_dir = on_bad_audio, run_dir
        self.batches_per_epoch, self.seed = batches_per_epoch, seed
        self.num_workers, self.download, self.cache_dir = num_workers, download, cache_dir
        self.relay: Callable[[str], Relay] | None = None
        self._manifests: dict[str, Manifest] = {}
        self._plans: dict[str, BatchPlan] = {}
        self._loaders: dict[str, ResumableLoader] = {}
        self._caches: dict[str, TargetCache] = {}
        self._features: dict[str, TargetCache] = {}
        check_settings(vars(self))

    def prepare_data(self) -> None:
        """Download missing splits if ``download`` is set, and update the manifests.

        Lightning runs this on one process per node, inside a barrier without a timeout (its
        ``_InfiniteBarrier``), so that the others wait for the manifest of a large corpus as long as needed.
        """
        for stage in self._stages():
            if self.download:
                download_missing(self.roots, self._splits(stage))
            prepare_manifest(self._corpus(stage), self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        for part in self._stages():
            self._use(part, load_manifest(self._corpus(part), self.cache_dir))
            self._report_skipped(part, self._manifests[part])
        whole = self.train_manifest
        if self.targets is not None and (kept := of_cache(whole, self.targets)) is not whole:
            self.train_on(kept)
            if self.trainer is None or self.trainer.is_global_zero:
                text = share(kept, whole, self.sample_rate)
                logger.info("training on the speakers of the cache %s alone: %s", self.targets, text)

    @property
    def train_manifest(self) -> Manifest:
        """The utterances to train on; known after ``setup``."""
        return self._require("train", self._manifests)

    def train_on(self, manifest: Manifest) -> None:
        """Train on these utterances alone."""
        self._use("train", manifest)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same for any number of processes; known after ``setup``."""
        return self.batches_per_epoch or self._require("train", self._plans).num_batches

    @property
    def without_transcript(self) -> int | None:
        """Number of utterances without text in splits with texts; ``None`` if there are none. Texts are not needed."""
        counts = [manifest.without_transcript for manifest in self._manifests.values()]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def use_targets(self, teacher: Mapping[str, Any], layers: Sequence[int], features: bool = False) -> None:
        """Add the cached targets of these hidden layers to batches; the module calls this in its ``setup``.

        Validation reads its part of the cache if that was made with the same settings; else the teacher runs there.

        Args:
            teacher: settings of the teacher.
            layers: hidden layers.
            features: add the features of the front end as well, if the cache has them.

        Raises:
            InputError: the cache in ``targets`` was made with another teacher, corpus or segments.
        """
        assert self.targets is not None
        settings = {stage: {**teacher, **self.segment_settings(stage)} for stage in self._stages()}
        self._caches = open_caches(self.targets, settings, layers, features)

    @property
    def cached_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation with which the cached targets were standardized; ``None`` if they were not."""
        return self._caches["train"].statistics if self._caches else None

    @property
    def cached_front_end(self) -> str | None:
        return self._caches["train"].front_end if self._caches else None

    @property
    def reads_features(self) -> bool:
        return super().reads_features or bool(self._features)

    def stage_folders(self, folder: Path) -> list[tuple[str, Path]]:
        """Folders of the parts of a cache, by the data that they are of."""
        return [(stage, folder if stage == "train" else folder / VALIDATION) for stage in self._stages()]

    def use_features(self, folder: Path) -> None:
        """Add the features in ``folder`` to the batches of every epoch that begins from now on."""
        for stage, part in self.stage_folders(folder):
            self._features[stage] = TargetCache(str(part))
            if stage in self._loaders:
                cast(AudioDataset, self._loaders[stage].dataset).features = self._features[stage]

    def statistics_batches(self, seconds: float) -> Iterator[AudioBatch]:
        """Single utterances of ``seconds`` in all, spread evenly over the training data, each read from its start."""
        rule, dataset = self._crop_rule("train", seed=None), self._dataset("train")
        taken_N = np.minimum(rule.num_samples, self.max_samples)
        count = min(len(taken_N), -(-int(seconds * self.sample_rate) // int(taken_N.mean())))
        for row in np.linspace(0, len(taken_N) - 1, count).astype(np.int64):
            yield dataset[rule.resolve(np.array([row]), pass_index=0)]

    def segment_settings(self, stage: str = "train") -> dict[str, Any]:
        """Plain values that determine the fixed segments; they do not depend on the path of the corpus."""
        require_fixed(self.crop, self.length)
        manifest, segments = self._require(stage, self._manifests), self.segments(stage)
        names = SEGMENT_SETTINGS if stage == "train" else VALIDATION_SETTINGS
        return {
            "data.rows": len(manifest),
            "data.row_hash": manifest.row_hash,
            **{f"data.{name}": getattr(self, name) for name in names},
            # Settings that are not in older caches.
            **({"data.length_grid": self.length_grid} if self.length_grid > 1 else {}),
            **({"data.segments_per_utterance": segments.num_places} if segments.num_places > 1 else {}),
            "data.segments": segments.digest,
        }

    def segment_loader(self, batches: Sequence[np.ndarray], stage: str = "train") -> DataLoader[AudioBatch]:
        """Load these batches of segments once; a file that cannot be decoded is an error."""
        segments, manifest = self.segments(stage), self._require(stage, self._manifests)
        micro_batches: Any = [segments.take(batch) for batch in batches]
        return DataLoader(
            AudioDataset(manifest, self.sample_rate, self.resample),
            batch_sampler=micro_batches,
            pin_memory=trains_on_cuda(self.trainer),
            **with_workers(workers_for(self.num_workers, self.trainer)),
        )

    def segments(self, stage: str = "train") -> FixedSegments:
        """The segments of ``crop="fixed"``, or those of validation; known after ``setup``."""
        plan, lengths = self._require(stage, self._plans), self._require(stage, self._manifests).num_samples
        if stage == "val":
            return segments_of_batches(plan, self._crop_rule("val", seed=None))
        places = self.segments_per_utterance
        return fix_segments(plan, lengths, self.max_samples, self.length, self.segment_seed, self.length_grid, places)

    def train_dataloader(self) -> ResumableLoader:
        """Loader of ``steps_per_epoch * accumulate_grad_batches`` micro-batches per epoch for this rank."""
        trainer = self.trainer
        if self.targets is not None and not self._caches:
            raise InputError("data.targets is set, but this module trains without a teacher's targets: leave it out")
        sampler = GlobalBatchSampler(
            self._require("train", self._plans),
            self.segments() if self.crop == "fixed" else self._crop_rule("train", self.seed),
            seed=self.seed,
            steps_per_epoch=self.batches_per_epoch,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            epoch=finished_epochs(trainer),
        )
        return self._loader("train", sampler)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Loader of batches in order of length, cropped from the utterance's start, the same in every epoch."""
        if not self.val_splits:
            return []
        trainer, plan = self.trainer, self._require("val", self._plans)
        self.validation_parts = validation_parts(plan, trainer)
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        shares = {"rank": rank, "world_size": world_size, "accumulate": self.validation_parts}
        return self._loader("val", GlobalBatchSampler(plan, self._crop_rule("val", seed=None), **shares))

    def example_batch(self, num_items: int) -> AudioBatch:
        """``num_items`` training utterances around the median length (all, if fewer), cropped as in validation.

        They are read without a loader and without random numbers, and are the same in every call.
        """
        rows = self._require("train", self._plans).rows
        first = max(0, (len(rows) - num_items) // 2)
        batch = self._crop_rule("train", seed=None).resolve(rows[first : first + num_items], pass_index=0)
        return self._dataset("train")[batch]

    def growth_batch(self, num_items: int) -> AudioBatch:
        """Fixed segments of the middle bucket with their records; examples without a cache, or with masked targets."""
        if not self._caches or self._caches["train"].masked:
            return self.example_batch(num_items)
        rows = middle_rows(self._require("train", self._plans), num_items)
        return self._dataset("train", cached=True)[self.segments().resolve(rows, pass_index=0)]

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that determine the training data and their order, whatever the path of the corpus."""
        manifest = self._require("train", self._manifests)
        return {
            "train_splits": list(self.train_splits),
            "rows": len(manifest),
            "row_hash": manifest.row_hash,
            "skipped": len(manifest.skipped),
            **{name: getattr(self, name) for name in ORDER_SETTINGS},
            # Settings that are not used are left out, as in older checkpoints from before they existed.
            **({"length_grid": self.length_grid} if self.length_grid > 1 else {}),
            **({"crop": self.crop, "segment_seed": self.segment_seed} if self.crop == "fixed" else {}),
            **({"segments_per_utterance": self.segments_per_utterance} if self.segments_per_utterance > 1 else {}),
            **({"targets": self._caches["train"].layout.dtype} if self._caches else {}),
            **({"features": self._caches["train"].layout.features} if self.cached_front_end else {}),
        }

    def _use(self, stage: str, manifest: Manifest) -> None:
        self._manifests[stage] = manifest
        self._plans[stage] = self._plan(stage, np.minimum(manifest.num_samples, self.max_samples))

    def _stages(self) -> list[str]:
        return ["train", "val"] if self.val_splits else ["train"]

    def _splits(self, stage: str) -> tuple[str, ...]:
        return self.train_splits if stage == "train" else self.val_splits

    def _corpus(self, stage: str) -> CorpusSettings:
        return CorpusSettings(
            roots=self.roots,
            splits=self._splits(stage),
            sample_rate=self.sample_rate,
            min_samples=self.min_samples,
            resample=self.resample,
            on_bad_audio=self.on_bad_audio,
        )

    def _plan(self, stage: str, lengths_N: np.ndarray) -> BatchPlan:
        if stage == "val" and self.val_batch_size is not None:
            return plan_by_utterances(lengths_N, self.val_batch_size)
        if self.batch_size is not None:
            return plan_by_utterances(lengths_N, self.batch_size)
        assert self.batch_seconds is not None
        return plan_by_samples(lengths_N, int(self.batch_seconds * self.sample_rate))

    def _crop_rule(self, stage: str, seed: int | None) -> CropRule:
        lengths = self._require(stage, self._manifests).num_samples
        return CropRule(lengths, self.max_samples, self.length, seed, self.length_grid)

    def _dataset(self, stage: str, cached: bool = False) -> AudioDataset:
        manifest, skip = self._require(stage, self._manifests), self.on_bad_audio == "skip"
        caches = (self._caches.get(stage), self._features.get(stage)) if cached else (None, None)
        return AudioDataset(manifest, self.sample_rate, self.resample, skip, self.run_dir, *caches)

    def _loader(self, stage: str, sampler: GlobalBatchSampler) -> ResumableLoader:
        dataset = self._dataset(stage, cached=True)
        workers, pinned = workers_for(self.num_workers, self.trainer), trains_on_cuda(self.trainer)
        self._loaders[stage] = ResumableLoader(dataset, sampler, workers, self.relay and self.relay(stage), pinned)
        return self._loaders[stage]

    def on_exception(self, exception: BaseException) -> None:
        """Name the file that a killed worker was reading."""
        for loader in self._loaders.values():
            loader.explain(exception)

    def _require(self, stage: str, table: dict[str, Any]) -> Any:
        if stage not in table:
            raise InputError(f"the {stage} data are not ready: call prepare_data() and setup() first")
        return table[stage]

    def _report_skipped(self, stage: str, manifest: Manifest) -> None:
        if manifest.skipped and (self.trainer is None or self.trainer.is_global_zero):
            listed = (self.run_dir, SKIPPED_FILE) if self.run_dir else (manifest.folder, "meta.json")
            where = os.path.join(*listed)
            logger.warning("%s data: %d bad files skipped, listed in %s", stage, len(manifest.skipped), where)
            list_skipped(self.run_dir, manifest.skipped)
