"""``interstack align``: files beside a corpus, what is listed, kept and tried again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datamodules.alignments import find_audio, read_split
from experiments.cli import run

pytest.importorskip("pocketsphinx")

CHAPTER = Path("test-other") / "533" / "1066"
NAMES = ("533-1066-0003", "533-1066-0006")


@pytest.fixture
def corpus(real_data: Path, tmp_path: Path) -> Path:
    """Two real utterances of one chapter, one with the other's words, and a file that is no audio."""
    folder = tmp_path / "corpus" / CHAPTER
    folder.mkdir(parents=True)
    source = real_data / "LibriSpeech" / CHAPTER
    lines = (source / "533-1066.trans.txt").read_text().splitlines()
    text = dict(line.split(" ", 1) for line in lines)
    for name in NAMES:
        shutil.copyfile(source / f"{name}.flac", folder / f"{name}.flac")
    shutil.copyfile(source / f"{NAMES[0]}.flac", folder / "533-1066-0090.flac")
    (folder / "533-1066-0091.flac").write_bytes(b"no audio")
    texts = {name: text[name] for name in NAMES}
    texts |= {"533-1066-0090": f"{text[NAMES[1]]} XQZV", "533-1066-0091": "HELLO"}
    (folder / "533-1066.trans.txt").write_text("".join(f"{key} {value}\n" for key, value in texts.items()))
    return tmp_path / "corpus"


def align(root: Path, *more: str) -> None:
    run(["align", "--root", str(root), "--splits", "[test-other]", "--workers", "1", *more])


def listed(root: Path) -> dict[str, str]:
    text = (root / "alignments" / "test-other" / "533-1066.unaligned.txt").read_text()
    return dict(line.split("\t", 1) for line in text.splitlines())


def test_what_is_aligned_is_kept_and_the_rest_is_listed_and_tried_again(corpus: Path, tmp_path: Path) -> None:
    align(corpus)
    assert sorted(read_split(corpus, "test-other")) == sorted(NAMES)
    reasons = listed(corpus)
    assert reasons["533-1066-0090"] == "not in the dictionary: xqzv; add them with --lexicon"
    assert "533-1066-0091.flac: cannot be read as audio" in reasons["533-1066-0091"]
    # An alignment that is there is not made again: a mark in it stays.
    (file,) = (corpus / "alignments" / "test-other").glob("*.tsv")
    marked = file.read_text().replace("SIL", "MARK")
    file.write_text(marked)
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("XQZV K S\n")
    align(corpus, "--lexicon", str(lexicon))
    assert file.read_text() == marked
    assert "is the transcript right?" in listed(corpus)["533-1066-0090"]
    transcripts = corpus / CHAPTER / "533-1066.trans.txt"
    words = dict(line.split(" ", 1) for line in transcripts.read_text().splitlines())[NAMES[0]]
    lines = [f"533-1066-0090 {words}" if "XQZV" in line else line for line in transcripts.read_text().splitlines()]
    transcripts.write_text("\n".join(line for line in lines if "0091" not in line) + "\n")
    (corpus / CHAPTER / "533-1066-0091.flac").unlink()
    align(corpus)
    found = read_split(corpus, "test-other")
    assert sorted(found) == sorted([*NAMES, "533-1066-0090"])
    assert [s[1:] for s in found["533-1066-0090"]] == [s[1:] for s in found[NAMES[0]]]  # the same sound and words
    assert not (corpus / "alignments" / "test-other" / "533-1066.unaligned.txt").exists()
    # An alignment whose audio was removed goes too, or readers of alignments would stop at it.
    (corpus / CHAPTER / "533-1066-0090.flac").unlink()
    align(corpus)
    assert sorted(found := read_split(corpus, "test-other")) == sorted(NAMES)
    assert find_audio(corpus, "test-other", found)


def test_a_pack_is_refused(corpus: Path, tmp_path: Path) -> None:
    (corpus / CHAPTER / "533-1066-0091.flac").unlink()
    run(["pack", "--root", str(corpus), "--splits", "[test-other]", "--output", str(tmp_path / "packed")])
    with pytest.raises(ValueError, match="is packed, and a pack has no alignments"):
        align(tmp_path / "packed")
    assert not (tmp_path / "packed" / "alignments").exists()


def test_processes_change_nothing(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus" / "test-other" / "533" / "1067"
    shutil.copytree(corpus / CHAPTER, other)
    for path in other.iterdir():
        path.rename(other / path.name.replace("-1066", "-1067"))
    transcripts = other / "533-1067.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("-1066", "-1067"))
    written = []
    for workers in ("1", "2"):
        output = tmp_path / workers
        align(corpus, "--workers", workers, "--output", str(output))
        written.append({p.name: p.read_bytes() for p in (output / "alignments").rglob("533*")})
    assert written[0] == written[1]
    assert len(written[0]) == 4


def test_alignments_of_a_read_only_corpus_lie_elsewhere(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "aligned"
    for _ in range(2):
        align(corpus, "--output", str(output))
    assert not (corpus / "alignments").exists()
    found = read_split(output, "test-other")
    paths = find_audio(output, "test-other", found)
    assert [path.resolve() for path in paths.values()] == [corpus / CHAPTER / f"{name}.flac" for name in sorted(found)]
    (output / "test-other").unlink()
    (output / "test-other").mkdir()
    with pytest.raises(ValueError, match=r"is not a link to .* choose another --output"):
        align(corpus, "--output", str(output))


def test_nothing_to_align_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "test-other" / "1" / "1"
    folder.mkdir(parents=True)
    noise_T = np.random.default_rng(0).normal(0, 0.01, 16_000)
    soundfile.write(folder / "1-1-0000.flac", noise_T, 16_000)
    with pytest.raises(ValueError, match="there are no transcripts"):
        align(tmp_path)
    (folder / "1-1.trans.txt").write_text("1-1-0000 THE XQZV\n")
    with pytest.raises(ValueError, match=r"^0 of 1 utterances are aligned in .*; the reasons are in"):
        align(tmp_path)
    assert list(tmp_path.rglob("*.tsv")) == []
    with pytest.raises(ValueError, match="there is no split 'dev-clean'"):
        run(["align", "--root", str(tmp_path), "--splits", json.dumps(["dev-clean"])])
