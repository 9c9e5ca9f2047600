"""Dataset that decodes micro-batches of rows to tensors, and loader that can resume in mid-epoch."""

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datamodules.audio import BadAudioError, read_audio
from datamodules.batching import GlobalBatchSampler, MicroBatch
from datamodules.cached_records import CachedRecords
from datamodules.errors import InputError
from datamodules.manifest import Manifest
from datamodules.scanning import Problem
from datamodules.target_cache import TargetCache

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_audio.tsv"
SECONDS_AFTER_SIGTERM = 30  # time for which a worker continues: several optimizer steps
LONGEST_WAIT = 300  # seconds for a batch of the workers, half of torch's limit for NCCL; see ResumableLoader.explain
SECONDS_AFTER_A_COLLECTIVE = 0.01


class AudioBatch(NamedTuple):
    """This rank's and this accumulation step's share of a global batch."""

    # (B, T) float32, T is the longest item of the global batch, zeros after an item's end; None: features are cached
    waveforms: Tensor | None
    num_samples: Tensor  # (B,) int64 valid samples; T everywhere with length="crop"
    # (G,) int64 valid samples of every item of the global batch; None: not known, so all shares count alike
    global_num_samples: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # (B,) int64 manifest rows; hides tuple.index
    cached: CachedRecords | None = None  # targets, and perhaps features, of these segments
    features: CachedRecords | None = None  # features of these segments from a cache of their own
    # (B,) int64 numbers of the segments: rows, or with several fixed segments of each row their own; None: not known
    segments: Tensor | None = None
    counts: bool = True  # False: the global batch has no item for this share, whose loss is 0


Load = Callable[[int], Iterator[AudioBatch]]
"""Function that loads the micro-batches of the loader's epoch, starting with the one of the given number."""
Relay = Callable[[int, int, Load], Iterator[AudioBatch]]
"""Function of (epoch, first micro-batch, function that loads them) that returns loaded or shared micro-batches."""


class AudioDataset(Dataset[AudioBatch]):
    """Decodes micro-batches. It holds a memory-mapped manifest and no state, so that workers need no copy.

    With ``skip_bad_audio`` an item that cannot be decoded is replaced by the next longer utterance that can,
    which is the same in every run and on every rank. The file is listed in ``run_dir`` (if given) and logged.
    With ``cache`` nothing is replaced, because the records of the other segment are missing. If it or ``features``, a
    cache of them alone, has the front end's features, no audio is read.

    Raises:
        BadAudioError: a file cannot be decoded and bad audio is not skipped, or nothing can replace it.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_rate: int,
        resample: bool = False,
        skip_bad_audio: bool = False,
        run_dir: str | None = None,
        cache: TargetCache | None = None,
        features: TargetCache | None = None,
    ) -> None:
        self.manifest, self.cache, self.features = manifest, cache, features
        self.sample_rate, self.resample = sample_rate, resample
        self.skip_bad_audio, self.run_dir = skip_bad_audio and cache is None, run_dir
        self.notes: Tensor | None = None  # (workers, 2) int64 in shared memory: process id, current row

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, batch: MicroBatch) -> AudioBatch:
        index_B = batch.rows.astype(np.int64)
        segments = (index_B if batch.segments is None else batch.segments).astype(np.int64)  # a copy
        waveforms_BT = None
        if self.cache is None or not (self.cache.has_features or self.features is not None):
            # numpy asks for huge pages for a large array, which torch does not.
            values = np.zeros((len(batch.rows), int(batch.global_num_samples.max())), np.float32)
            for item, (row, start, num_samples) in enumerate(zip(*batch[:3], strict=True)):
                index_B[item], values[item, :num_samples] = self._read(int(row), int(start), int(num_samples))
            waveforms_BT = torch.from_numpy(values)
        return AudioBatch(
            waveforms_BT,
            torch.from_numpy(batch.num_samples.astype(np.int64)),
            torch.from_numpy(batch.global_num_samples.astype(np.int64)),
            torch.from_numpy(index_B),
            None if self.cache is None else self.cache.read(segments),
            None if self.features is None else self.features.read(segments),
            torch.from_numpy(segments),
            batch.counts,
        )

    # The item of a batch sampler is a whole micro-batch, which the loader passes to this method.
    __getitems__ = __getitem__

    def _read(self, row: int, start: int, num_samples: int) -> tuple[int, np.ndarray]:
        self._note(row)
        try:
            return row, self._decode(row, start, num_samples)
        except BadAudioError as error:
            if not self.skip_bad_audio:
                raise
            self._report(row, error)
            return self._read_replacement(row, start, num_samples, error)

    def _read_replacement(self, row: int, start: int, num_samples: int, cause: BadAudioError) -> tuple[int, np.ndarray]:
        for other in _next_longer(self.manifest.num_samples, row, num_samples):
            latest = int(self.manifest.num_samples[other]) - num_samples
            try:
                return other, self._decode(other, min(start, latest), num_samples)
            except BadAudioError as error:
                self._report(other, error)
        raise BadAudioError(f"{cause}; no readable utterance of {num_samples} samples is left to replace it")

    def _decode(self, row: int, start: int, num_samples: int) -> np.ndarray:
        path = self.manifest.path(row)
        return read_audio(path, self.sample_rate, start, start + num_samples, self.resample)

    def _note(self, row: int) -> None:
        """Record the current row, so that the parent can name it if this worker dies."""
        if self.notes is not None and (worker := get_worker_info()) is not None:
            self.notes[worker.id] = torch.tensor([os.getpid(), row])

    def last_read(self, process: int) -> str | None:
        """The file that the worker with this process id read last; ``None`` if it is not a worker of this dataset."""
        notes = [] if self.notes is None else self.notes.tolist()
        return next((self.manifest.path(row) for pid, row in notes if pid == process), None)

    def _report(self, row: int, error: BadAudioError) -> None:
        path = self.manifest.path(row)
        logger.warning("skipped, another utterance takes its place: %s", error)
        list_skipped(self.run_dir, [Problem(path, str(error).removeprefix(f"{path}: "))])


class Batches(Protocol):
    """A dataset whose items are micro-batches, and that knows which file a worker read last."""

    notes: Tensor | None

    def __getitem__(self, batch: MicroBatch) -> AudioBatch: ...

    def last_read(self, process: int) -> str | None: ...


class ResumableLoader(DataLoader[AudioBatch]):
    """A loader with Lightning's stateful protocol; it counts micro-batches yielded, not those prefetched.

    A state at the end of an epoch means the start of the next. A state of an epoch before the sampler's own
    is ignored, because the trainer has finished that epoch, perhaps early (``limit_train_batches``).

    Args:
        dataset: dataset that decodes micro-batches.
        batch_sampler: sampler of the micro-batches of an epoch.
        num_workers: number of processes that decode.
        relay: function that shares micro-batches between several loaders; ``None``: this loader loads its own.
        pin_memory: put batches in pinned memory, from which a CUDA device can copy without the host waiting.
    """

    batch_sampler: GlobalBatchSampler  # type: ignore[assignment]
    dataset: Batches  # type: ignore[assignment]

    def __init__(
        self,
        dataset: Batches,
        batch_sampler: GlobalBatchSampler,
        num_workers: int = 0,
        relay: Relay | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batch_sampler,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            **with_workers(num_workers),
        )
        if num_workers:
            dataset.notes = torch.full((num_workers, 2), -1).share_memory_()
        self._epoch, self._yielded, self._relay = batch_sampler.epoch, 0, relay

    def __iter__(self) -> Iterator[AudioBatch]:  # type: ignore[override]
        self._epoch, self._yielded = self.batch_sampler.epoch, self.batch_sampler.start
        if self._relay is None:
            return self._counted(self._load(self._yielded))
        self.batch_sampler.start = 0
        return self._counted(self._relay(self._epoch, self._yielded, self._load))

    def _load(self, start: int) -> Iterator[AudioBatch]:
        # With workers, DataLoader requests the sampler's iterator more than once, so the sampler must not reset
        # its start by itself.
        self.batch_sampler.start = start
        if self.num_workers and torch.distributed.is_initialized():
            # A thread of gloo may still release objects of the last collective, with its own Python thread state.
            # CPython up to 3.11 hangs in a child that is forked while such a state is created or deleted.
            time.sleep(SECONDS_AFTER_A_COLLECTIVE)
        batches = super().__iter__()
        self.batch_sampler.start = 0
        return batches

    def explain(self, error: BaseException) -> None:
        """Add the file that was being read to torch's error about a dead worker, and its number to an error of storage.

        torch raises the error from a signal handler, at any point of the main process, so the message is amended
        where the run's exceptions are handled. Workers can also hang without an error, because storage hangs or a
        fork met a lock (see ``_load``).
        """
        if isinstance(error, OSError) and error.errno is None and (found := re.search(r"\[Errno (\d+)\]", str(error))):
            error.errno = int(found[1])  # a worker's error comes as its text alone
        if "DataLoader timed out" in str(error):
            error.args = (
                f"no data worker delivered a batch for {self.timeout:g} s: storage that does not answer, or a worker "
                "that never started. Continue with --ckpt_path last; with data.num_workers=0 there are no workers "
                f"({str(error).strip()})",
            )
            return
        if (match := re.search(r"DataLoader worker \(pid\(?s?\)? (\d+)", str(error))) is None:
            return
        if (path := self.dataset.last_read(int(match[1]))) is not None:
            error.args = (
                f"a data worker died while it was reading {path}: check that file, its storage and "
                f"the machine's memory, or find the cause with data.num_workers=0 ({str(error).strip()})",
            )

    def _counted(self, batches: Iterator[AudioBatch]) -> Iterator[AudioBatch]:
        for batch in batches:
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        sampler = self.batch_sampler
        position = {"epoch": self._epoch, "yielded": self._yielded}
        return position | {"length": len(sampler), "accumulate": sampler.accumulate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were already yielded.

        Raises:
            InputError: the state is from mid-epoch, and accumulation or the number of batches has changed.
        """
        sampler = self.batch_sampler
        epoch, start = state["epoch"], state["yielded"]
        if start >= state["length"]:
            epoch, start = epoch + 1, 0
        if epoch < sampler.epoch:
            return
        if start and (state["length"], state["accumulate"]) != (len(sampler), sampler.accumulate):
            raise InputError(
                f"the checkpoint was written in mid-epoch with trainer.accumulate_grad_batches={state['accumulate']} "
                f"and {state['length']} batches per epoch, not {sampler.accumulate} and {len(sampler)}: "
                f"resume with the same settings, or from a checkpoint of an epoch's end"
            )
        sampler.epoch, sampler.start = epoch, start


def list_skipped(run_dir: str | None, problems: Sequence[Problem]) -> None:
    """Append files that are not yet listed to ``run_dir/skipped_audio.tsv`` (path, reason).

    It is one write in append mode, so that lines of several workers and ranks do not mix.
    """
    if run_dir is None or not problems:
        return
    os.makedirs(run_dir, exist_ok=True)
    path = os.path.join(run_dir, SKIPPED_FILE)
    lines = [f"{problem.path}\t{problem.reason}\n" for problem in problems]
    listed: set[str] = set()
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            listed = set(file)
    new = [line for line in lines if line not in listed]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, "".join(new).encode())
    finally:
        os.close(handle)


def _next_longer(num_samples_N: np.ndarray, row: int, needed: int) -> Iterator[int]:
    """Other rows with at least ``needed`` samples: longer ones in ascending, then shorter ones in descending order."""
    order_N = np.argsort(num_samples_N, kind="stable")
    place = int(np.flatnonzero(order_N == row)[0])
    for other in (*order_N[place + 1 :], *order_N[:place][::-1]):
        if num_samples_N[other] >= needed:
            yield int(other)


def with_workers(num_workers: int) -> dict[str, Any]:
    """Settings of a DataLoader of batches: its processes, how long it waits for them, and what they do at SIGTERM."""
    waits = {"timeout": LONGEST_WAIT if num_workers else 0, "worker_init_fn": _outlive_sigterm}
    return {"num_workers": num_workers, "collate_fn": _as_it_is, **waits}


def _outlive_sigterm(worker: int) -> None:
    # A scheduler signals the whole process group. If workers ended at once, the run would fail before it has written
    # its checkpoint. They cannot ignore the signal, since a broken loader uses it to end workers that it cannot
    # reach. So they end with a delay. SLURM's signal of a requeue is for the run itself, whose answer they inherit.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))


def _as_it_is(batch: AudioBatch) -> AudioBatch:
    return batch
