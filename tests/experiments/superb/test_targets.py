"""Targets of ``interstack superb`` that cannot be encoded as they are: unknown words and characters, no phones."""

from pathlib import Path

import pytest

from experiments.cli import run
from lightning_modules.superb import heads
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb


def test_unknown_words_are_listed_or_left_out_and_counted(tmp_path: Path) -> None:
    root = corpora.librispeech(tmp_path / "corpus")
    (transcripts,) = root.glob("LibriSpeech/dev-clean/*/*/*.trans.txt")
    transcripts.write_text(transcripts.read_text().replace("HELLO WORLD", "HELLO ZYZZYVA"))
    with pytest.raises(ValueError, match="the lexicon lacks 1 words of the corpus: ZYZZYVA"):
        superb("pr", "fbank", root, tmp_path / "out")
    result = superb("pr", "fbank", root, tmp_path / "out", "--updates", "1", "--data.unknown_words", "skip")
    assert result["left_out"]["unknown_words"] == {"train": 0, "dev": 1, "test-clean": 0}
    assert {"per", "per_fixed", "per_legacy"} == result["test"].keys()
    assert result["infeasible_for_ctc"] == {"train": 0, "dev": 0, "test-clean": 0}


def test_targets_longer_than_their_frames_are_counted_and_teach_nothing(tmp_path: Path) -> None:
    root = corpora.librispeech(tmp_path / "corpus")
    for split, speaker in (("train-clean-100", 10), ("test-clean", 12)):
        # HELLO WORLD, eight phones and <eos>, in the three frames that 50 ms have.
        corpora.write_tone(root / "LibriSpeech" / split / f"{speaker}" / "7" / f"{speaker}-7-0001.flac", 0.05)
    result = superb("pr", "fbank", root, tmp_path / "out", "--updates", "2")
    assert result["infeasible_for_ctc"] == {"train": 1, "dev": 0, "test-clean": 1}
    assert result["skipped_updates"] == 0
    assert result["utterances"] == {"train": 6, "dev": 2, "test-clean": 2}
    (file,) = (tmp_path / "out" / "pr").glob("*/test-hyp.ark")
    assert len(file.read_text().splitlines()) == 2  # scored all the same


def test_characters_without_a_class_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    table = corpora.table(tmp_path / "corpus")
    lines = table.read_text().splitlines()
    assert lines[1].startswith("audio/train-0.wav")
    lines[1] = lines[1].replace("HELLO WORLD", "CAF\u00c9 24")
    table.write_text("\n".join(lines) + "\n")
    result = superb("asr", "fbank", table, tmp_path / "asr", "--updates", "1")
    assert result["unknown_symbols"] == {"train": 3, "dev": 0, "test": 0, "other": 0}
    assert "task asr lacks 2 4 \u00c9, which become <unk>" in caplog.text
    caplog.clear()
    sound = superb("asr", "fbank", corpora.table(tmp_path / "sound"), tmp_path / "other", "--updates", "1")
    assert set(sound["unknown_symbols"].values()) == {0}
    assert "<unk>" not in caplog.text


def test_pr_without_phones_says_what_to_give(tmp_path: Path) -> None:
    root = corpora.librispeech(tmp_path / "corpus")
    arguments = ["superb", "--task", "pr", "--upstream", "fbank", "--data.root", str(root), "--output", str(tmp_path)]
    with pytest.raises(ValueError, match=r"task pr needs phones: give --data.lexicon"):
        run(arguments)
    with pytest.raises(ValueError, match="'mood': choose all, or some of pr,ks,ic,sid,er,asr,qbe,sf,asv,sd,frames"):
        run([*arguments[:2], "mood", *arguments[3:]])
