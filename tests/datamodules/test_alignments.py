import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datamodules.alignments import (
    Segment,
    alignment_digest,
    corpus_folder,
    find_audio,
    frame_labels,
    phone_inventory,
    phone_sequence,
    read_alignment,
    read_split,
    write_alignment,
)

HEADER = "utterance\tphone\tstart_seconds\tend_seconds\n"
HELLO = [
    Segment("h", 0.1, 0.2),
    Segment("\u0259", 0.2, 0.25),
    Segment("SIL", 0.3, 0.4),
    Segment("l", 0.4, 0.5),
]


def write(root: Path, text: str, name: str = "1-2", split: str = "train") -> Path:
    path = root / "alignments" / split / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    alignment = {"1-2-0000": HELLO, "1-2-0001": [Segment("a", 0.0, 1.5)]}
    write_alignment(tmp_path / "x.tsv", alignment)
    assert read_alignment(tmp_path / "x.tsv") == alignment
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]
    assert read_alignment(tmp_path / "x.tsv") != {"1-2-0000": HELLO}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be"),
        ("utterance phone start end\n", "first line must be"),
        (HEADER + "u\ta\t0.0\n", "line 2: expected utterance phone"),
        (HEADER + "u\ta\t0.0\tsoon\n", "line 2: expected utterance phone"),
        (HEADER + "u\ta b\t0.0\t0.1\n", "line 2: utterance and phone must be symbols"),
        (HEADER + "u\t\t0.0\t0.1\n", "line 2: utterance and phone must be symbols"),
        (HEADER + "u\ta\t0.0\t0.2\nu\tb\t0.1\t0.3\n", "line 3: phone 'b' runs from 0.1 to 0.3"),
        (HEADER + "u\ta\t0.2\t0.1\n", "line 2: phone 'a' runs from 0.2 to 0.1"),
        (HEADER + "u\ta\t-0.2\t0.1\n", "line 2: phone 'a'"),
        (HEADER + "u\ta\tnan\t0.1\n", "line 2: phone 'a'"),
        (HEADER + "u\ta\t0.1\tinf\n", "line 2: phone 'a'"),
        (HEADER + "u\ta\t0\t1\nv\ta\t0\t1\nu\tb\t1\t2\n", "line 4: utterance u was already given"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_alignment(path)
    assert str(path) in str(error.value)


def test_split_is_read_from_the_corpus_or_its_parent(tmp_path: Path) -> None:
    corpus = tmp_path / "LibriSpeech"
    write(corpus, HEADER + "u\ta\t0\t1\n", name="one")
    write(corpus, HEADER + "v\tb\t0\t1\n", name="two")
    assert corpus_folder(tmp_path) == corpus_folder(corpus) == corpus
    assert read_split(tmp_path, "train") == {"u": [Segment("a", 0, 1)], "v": [Segment("b", 0, 1)]}
    with pytest.raises(ValueError, match=r"no alignments .* of the split 'dev'"):
        read_split(tmp_path, "dev")
    with pytest.raises(ValueError, match="no folder 'alignments'"):
        read_split(tmp_path / "elsewhere", "train")
    write(corpus, HEADER + "u\tc\t0\t1\n", name="three")
    with pytest.raises(ValueError, match=r"three\.tsv: utterance u is aligned in another file"):
        read_split(tmp_path, "train")


def test_digest_changes_with_the_alignments(tmp_path: Path) -> None:
    write(tmp_path, HEADER + "u\ta\t0\t1\n")
    first = alignment_digest(tmp_path, ["train"])
    assert alignment_digest(tmp_path, ["train"]) == first
    write(tmp_path, HEADER + "u\tb\t0\t1\n")
    assert alignment_digest(tmp_path, ["train"]) != first


def test_find_audio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, HEADER + "u\ta\t0\t1\n")
    for name in ("u.flac", "w.wav"):
        path = tmp_path / "train" / "1" / "2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(400), 16_000)
    with caplog.at_level(logging.WARNING):
        assert find_audio(tmp_path, "train", ["u"]) == {"u": tmp_path / "train/1/2/u.flac"}
    assert "1 of 2 audio files" in caplog.text
    with pytest.raises(ValueError, match=r"v \(and 1 more\) is aligned but has no audio file"):
        find_audio(tmp_path, "train", ["u", "v", "x"])
    (tmp_path / "train" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "train" / "1").symlink_to(tmp_path / "elsewhere")
    assert find_audio(tmp_path, "train", ["u"]) == {"u": tmp_path / "train/1/2/u.flac"}
    (tmp_path / "train" / "1" / "2" / "u.WAV").touch()
    with pytest.raises(ValueError, match=r"u\.\w+ and .*u\.\w+ are one utterance twice"):
        find_audio(tmp_path, "train", ["u"])


def test_phone_sequence_keeps_doubled_phones_and_drops_silence() -> None:
    assert phone_sequence([Segment(p, 0, 0) for p in ("SIL", "a", "a", "SIL", "b", "SIL")]) == ["a", "a", "b"]


def test_inventory_has_silence_first() -> None:
    assert phone_inventory([{"u": HELLO}, {"v": [Segment("a", 0, 1)]}]) == ["SIL", "a", "h", "l", "\u0259"]
    assert phone_inventory([{"v": [Segment("a", 0, 1)]}]) == ["SIL", "a"]


def test_label_is_the_phone_at_the_centre_of_the_frame() -> None:
    # Centres lie at 200, 520, 840, 1160 samples: 0.0125, 0.0325, 0.0525, 0.0725 s.
    segments = [Segment("a", 0.0125, 0.0325), Segment("b", 0.0325, 0.05), Segment("a", 0.0725, 0.08)]
    assert frame_labels(segments, 4, ["SIL", "a", "b"]).tolist() == [1, 2, 0, 1]
    later = [Segment(s.phone, s.start_seconds + 1e-6, s.end_seconds + 1e-6) for s in segments]
    assert frame_labels(later, 4, ["SIL", "a", "b"]).tolist() == [0, 1, 0, 0]
    assert frame_labels([], 3, ["SIL", "a"]).tolist() == [0, 0, 0]


def test_labels_of_a_crop_are_a_slice_of_the_whole() -> None:
    phones = ["SIL", "h", "l", "\u0259"]
    whole_F = frame_labels(HELLO, 30, phones)
    assert set(whole_F) == {0, 1, 2, 3}
    assert frame_labels(HELLO, 10, phones, start_sample=5 * 320).tolist() == whole_F[5:15].tolist()
    assert frame_labels(HELLO, 10, phones, start_sample=5 * 320 + 160).tolist() != whole_F[5:15].tolist()


def test_labels_at_another_rate() -> None:
    phones = ["SIL", "h", "l", "\u0259"]
    doubled = [Segment(s.phone, s.start_seconds * 2, s.end_seconds * 2) for s in HELLO]
    assert frame_labels(doubled, 30, phones, sample_rate=8000).tolist() == frame_labels(HELLO, 30, phones).tolist()


def test_unknown_phone_is_an_error() -> None:
    with pytest.raises(KeyError):
        frame_labels(HELLO, 30, ["SIL", "h"])
