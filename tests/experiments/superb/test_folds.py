"""ER: a run for each fold of IEMOCAP, and their mean."""

import json
from pathlib import Path

import pytest

from experiments.superb import command
from experiments.superb.options import RunSettings
from experiments.superb.preparation import Prepared
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb
from tests.helpers import save_teacher

FOLDS = [f"fold{number}" for number in range(1, 6)]


@pytest.mark.ci
def test_the_result_is_the_mean_over_five_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, teacher = corpora.iemocap(tmp_path / "corpus"), save_teacher(tmp_path / "teacher")
    mean = superb("er", teacher, root, tmp_path / "out", "--updates", "8", "--lr", "1e-2")
    folder = tmp_path / "out" / "er" / "lr0.01_seed1337"
    folds = {fold: json.loads((folder / fold / "result.json").read_text()) for fold in FOLDS}
    for split in ("dev", "test"):
        scores = [result[split]["accuracy"] for result in folds.values()]
        assert mean[split]["accuracy"] == pytest.approx(sum(scores) / 5)
        assert all(mean["folds"][fold][split] == result[split] for fold, result in folds.items())
    assert len({result["test"]["accuracy"] for result in folds.values()}) > 1  # else any fold would be the mean
    assert mean["tests"] == {"test": mean["test"]}
    assert (mean["fold"], mean["task"], mean["updates"], mean["batch_size"]) == ("mean of 5", "er", 8, 32)
    for number, fold in enumerate(FOLDS, 1):
        lines = (folder / fold / f"test_{fold}_truth.txt").read_text().splitlines()
        assert lines[0] == f"Ses{number:02d}F_impro01_F000 neu"
        assert len((folder / fold / f"test_{fold}_predict.txt").read_text().splitlines()) == 4
    # Finished folds are kept; only the one that is missing is run again, to the same result.
    (folder / "fold3" / "result.json").unlink()
    ran: list[str] = []
    prepare = command.prepare

    def preparing(run: RunSettings, hop: int) -> Prepared:
        ran.append(run.fold)
        return prepare(run, hop)

    monkeypatch.setattr(command, "prepare", preparing)
    again = superb("er", teacher, root, tmp_path / "out", "--updates", "8", "--lr", "1e-2")
    assert ran == ["fold3"]
    assert again["test"] == mean["test"]


@pytest.mark.ci
def test_a_sweep_chooses_by_the_mean_on_dev(tmp_path: Path) -> None:
    root, teacher = corpora.iemocap(tmp_path / "corpus"), save_teacher(tmp_path / "teacher")
    superb("er", teacher, root, tmp_path / "out", "--updates", "2", "--lr_sweep", "--lr_grid", "[0.1, 0.001]")
    choice = json.loads((tmp_path / "out" / "er" / "chosen_seed1337.json").read_text())
    means = {
        lr: json.loads((tmp_path / "out" / "er" / f"lr{lr}_seed1337" / "result.json").read_text())["dev"]["accuracy"]
        for lr in ("0.1", "0.001")
    }
    assert choice["dev"] == means
    assert choice["chosen_lr"] == float(max(means, key=lambda lr: means[lr]))


def test_a_table_has_no_folds_and_the_probe_has_them(tmp_path: Path) -> None:
    result = superb("er", "fbank", corpora.table(tmp_path / "corpus"), tmp_path / "out", "--updates", "1")
    assert (result["fold"], list(result["tests"])) == ("", ["test", "other"])
    root = corpora.iemocap(tmp_path / "iemocap")
    probe = superb("er", "fbank", root, tmp_path / "probe", "--updates", "1", "--preset", "probe")
    assert list(probe["folds"]) == FOLDS
    assert probe["test"]["accuracy"] == 25.0  # features with mean 0: one class for all, as in SUPERB's table
