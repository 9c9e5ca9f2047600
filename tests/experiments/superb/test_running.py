"""What a run refuses before it trains, and under which names it writes."""

from pathlib import Path

import pytest

from lightning_modules.superb import heads
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb


@pytest.mark.parametrize(
    ("task", "files"),
    [
        ("pr", {"test-other-hyp.ark": "13", "test-hyp.ark": "12"}),
        ("asr", {"test-other-noLM-hyp.ark": "13", "test-clean-noLM-hyp.ark": "12"}),
    ],
)
def test_a_test_set_is_written_under_its_own_name(
    task: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LibriSpeech's speakers, one for each split, say which set a file really holds."""
    monkeypatch.setattr(heads, "LSTM_WIDTH", 4)
    root = corpora.librispeech(tmp_path / "corpus")
    more = ["--updates", "1", "--data.test_splits", "[test-other, test-clean]"]
    superb(task, "fbank", root, tmp_path / "out", *more)
    (folder,) = (tmp_path / "out" / task).iterdir()
    texts = {path.name: path.read_text().splitlines() for path in folder.glob("*-hyp.ark")}
    found = {name: {line.partition("-")[0] for line in lines} for name, lines in texts.items()}
    assert found == {name: {speaker} for name, speaker in files.items()}


def test_two_test_sets_for_one_file_are_an_error(tmp_path: Path) -> None:
    table = corpora.table(tmp_path / "corpus")
    table.write_text(table.read_text().replace("\tother\t", "\ttest-clean\t"))
    with pytest.raises(ValueError, match=r"'test' and 'test-clean' would both be written to test_predict.txt"):
        superb("sid", "fbank", table, tmp_path / "out")
    assert not (tmp_path / "out" / "sid").exists()
