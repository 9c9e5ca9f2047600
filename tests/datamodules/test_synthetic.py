import hashlib
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datamodules import synthetic, voices
from datamodules.alignments import Segment, phone_inventory, read_split
from datamodules.audio import read_audio
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.synthetic import SPLITS, phone_segments, plan_speakers, synthesize_corpus

pytest.importorskip("espeakng_loader")
SETTINGS = {"minutes": 1.0, "voices": 3, "seed": 7}


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize_corpus(tmp_path_factory.mktemp("corpus"), **SETTINGS)


def test_layout_is_that_of_librispeech(corpus: Path) -> None:
    assert {path.name for path in corpus.iterdir()} == {
        *SPLITS, "alignments", "SPEAKERS.TXT", "CHAPTERS.TXT", "synthetic.json",
    }  # fmt: skip
    audio = sorted(corpus.glob("*/*/*/*.flac"))
    assert len(audio) > 6
    for path in audio:
        split, speaker, chapter = path.relative_to(corpus).parts[:3]
        assert split in SPLITS
        assert path.stem[:-5] == f"{speaker}-{chapter}"
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 1.99 < info.duration < 8.01
    for path in corpus.glob("*/*/*/*.trans.txt"):
        lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
        assert [name for name, _ in lines] == [flac.stem for flac in sorted(path.parent.glob("*.flac"))]
        assert all(text == text.upper() and text.replace("'", "").replace(" ", "").isalpha() for _, text in lines)


def test_every_split_has_speakers_of_its_own(corpus: Path) -> None:
    speakers = [{path.name for path in (corpus / split).iterdir()} for split in SPLITS]
    assert all(speakers)
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 3
    table = (corpus / "SPEAKERS.TXT").read_text()
    assert all(f"{name} | " in table for split in speakers for name in split)


def test_the_ordinary_data_module_reads_it(corpus: Path) -> None:
    module = LibriSpeechDataModule(
        root=str(corpus), train_splits=["train-clean-100"], val_splits=["dev-clean"], batch_size=2, num_workers=0,
        cache_dir=str(corpus.parent / "cache"),
    )  # fmt: skip
    module.prepare_data()
    module.setup("fit")
    assert module.example_batch(2).waveforms.shape[0] == 2


def test_same_settings_give_the_same_files(corpus: Path, tmp_path: Path) -> None:
    assert digests(synthesize_corpus(tmp_path / "again", **SETTINGS)) == digests(corpus)
    assert digests(synthesize_corpus(tmp_path / "other", **SETTINGS | {"seed": 8})) != digests(corpus)


def test_finished_corpus_is_kept_and_others_are_refused(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert synthesize_corpus(corpus.parent, **SETTINGS) == corpus
    with pytest.raises(ValueError, match="made with seed 7 instead of 8"):
        synthesize_corpus(corpus.parent, **SETTINGS | {"seed": 8})
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_a_real_corpus_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not made by this command"):
        synthesize_corpus(tmp_path, **SETTINGS, overwrite=True)


def test_alignments_cover_the_audio_and_hear_its_pauses(corpus: Path) -> None:
    loud: dict[bool, list[float]] = {True: [], False: []}
    for split in SPLITS:
        for utterance, segments in read_split(corpus, split).items():
            speaker, chapter, _ = utterance.split("-")
            samples_T = read_audio(str(corpus / split / speaker / chapter / f"{utterance}.flac"))
            assert segments[0].start_seconds == 0
            assert segments[-1].end_seconds == pytest.approx(len(samples_T) / 16_000, abs=2e-4)
            assert all(a.end_seconds == b.start_seconds for a, b in pairwise(segments))
            for segment in segments:
                # The 10 ms at each end belong to the transition.
                start, end = (round(16_000 * t) for t in (segment.start_seconds + 0.01, segment.end_seconds - 0.01))
                if end > start:
                    energy = float(np.mean(np.square(samples_T[start:end])))
                    loud[segment.phone == "SIL"].append(energy)
    assert len(loud[True]) > 10
    assert np.median(loud[True]) < 0.01 * np.median(loud[False])


def test_phones_are_ipa_without_stress(corpus: Path) -> None:
    phones = phone_inventory([read_split(corpus, split) for split in SPLITS])
    assert phones[0] == "SIL"
    assert {"s", "n", "t", "\u0259", "\u00f0"} <= set(phones)
    assert not any(mark in phone for phone in phones for mark in "\u02c8\u02cc:")


def test_segments_from_events() -> None:
    events = [(0, "\u02c8a\u026a"), (10, "t"), (20, ""), (30, ""), (40, "b"), (40, "i:"), (60, "")]
    assert phone_segments(events, 60, sample_rate=10) == [
        Segment("a\u026a", 0, 1), Segment("t", 1, 2), Segment("SIL", 2, 4), Segment("i\u02d0", 4, 6),
    ]  # fmt: skip
    assert phone_segments([(5, "a")], 10, sample_rate=10) == [Segment("SIL", 0, 0.5), Segment("a", 0.5, 1)]


def test_speakers_are_planned_by_split() -> None:
    speakers = plan_speakers(20, 12, seed=0)
    assert [sum(speaker.split == split for speaker in speakers) for split in SPLITS] == [8, 2, 2]
    assert len({speaker.voice for speaker in plan_speakers(60, 24, seed=0)}) == 24
    accents = {split: {s.voice.name.split("+")[0] for s in speakers if s.split == split} for split in SPLITS}
    assert accents["dev-clean"] == accents["test-clean"] == accents["train-clean-100"] == {"en-us", "en"}
    for arguments, message in [
        ((20, 2, 0), "voices=2"),
        ((20, 103, 0), "voices=103 must be between 3 .* and 102"),
        ((1, 12, 0), "minutes=1"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_speakers(*arguments)


@pytest.mark.ci
@pytest.mark.parametrize("count", [24, pytest.param(102, marks=pytest.mark.slow)])
def test_every_voice_speaks(count: int, tmp_path: Path) -> None:
    root = synthesize_corpus(tmp_path, minutes=count * 8 / 60, voices=count, seed=0)
    assert len(list(root.glob("*/*"))) == count + len(SPLITS)  # speakers, and their splits' alignments


def test_unknown_voice_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = voices.VOICES[0]._replace(name="en-xx+nobody")
    monkeypatch.setattr(voices, "VOICES", (broken, *voices.VOICES[1:]))
    with pytest.raises(ValueError, match=r"could not speak as en-xx.nobody: .*has no voice"):
        synthesize_corpus(tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []  # nothing half done stays


def test_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"pip install 'interstack\[synthetic\]'"):
        synthesize_corpus(tmp_path, **SETTINGS)


def test_data_in_a_deep_folder(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library keeps 160 bytes of its data path; a virtual environment can lie deeper than that."""
    library = synthetic._library()
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    (deep / "data").symlink_to(library["data"])
    monkeypatch.setattr(synthetic, "_library", lambda: library | {"data": str(deep / "data")})
    assert digests(synthesize_corpus(tmp_path / "out", **SETTINGS)) == digests(corpus)
