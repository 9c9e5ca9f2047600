"""The cached table: contents, rebuilding exactly when the corpus changes, interruption, and size."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules import manifest as manifest_module
from datamodules.corpus import CorpusSettings
from datamodules.manifest import (
    Manifest,
    default_cache_dir,
    load_manifest,
    prepare_manifest,
    write_manifest,
)
from datamodules.scanning import Row
from tests.datamodules.corpora import storage_fault, utterance, write_audio, write_corpus, write_transcripts
from tests.processes import ended, fork

LIBRISPEECH_960H_ROWS = 281_241


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", {"train": [700, 500, 600], "dev": [500]})


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every build."""
    done: list[int] = []
    scan = manifest_module.scan

    def counted(files, settings):  # type: ignore[no-untyped-def]
        done.append(len(files))
        return scan(files, settings)

    monkeypatch.setattr(manifest_module, "scan", counted)
    return done


def settings(corpus: Path, **others: object) -> CorpusSettings:
    return CorpusSettings(roots=(str(corpus),), splits=("train",), **others)  # type: ignore[arg-type]


def test_columns(corpus: Path, cache: str) -> None:
    manifest = prepare_manifest(settings(corpus), cache)
    assert len(manifest) == 3
    assert manifest.num_samples.tolist() == [700, 500, 600]
    assert manifest.num_samples.dtype == np.int64
    assert manifest.path(1) == str(utterance(corpus, 1))
    assert manifest.speaker(1) == "19"
    assert manifest.utterance_id(1) == "19-198-0001"
    assert manifest.transcript(1) == "WORD 1"
    assert load_manifest(settings(corpus), cache).row_hash == manifest.row_hash


def test_an_empty_transcript_is_not_a_missing_one(corpus: Path, cache: str) -> None:
    utterance(corpus, 0).with_name("19-198.trans.txt").write_text("19-198-0000\n19-198-0001 A\n")
    manifest = prepare_manifest(settings(corpus), cache)
    assert [manifest.transcript(row) for row in range(3)] == ["", "A", None]
    assert manifest.without_transcript == len(manifest) - 2


def test_an_unchanged_corpus_is_not_read_again(corpus: Path, cache: str, builds: list[int]) -> None:
    prepare_manifest(settings(corpus), cache)
    prepare_manifest(settings(corpus), cache)
    assert len(builds) == 1


def touch(corpus: Path) -> None:
    os.utime(utterance(corpus, 0), ns=(1, 1))


def append(corpus: Path) -> None:
    path = utterance(corpus, 0)
    before = path.stat()
    with path.open("ab") as file:
        file.write(b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add_file(corpus: Path) -> None:
    write_audio(utterance(corpus, 3), 800)


def remove_file(corpus: Path) -> None:
    utterance(corpus, 2).unlink()


def change_text(corpus: Path) -> None:
    write_transcripts(corpus, [0, 1])


@pytest.mark.parametrize("change", [touch, append, add_file, remove_file, change_text])
def test_a_changed_corpus_is_read_again(corpus: Path, cache: str, builds: list[int], change) -> None:  # type: ignore[no-untyped-def]
    old = prepare_manifest(settings(corpus), cache)
    change(corpus)
    new = prepare_manifest(settings(corpus), cache)
    assert len(builds) == 2
    assert load_manifest(settings(corpus), cache).folder == new.folder != old.folder
    assert Manifest(old.folder).num_samples.tolist() == [700, 500, 600]  # still there for a run that uses it


def test_a_change_in_another_split_does_not_matter(corpus: Path, cache: str, builds: list[int]) -> None:
    prepare_manifest(settings(corpus), cache)
    write_audio(utterance(corpus, 1, split="dev"), 900)
    prepare_manifest(settings(corpus), cache)
    assert len(builds) == 1


@pytest.mark.parametrize(
    "others",
    [
        {"min_samples": 401},
        {"sample_rate": 8000, "resample": True, "min_samples": 9},
        {"on_bad_audio": "skip"},
    ],
)
def test_settings_that_matter_have_manifests_of_their_own(
    corpus: Path, cache: str, builds: list[int], others: dict[str, object]
) -> None:
    first = prepare_manifest(settings(corpus), cache)
    second = prepare_manifest(settings(corpus, **others), cache)
    assert first.folder != second.folder
    assert load_manifest(settings(corpus), cache).folder == first.folder


def test_the_row_hash_does_not_depend_on_the_place(tmp_path: Path, corpus: Path, cache: str) -> None:
    here = prepare_manifest(settings(corpus), cache)
    there = prepare_manifest(settings(write_corpus(tmp_path / "b", {"train": [700, 500, 600]})), cache)
    other = prepare_manifest(settings(write_corpus(tmp_path / "c", {"train": [700, 500, 601]})), cache)
    assert here.row_hash == there.row_hash != other.row_hash


def test_skipped_files_are_kept_in_the_manifest(corpus: Path, cache: str) -> None:
    bad = write_audio(utterance(corpus, 3), 10)
    prepare_manifest(settings(corpus, on_bad_audio="skip"), cache)
    skipped = load_manifest(settings(corpus, on_bad_audio="skip"), cache).skipped
    assert [(problem.path, problem.reason[:12]) for problem in skipped] == [(str(bad), "is too short")]


def test_loading_before_preparing_is_an_error(corpus: Path, cache: str) -> None:
    with pytest.raises(ValueError, match=r"no manifest of train in .* call prepare_data first"):
        load_manifest(settings(corpus), cache)


def prepare_and_die(corpus: Path, cache: str) -> None:
    save = np.save

    def save_and_die(path: str, array: np.ndarray) -> None:
        save(path, array)
        if path.endswith("speaker.npy"):
            os._exit(9)

    np.save = save_and_die  # type: ignore[assignment]
    prepare_manifest(settings(corpus), cache)


def test_a_killed_build_is_not_taken_for_a_finished_one(corpus: Path, cache: str, builds: list[int]) -> None:
    assert ended(fork(prepare_and_die, corpus, cache)) == 9
    assert list(Path(cache).rglob("num_samples.npy"))  # it did get to writing
    with pytest.raises(ValueError, match="no manifest"):
        load_manifest(settings(corpus), cache)
    assert prepare_manifest(settings(corpus), cache).speaker(2) == "19"
    assert len(builds) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, array: np.ndarray) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space left"):
        write_manifest(str(tmp_path / "key" / "signature"), made_up_rows(3))
    assert list((tmp_path / "key").iterdir()) == []


def test_a_manifest_that_is_there_is_used_without_a_write(
    corpus: Path, cache: str, builds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_manifest(settings(corpus), cache)
    monkeypatch.setattr(manifest_module, "write_text", None)  # a shared cache may be read-only
    assert len(prepare_manifest(settings(corpus), cache)) == len(load_manifest(settings(corpus), cache))
    assert len(builds) == 1


def test_a_failing_storage_makes_no_manifest(corpus: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = sorted((corpus / "train").rglob("*.flac"))[0]
    monkeypatch.setattr("datamodules.audio.os.stat", storage_fault(failing, errno.ESTALE))
    with pytest.raises(OSError, match=f"{os.strerror(errno.ESTALE)}.*{failing.name}"):
        prepare_manifest(settings(corpus, on_bad_audio="skip"), cache)
    monkeypatch.setattr("datamodules.audio.os.stat", storage_fault(failing, errno.ENOENT))
    assert len(prepare_manifest(settings(corpus, on_bad_audio="skip"), cache).skipped) == 1  # control


def test_two_processes_may_finish_the_same_manifest(tmp_path: Path) -> None:
    for _ in range(2):
        write_manifest(str(tmp_path / "m"), made_up_rows(3))
    assert len(Manifest(str(tmp_path / "m"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == "/somewhere/interstack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == os.path.expanduser("~/.cache/interstack")


def test_960_hours_load_without_reading_them_and_without_a_copy_per_worker(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "big"), made_up_rows(LIBRISPEECH_960H_ROWS))
    manifest = Manifest(str(tmp_path / "big"))
    last = LIBRISPEECH_960H_ROWS - 1
    assert manifest.utterance_id(last) == f"19-198-{last}"
    assert manifest.transcript(last) == f"WORD {last}"
    strings = (manifest._paths, manifest._speakers, manifest._transcripts)
    columns = [manifest.num_samples, *(part for text in strings for part in (text._blob, text._offsets))]
    assert all(isinstance(column, np.memmap) for column in columns)
    assert len(pickle.dumps(manifest)) < 500  # a spawned worker gets the name of the folder
    assert len(pickle.loads(pickle.dumps(manifest))) == LIBRISPEECH_960H_ROWS


def made_up_rows(num_rows: int) -> list[Row]:
    lengths = np.random.default_rng(0).integers(16000, 280_000, num_rows)
    return [
        Row(f"/c/train/19/198/19-198-{row}.flac", f"train/19/198/19-198-{row}.flac", n, "19", f"WORD {row}")
        for row, n in enumerate(lengths.tolist())
    ]


@pytest.mark.parametrize(
    ("root", "split", "rows"),
    [
        ("LibriSpeech", "train-clean-100", 144),
        ("LibriSpeech_many_speakers", "train-clean-100", 125),
        ("LibriSpeech_mp3", "dev-clean", 1003),
    ],
)
def test_real_corpora(real_data: Path, cache: str, root: str, split: str, rows: int) -> None:
    manifest = prepare_manifest(CorpusSettings(roots=(str(real_data / root),), splits=(split,)), cache)
    assert len(manifest) == rows
    listed = (real_data / "manifest.tsv").read_text(encoding="utf-8").splitlines()
    expected = {line.split("\t")[1]: line.split("\t") for line in listed}
    for row in range(0, rows, 17):
        fields = expected[os.path.relpath(manifest.path(row), real_data)]
        assert manifest.num_samples[row] == int(fields[3])
        assert manifest.speaker(row) == fields[5]
        assert (manifest.transcript(row) or "") == fields[8]
