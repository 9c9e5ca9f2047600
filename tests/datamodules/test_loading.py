"""Decoding micro-batches, replacing what cannot be decoded, and resuming a loader in mid-epoch."""

import errno
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from datamodules.audio import BadAudioError, read_audio
from datamodules.batching import CropRule, GlobalBatchSampler, MicroBatch, plan_by_utterances
from datamodules.cached_records import CachedRecords, RecordLayout
from datamodules.corpus import CorpusSettings
from datamodules.errors import is_storage_error
from datamodules.loading import (
    SKIPPED_FILE,
    AudioBatch,
    AudioDataset,
    Load,
    Relay,
    ResumableLoader,
    list_skipped,
)
from datamodules.manifest import Manifest, prepare_manifest
from datamodules.scanning import Problem
from tests.datamodules.corpora import truncate, utterance, write_corpus
from tests.patience import PATIENCE

LENGTHS = [9000 + 500 * number for number in range(20)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", {"train": LENGTHS})


def manifest_of(corpus: Path) -> Manifest:
    settings = CorpusSettings(roots=(str(corpus),), splits=("train",), on_bad_audio="skip")
    return prepare_manifest(settings, str(corpus.parent / "cache"))


def loader_of(
    corpus: Path, num_workers: int = 0, epoch: int = 0, accumulate: int = 2, relay: Relay | None = None
) -> ResumableLoader:
    manifest = manifest_of(corpus)
    crop = CropRule(manifest.num_samples, 15_000, "crop", seed=0)
    plan = plan_by_utterances(np.minimum(manifest.num_samples, 15_000), 4)
    sampler = GlobalBatchSampler(plan, crop, seed=0, accumulate=accumulate, epoch=epoch)
    return ResumableLoader(AudioDataset(manifest, 16000), sampler, num_workers, relay)


def micro_batch(rows: list[int], starts: list[int], num_samples: list[int]) -> MicroBatch:
    return MicroBatch(*(np.array(column) for column in (rows, starts, num_samples, num_samples)))


def equal(one: list[AudioBatch], other: list[AudioBatch]) -> bool:
    if len(one) != len(other):
        return False
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a[:4], b[:4], strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def test_a_batch_holds_the_samples_that_were_asked_for(corpus: Path) -> None:
    batch = AudioDataset(manifest_of(corpus), 16000)[micro_batch([3, 0], [100, 0], [5000, 9000])]
    assert batch.waveforms.shape == (2, 9000)
    assert batch.waveforms.dtype == torch.float32
    expected_T = read_audio(str(utterance(corpus, 3)), start=100, stop=5100)
    np.testing.assert_array_equal(batch.waveforms[0, :5000].numpy(), expected_T)
    assert not batch.waveforms[0, 5000:].any()
    np.testing.assert_array_equal(batch.waveforms[1].numpy(), read_audio(str(utterance(corpus, 0)), stop=9000))
    assert (batch.num_samples.tolist(), batch.index.tolist()) == ([5000, 9000], [3, 0])
    assert {tensor.dtype for tensor in batch[1:4]} == {torch.int64}
    assert batch.cached is None


def test_a_share_is_as_wide_as_the_global_batch(corpus: Path) -> None:
    share = micro_batch([0], [0], [800])._replace(global_num_samples=np.array([800, 900]))
    batch = AudioDataset(manifest_of(corpus), 16000)[share]
    assert batch.waveforms.shape == (1, 900)
    assert batch.global_num_samples.tolist() == [800, 900]


def test_an_undecodable_file_is_an_error(corpus: Path) -> None:
    truncate(utterance(corpus, 5))
    with pytest.raises(BadAudioError, match=r"0005\.flac: cannot be decoded"):
        AudioDataset(manifest_of(corpus), 16000)[micro_batch([5], [0], [LENGTHS[5]])]


def test_an_undecodable_file_is_replaced_by_the_next_longer_one(corpus: Path, tmp_path: Path) -> None:
    for number in (5, 6):
        truncate(utterance(corpus, number), keep=0.3)
    manifest = manifest_of(corpus)
    dataset = AudioDataset(manifest, 16000, skip_bad_audio=True, run_dir=str(tmp_path / "run"))
    for _ in range(2):
        batch = dataset[micro_batch([5, 8], [0, 0], [LENGTHS[5], LENGTHS[8]])]
        assert batch.index.tolist() == [7, 8]
    expected_T = read_audio(manifest.path(7), stop=LENGTHS[5])
    np.testing.assert_array_equal(batch.waveforms[0, : LENGTHS[5]].numpy(), expected_T)
    lines = (tmp_path / "run" / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [manifest.path(5), manifest.path(6)]


@pytest.mark.parametrize("value", [np.nan, 9700.0])
def test_a_file_of_numbers_that_are_no_samples_is_bad_audio_like_any_other(
    corpus: Path, tmp_path: Path, value: float
) -> None:
    samples_T = np.zeros(LENGTHS[5])
    samples_T[100] = value
    soundfile.write(utterance(corpus, 5), samples_T, 16_000, format="WAV", subtype="FLOAT")
    manifest, run_dir = manifest_of(corpus), str(tmp_path / "run")
    wanted = micro_batch([5], [0], [LENGTHS[5]])
    with pytest.raises(BadAudioError, match=r"0005\.flac: h"):
        AudioDataset(manifest, 16000)[wanted]
    assert AudioDataset(manifest, 16000, skip_bad_audio=True, run_dir=run_dir)[wanted].index.tolist() == [6]
    assert "0005.flac\th" in (tmp_path / "run" / SKIPPED_FILE).read_text(encoding="utf-8")


def test_the_longest_file_is_replaced_by_the_one_below_that_is_long_enough(corpus: Path) -> None:
    truncate(utterance(corpus, 19), keep=0.3)
    dataset = AudioDataset(manifest_of(corpus), 16000, skip_bad_audio=True)
    batch = dataset[micro_batch([19], [LENGTHS[19] - 15_000], [15_000])]
    assert batch.index.tolist() == [18]
    with pytest.raises(BadAudioError, match="no readable utterance of 18500 samples is left"):
        dataset[micro_batch([19], [0], [LENGTHS[19]])]


def test_workers_get_no_copy_of_the_manifest(corpus: Path) -> None:
    dataset = AudioDataset(manifest_of(corpus), 16000)
    assert len(pickle.dumps(dataset)) < 1000
    assert isinstance(dataset.manifest.num_samples, np.memmap)


def test_a_relay_stands_between_loading_and_handing_out(corpus: Path) -> None:
    asked = []

    def relay(epoch: int, start: int, load: Load) -> Iterator[AudioBatch]:
        asked.append((epoch, start))
        yield from load(start)

    plain, loader = loader_of(corpus, epoch=1), loader_of(corpus, epoch=1, relay=relay)
    for each in (plain, loader):
        each.load_state_dict({"epoch": 1, "yielded": 4, "length": 10, "accumulate": 2})
    assert equal(list(loader), list(plain))
    assert equal(list(loader), list(plain))  # the start holds once
    assert asked == [(1, 4), (1, 0)]
    assert loader.state_dict() == plain.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_loader_continues_exactly(corpus: Path, num_workers: int, stop_after: int) -> None:
    loader = loader_of(corpus, num_workers)
    loader.batch_sampler.set_epoch(1)
    first_epoch = list(loader)
    loader.batch_sampler.set_epoch(2)
    second_epoch = list(loader)
    assert len(first_epoch) == len(loader) == 10

    interrupted = loader_of(corpus, num_workers)
    interrupted.batch_sampler.set_epoch(1)
    batches = iter(interrupted)
    for _ in range(stop_after):
        next(batches)
    state = interrupted.state_dict()
    assert (state["epoch"], state["yielded"]) == (1, stop_after)

    resumed = loader_of(corpus, num_workers, epoch=1)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert equal(rest, first_epoch[stop_after:])
    assert not equal(rest, first_epoch[: len(rest)])
    assert resumed.state_dict()["yielded"] == 10
    resumed.batch_sampler.set_epoch(2)
    assert equal(list(resumed), second_epoch)


def test_a_state_at_the_end_of_an_epoch_means_the_next(corpus: Path) -> None:
    loader = loader_of(corpus)
    list(loader)
    resumed = loader_of(corpus)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.batch_sampler.epoch, resumed.batch_sampler.start) == (1, 0)


def test_a_start_is_used_once(corpus: Path) -> None:
    loader = loader_of(corpus)
    loader.load_state_dict({"epoch": 0, "yielded": 3, "length": 10, "accumulate": 2})
    assert [len(list(loader)) for _ in range(2)] == [7, 10]


def test_a_state_between_two_epochs_is_of_the_finished_one(corpus: Path) -> None:
    loader = loader_of(corpus)
    list(loader)
    loader.batch_sampler.set_epoch(1)
    assert loader.state_dict()["epoch"] == 0


def test_a_state_of_an_epoch_that_ended_early_is_left_behind(corpus: Path) -> None:
    loader = loader_of(corpus, epoch=1)
    loader.load_state_dict({"epoch": 0, "yielded": 3, "length": 10, "accumulate": 2})
    assert (loader.batch_sampler.epoch, loader.batch_sampler.start) == (1, 0)


def test_another_accumulation_is_an_error_in_mid_epoch_only(corpus: Path) -> None:
    state = {"epoch": 0, "yielded": 4, "length": 10, "accumulate": 2}
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 and 10 batches .* not 4 and 20"):
        loader_of(corpus, accumulate=4).load_state_dict(state)
    resumed = loader_of(corpus, accumulate=4)
    resumed.load_state_dict(state | {"yielded": 10})
    assert resumed.batch_sampler.epoch == 1


def test_listing_appends_what_is_not_yet_listed(tmp_path: Path) -> None:
    one, two = Problem("/a.flac", "is too short"), Problem("/b.flac", "has 2 channels")
    list_skipped(None, [one])
    list_skipped(str(tmp_path / "run"), [one])
    list_skipped(str(tmp_path / "run"), [one, two])
    listed = (tmp_path / "run" / SKIPPED_FILE).read_text(encoding="utf-8")
    assert listed == "/a.flac\tis too short\n/b.flac\thas 2 channels\n"


def test_an_error_of_the_storage_in_a_worker_keeps_its_number(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "a.flac")

    loader = loader_of(corpus, num_workers=1)
    monkeypatch.setattr("datamodules.loading.read_audio", fail)
    with pytest.raises(OSError, match="Stale file handle") as caught:
        next(iter(loader))
    assert not is_storage_error(caught.value)  # torch makes it anew from its text
    loader.explain(caught.value)
    assert is_storage_error(caught.value)


def test_slurms_signal_does_not_reach_workers(corpus: Path) -> None:
    """They are forked while the program answers it by a requeue; a scheduler may signal all processes of a job."""
    before, others = signal.signal(signal.SIGUSR1, lambda *_: os._exit(9)), multiprocessing.active_children()
    try:
        batches = iter(loader_of(corpus, num_workers=1))
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - set(others)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGUSR1)
        assert sum(1 for _ in batches) == len(loader_of(corpus)) - 1
        assert worker.exitcode in (None, 0)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.ci
@pytest.mark.parametrize("signal_", [signal.SIGKILL])
def test_a_worker_that_is_killed_names_its_file(signal_: signal.Signals, tmp_path: Path) -> None:
    """The worker kills itself in the middle of decoding; the trainer's error names the file that it had open.

    The trainer has a process that was not forked: torch's watch over workers did not wake up in one that was.
    """
    script = textwrap.dedent(
        f"""
        import os, sys
        from pathlib import Path
        import datamodules.loading as loading
        from tests.helpers import make_data, make_module, make_trainer, save_corpus, save_teacher

        folder = Path({str(tmp_path)!r})
        loading.SECONDS_AFTER_SIGTERM = 1  # the other worker's last seconds
        read = loading.read_audio
        def deadly(path, *rest):
            if path.endswith("0003.flac"):
                os.kill(os.getpid(), {int(signal_)})
            return read(path, *rest)
        loading.read_audio = deadly
        corpus = save_corpus(folder / "corpus", {{"train": 8, "dev": 2}})
        module = make_module(save_teacher(folder / "teacher"))
        data = make_data(corpus, folder / "cache", num_workers=2)
        make_trainer(folder, max_epochs=1).fit(module, datamodule=data)
        """
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert re.search(r"a data worker died while it was reading .*0003\.flac", result.stderr), result.stderr[-1500:]


def test_workers_that_never_deliver_are_an_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        while not (tmp_path / "seen").exists():
            time.sleep(0.05)

    monkeypatch.setattr("datamodules.loading.LONGEST_WAIT", 2)
    loader = loader_of(corpus, num_workers=1)
    monkeypatch.setattr("datamodules.loading.read_audio", never)
    with pytest.raises(RuntimeError, match="DataLoader timed out") as caught:
        next(iter(loader))
    (tmp_path / "seen").touch()
    loader.explain(caught.value)
    assert re.match(r"no data worker delivered a batch for 2 s: .* Continue with --ckpt_path last", str(caught.value))
    assert loader_of(corpus).timeout == 0  # without workers there is nobody to wait for


@pytest.mark.ci
def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch pins what it finds in both named tuples. Without a GPU there is no pinned memory, so it is only noted."""
    found: list[Tensor] = []

    def pinned(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    lengths_B = torch.tensor([9])
    layout = RecordLayout(2, 4, "int8")
    records = CachedRecords(torch.zeros(1, 64, dtype=torch.uint8), layout, num_frames=3)
    batch = AudioBatch(torch.zeros(1, 9), lengths_B, lengths_B.clone(), torch.tensor([5]), records)
    result = pin_memory(batch)
    tensors = [*batch[:4], records.data]
    assert len(found) == len(tensors)
    assert all(one is other for one, other in zip(found, tensors, strict=True))
    assert isinstance(result, AudioBatch)
    assert isinstance(result.cached, CachedRecords)
    assert result.cached[1:] == (layout, 3)
