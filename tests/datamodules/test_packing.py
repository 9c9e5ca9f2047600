"""A packed split gives the batches of the files that it was made from; whatever is wrong with it is one clear error."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from datamodules import packing
from datamodules.audio import BadAudioError, read_audio
from datamodules.corpus import CorpusSettings, list_files
from datamodules.librispeech import AudioBatch, LibriSpeechDataModule
from datamodules.manifest import prepare_manifest
from datamodules.packed import INDEX, MARKER
from datamodules.packing import PackedTotals, pack_split
from tests.datamodules.corpora import noise, truncate, utterance, write_audio, write_corpus

LENGTHS = [4000 + 317 * number for number in range(20)]
SHARD_BYTES = 60_000  # a few utterances


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", {"train": LENGTHS})


def packed(corpus: Path, shard_bytes: int = SHARD_BYTES, overwrite: bool = False, **settings: Any) -> PackedTotals:
    chosen = CorpusSettings((str(corpus),), ("train",), min_samples=1, **settings)
    return pack_split(chosen, corpus.parent / "packed", shard_bytes, overwrite, str(corpus.parent / "cache"))


def batches(root: Path, num_workers: int = 0, epochs: int = 2, **settings: Any) -> list[AudioBatch]:
    defaults: dict[str, Any] = {"batch_size": 6, "max_samples": 6000, "num_workers": num_workers}
    data = LibriSpeechDataModule(
        str(root), ["train"], [], cache_dir=str(root.parent / "cache"), **(defaults | settings)
    )
    data.prepare_data()
    data.setup()
    loader, seen = data.train_dataloader(), []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        seen += list(loader)
    return seen


def same(left: list[AudioBatch], right: list[AudioBatch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("settings", [{}, {"length": "pad"}, {"batch_size": None, "batch_seconds": 1.5}])
def test_batches_are_those_of_the_files_bit_for_bit(corpus: Path, settings: dict[str, Any]) -> None:
    assert packed(corpus).shards > 2
    from_files, from_pack = batches(corpus, **settings), batches(corpus.parent / "packed", **settings)
    assert same(from_files, from_pack)
    assert not same(from_files, batches(corpus.parent / "packed", seed=1, **settings))


def test_a_worker_reads_the_same_batches(corpus: Path) -> None:
    packed(corpus)
    assert same(batches(corpus), batches(corpus.parent / "packed", num_workers=1))


def test_one_changed_sample_changes_a_batch(corpus: Path) -> None:
    packed(corpus)
    before = batches(corpus.parent / "packed", max_samples=250_000, length="pad")
    samples, rate = soundfile.read(utterance(corpus, 3), dtype="int16")
    samples[100] += 1
    soundfile.write(utterance(corpus, 3), samples, rate)
    packed(corpus, overwrite=True)
    assert not same(before, batches(corpus.parent / "packed", max_samples=250_000, length="pad"))


def test_rows_texts_and_fingerprint_are_the_same(corpus: Path) -> None:
    packed(corpus)
    manifests = [
        prepare_manifest(CorpusSettings((str(root),), ("train",), transcripts="required"), str(corpus.parent / "cache"))
        for root in (corpus, corpus.parent / "packed")
    ]
    assert manifests[0].row_hash == manifests[1].row_hash
    datas = [
        LibriSpeechDataModule(str(m), ["train"], [], cache_dir=str(corpus.parent / "c"))
        for m in (corpus, corpus.parent / "packed")
    ]
    for data in datas:
        data.prepare_data()
        data.setup()
    assert datas[0].fingerprint() == datas[1].fingerprint()
    for row in range(len(LENGTHS)):
        first, second = ((m.utterance_id(row), m.speaker(row), m.transcript(row)) for m in manifests)
        assert first == second


def test_extreme_samples_are_exact(tmp_path: Path) -> None:
    path = utterance(write_corpus(tmp_path / "corpus", {"train": [4000]}), 0)
    samples, rate = soundfile.read(path, dtype="int16")
    samples[:4] = [-32768, 32767, -1, 0]
    soundfile.write(path, samples, rate)
    packed(tmp_path / "corpus")
    settings = CorpusSettings((str(tmp_path / "packed"),), ("train",))
    waveform_T = read_audio(prepare_manifest(settings, str(tmp_path / "cache")).path(0))
    assert waveform_T.tolist() == read_audio(str(path)).tolist()
    assert waveform_T[:4].tolist() == [-1.0, 32767 / 32768, -1 / 32768, 0.0]


def test_other_bit_depths_are_refused(corpus: Path) -> None:
    soundfile.write(utterance(corpus, 2), noise(4000), 16_000, subtype="PCM_24")
    with pytest.raises(BadAudioError, match=r"0002\.flac: has more than 16 bits"):
        packed(corpus)


def test_a_number_that_would_become_silence_is_refused(corpus: Path) -> None:
    soundfile.write(utterance(corpus, 2), noise(4000) * float("nan"), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(BadAudioError, match=r"0002\.flac: holds NaN at 0\.0000 s"):
        packed(corpus)


def test_an_interrupted_call_goes_on_where_it_stopped(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = packing._write_shard

    def stop_at_third(folder: Path, number: int, *more: Any) -> dict[str, Any]:
        if number == 2 and not written[2:]:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(number)
        return write(folder, number, *more)

    monkeypatch.setattr(packing, "_write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        packed(corpus)
    assert not (corpus.parent / "packed" / "train").exists()
    first = corpus.parent / "packed" / ".unfinished-train" / "00000.pcm"
    first.write_bytes(first.read_bytes()[:-2] + b"xx")  # a finished shard that was damaged since is written again
    totals = packed(corpus)
    assert written == [0, 1, -1, 0, *range(2, totals.shards)]
    assert same(batches(corpus), batches(corpus.parent / "packed"))


def test_what_a_killed_overwrite_leaves_is_in_nobodys_way(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus.parent / "packed" / "train"
    left = folder.with_name(".unfinished-train-replaced")
    packed(corpus)
    with monkeypatch.context() as patched:  # killed in the last line of an overwrite
        patched.setattr("shutil.rmtree", lambda *args, **settings: None)
        packed(corpus, shard_bytes=90_000, overwrite=True)
    assert left.is_dir()
    packed(corpus, overwrite=True)
    assert not left.exists()

    def killed(source: Path, target: Path) -> None:
        if Path(target) == folder:
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    for overwrite in (True, False):  # killed between the two renames, twice: ``left`` is the only finished pack
        with monkeypatch.context() as patched:
            patched.setattr("os.replace", killed)
            with pytest.raises(KeyboardInterrupt):
                packed(corpus, shard_bytes=90_000, overwrite=overwrite)
        assert not folder.exists()
        assert (left / MARKER).is_file()
    packed(corpus, shard_bytes=90_000)
    assert same(batches(corpus), batches(corpus.parent / "packed"))
    assert not left.exists()


def test_a_finished_pack_is_kept_and_another_one_is_not_replaced_unasked(corpus: Path) -> None:
    packed(corpus)
    shard = corpus.parent / "packed" / "train" / "00000.pcm"
    before = shard.stat().st_mtime_ns
    packed(corpus)
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"shard_bytes 60000 instead of 90000: set overwrite"):
        packed(corpus, shard_bytes=90_000)
    packed(corpus, shard_bytes=90_000, overwrite=True)
    assert same(batches(corpus), batches(corpus.parent / "packed"))


def test_a_damaged_shard_is_named(corpus: Path) -> None:
    packed(corpus)
    shard = corpus.parent / "packed" / "train" / "00001.pcm"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.pcm has changed since it was packed: copy the packed split again"):
        batches(corpus.parent / "packed")
    with pytest.raises(ValueError, match=r"00001\.pcm has changed"):
        packed(corpus)


def test_damage_behind_the_manifests_back_is_found_by_packing_again(corpus: Path) -> None:
    packed(corpus)
    batches(corpus.parent / "packed")
    shard = corpus.parent / "packed" / "train" / "00001.pcm"
    times, content = shard.stat(), bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=r"00001\.pcm has changed"):
        packed(corpus)


def test_a_truncated_or_missing_shard_is_named(corpus: Path) -> None:
    packed(corpus)
    truncate(corpus.parent / "packed" / "train" / "00001.pcm")
    with pytest.raises(ValueError, match=r"00001\.pcm has changed"):
        batches(corpus.parent / "packed")
    (corpus.parent / "packed" / "train" / "00001.pcm").unlink()
    with pytest.raises(ValueError, match=r"00001\.pcm is missing since it was packed"):
        batches(corpus.parent / "packed")


def test_a_shard_truncated_after_the_manifest_was_made_is_an_error_and_not_a_crash(corpus: Path) -> None:
    packed(corpus)
    data = LibriSpeechDataModule(
        str(corpus.parent / "packed"),
        ["train"],
        [],
        batch_size=6,
        num_workers=0,
        cache_dir=str(corpus.parent / "cache"),
    )
    data.prepare_data()
    data.setup()
    truncate(corpus.parent / "packed" / "train" / "00000.pcm")
    with pytest.raises(ValueError, match=r"00000\.pcm has changed its size"):
        list(data.train_dataloader())


def test_too_short_utterances_are_bad_audio_here_too(corpus: Path) -> None:
    write_audio(utterance(corpus, 20), 399)
    packed(corpus)
    with pytest.raises(BadAudioError, match=r"0020\.flac: is too short: 399 samples"):
        batches(corpus.parent / "packed")


def test_skipped_files_are_left_out_of_the_pack(corpus: Path) -> None:
    utterance(corpus, 20).write_bytes(b"no audio")
    with pytest.raises(BadAudioError, match=r"0020\.flac: cannot be read as audio"):
        packed(corpus)
    totals = packed(corpus, on_bad_audio="skip")
    assert (totals.utterances, totals.skipped) == (20, 1)
    assert same(batches(corpus, on_bad_audio="skip"), batches(corpus.parent / "packed"))


def test_a_pack_beside_the_files_that_it_was_made_of_is_refused(corpus: Path) -> None:
    packed(corpus)
    chapter = utterance(corpus.parent / "packed", 0).parent
    assert len(list_files([("train", str(corpus.parent / "packed" / "train"))])) > 20  # sound before
    shutil.copy(utterance(corpus, 3), chapter)
    with pytest.raises(ValueError, match=r"0003\.flac and .*0003\.flac are one utterance twice"):
        list_files([("train", str(corpus.parent / "packed" / "train"))])


def test_the_corpus_is_never_its_own_output(corpus: Path) -> None:
    with pytest.raises(ValueError, match="is the corpus itself"):
        pack_split(CorpusSettings((str(corpus),), ("train",)), corpus, SHARD_BYTES, True, str(corpus.parent / "cache"))
    (corpus.parent / "packed" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not made by this command"):
        packed(corpus)


def test_a_pack_keeps_nothing_temporary(corpus: Path) -> None:
    totals = packed(corpus)
    folder = corpus.parent / "packed" / "train"
    shards = {f"{number:05d}.pcm" for number in range(totals.shards)}
    records = {f"{name}.json" for name in shards}
    assert {path.name for path in folder.iterdir()} - records == {MARKER, INDEX, "19", *shards}
    assert totals[:3] == (20, sum(LENGTHS) / 16_000, 2 * sum(LENGTHS))
