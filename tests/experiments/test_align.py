"""``interstack align`` on real speech: phones, times, what cannot be aligned, and calls that go on."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.alignments import Segment, phone_sequence, read_alignment, read_split
from datamodules.audio import read_audio
from datamodules.forced_alignment import AlignmentError, PhoneAligner
from experiments.align import UNALIGNED, align
from experiments.cli import run

SPLIT, CHAPTER = "test-other", ("2414", "128291")
UNKNOWN = "2414-128291-0009"  # "kine" is not in the dictionary
PHONES = """AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"""


@pytest.fixture(scope="module")
def chapter(real_data: Path) -> Path:
    return real_data / "LibriSpeech" / SPLIT / CHAPTER[0] / CHAPTER[1]


@pytest.fixture
def corpus(chapter: Path, tmp_path: Path) -> Path:
    """Links to four short utterances, with their transcripts."""
    place = tmp_path / "corpus" / SPLIT / CHAPTER[0] / CHAPTER[1]
    place.mkdir(parents=True)
    known = [path for path in sorted(chapter.glob("*.flac")) if path.stem != UNKNOWN]
    for path in sorted(known, key=lambda path: path.stat().st_size)[:4]:
        (place / path.name).symlink_to(path)
    shutil.copyfile(transcripts(chapter), transcripts(place))
    return tmp_path / "corpus"


def transcripts(folder: Path) -> Path:
    return folder / f"{CHAPTER[0]}-{CHAPTER[1]}.trans.txt"


def change(corpus: Path, utterance: str, text: str) -> None:
    file = transcripts(corpus / SPLIT / CHAPTER[0] / CHAPTER[1])
    file.write_text(re.sub(rf"(?m)^({utterance}) .*$", rf"\1 {text}", file.read_text()))


def first(corpus: Path) -> str:
    return min(path.stem for path in corpus.rglob("*.flac"))


def unaligned(corpus: Path) -> Path:
    return corpus / "alignments" / SPLIT / f"{'-'.join(CHAPTER)}{UNALIGNED}"


def is_loud(samples_T: np.ndarray, segment: Segment) -> float:
    part_T = samples_T[int(segment.start_seconds * 16_000) : int(segment.end_seconds * 16_000)]
    return float(np.sqrt(np.mean(part_T**2))) if len(part_T) else 0.0


def test_phones_follow_one_another_within_the_file_and_silence_is_quiet(corpus: Path) -> None:
    run(["align", "--root", str(corpus), "--splits", f"[{SPLIT}]", "--workers", "1"])
    found = read_split(corpus, SPLIT)
    assert found.keys() == {path.stem for path in corpus.rglob("*.flac")}
    quiet, loud = [], []
    for path in corpus.rglob("*.flac"):
        segments, samples_T = found[path.stem], read_audio(str(path))
        assert segments[-1].end_seconds <= len(samples_T) / 16_000 + 0.05
        for segment in segments:
            (quiet if segment.phone == "SIL" else loud).append(is_loud(samples_T, segment))
    assert np.mean(quiet) < 0.3 * np.mean(loud)
    assert {segment.phone for row in found.values() for segment in row} - {"SIL"} < set(PHONES.split())


def test_an_alignment_depends_on_its_utterance_alone(corpus: Path) -> None:
    paths = sorted(corpus.rglob("*.flac"))
    lines = transcripts(paths[0].parent).read_text().splitlines()
    texts = dict(line.split(maxsplit=1) for line in lines)
    forwards, backwards = (
        {path: aligner.align(read_audio(str(path)), texts[path.stem]) for path in order}
        for aligner, order in ((PhoneAligner(), paths), (PhoneAligner(), paths[::-1]))
    )
    assert forwards == backwards
    assert len({tuple(segments) for segments in forwards.values()}) == len(paths)


def test_what_cannot_be_aligned_is_listed_and_tried_again(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    utterance = first(corpus)
    change(corpus, utterance, "BLORPINESS")
    align(str(corpus), [SPLIT])
    assert "1 of 4 utterances could not be aligned" in caplog.text
    assert unaligned(corpus).read_text().startswith(f"{utterance}\tnot in the dictionary: blorpiness; add")
    assert utterance not in read_split(corpus, SPLIT)
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("BLORPINESS B L AO1 R P IY0 N AH0 S\n")
    align(str(corpus), [SPLIT], lexicon=str(lexicon), workers=1)
    assert not unaligned(corpus).exists()
    assert phone_sequence(read_split(corpus, SPLIT)[utterance]) == ["B", "L", "AO", "R", "P", "IY", "N", "AH", "S"]


def test_a_finished_chapter_is_left_alone(corpus: Path) -> None:
    align(str(corpus), [SPLIT], workers=1)
    (file,) = (corpus / "alignments").rglob("*.tsv")
    before = file.stat().st_mtime_ns
    change(corpus, first(corpus), "HELLO")
    align(str(corpus), [SPLIT], workers=1)
    assert file.stat().st_mtime_ns == before
    file.unlink()
    align(str(corpus), [SPLIT], workers=1)  # control
    assert phone_sequence(read_alignment(file)[first(corpus)])[-2:] == ["L", "OW"]


def test_reasons_are_given(corpus: Path) -> None:
    aligner, samples_T = PhoneAligner(), read_audio(str(next(corpus.rglob("*.flac"))))
    with pytest.raises(AlignmentError, match="it has no transcript"):
        aligner.align(samples_T, " ")
    with pytest.raises(AlignmentError, match="no path through its words fits the audio"):
        aligner.align(samples_T[:3200], "a hundred words do not fit into a fifth of a second of speech by anyone")


def test_a_corpus_without_transcripts_or_with_nothing_right_is_refused(corpus: Path) -> None:
    change(corpus, r"\S+", "BLORPINESS")
    with pytest.raises(ValueError, match=rf"no utterance of \S+ could be aligned: see \S+{UNALIGNED}"):
        align(str(corpus), [SPLIT], workers=1)
    transcripts(corpus / SPLIT / CHAPTER[0] / CHAPTER[1]).unlink()
    with pytest.raises(ValueError, match=r"has no transcripts \(SPEAKER-CHAPTER\.trans\.txt\) in test-other"):
        align(str(corpus), [SPLIT])


def test_without_pocketsphinx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(ValueError, match=r"pip install 'interstack\[align\]'"):
        PhoneAligner()
