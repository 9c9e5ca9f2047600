"""What a run refuses before it trains, and under which names it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.guards import DivergedError
from experiments.superb import running
from lightning_modules.superb import heads
from lightning_modules.superb.tasks import ClassificationTask
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


def test_a_run_that_would_never_be_scored_is_an_error(tmp_path: Path) -> None:
    root = corpora.table(tmp_path / "corpus")
    with pytest.raises(ValueError, match="--eval_every 3 is more than --updates 2: dev would never be scored"):
        superb("sid", "fbank", root, tmp_path / "out", "--updates", "2", "--eval_every", "3")
    assert not (tmp_path / "out" / "sid").exists()


def test_updates_after_the_last_evaluation_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = corpora.table(tmp_path / "corpus")
    superb("sid", "fbank", root, tmp_path / "even", "--updates", "2", "--eval_every", "1")
    assert "not scored" not in caplog.text
    result = superb("sid", "fbank", root, tmp_path / "odd", "--updates", "3", "--eval_every", "2")
    assert "the last 1 of 3 updates are not scored on dev, which is every 2" in caplog.text
    assert (result["best_step"], result["updates"]) == (2, 3)


def test_a_diverged_run_names_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, calls = ClassificationTask.losses, []

    def bursting(self: ClassificationTask, output: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        return losses(self, output, *rest) * (float("nan") if len(calls) > 8 else 1)

    monkeypatch.setattr(ClassificationTask, "losses", bursting)
    monkeypatch.setattr(running, "MOST_SKIPPED_UPDATES", 2)
    root = corpora.table(tmp_path / "corpus")
    with pytest.raises(DivergedError, match=r"the last good checkpoint is .*/sid/lr0.0001_seed1337/last\.ckpt;"):
        superb("sid", "fbank", root, tmp_path / "out", "--updates", "9", "--eval_every", "1")
