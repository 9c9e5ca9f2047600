"""What a run refuses before it trains, and under which names it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.guards import DivergedError
from datamodules.files import read_json
from datamodules.superb.rows import SuperbCorpus
from experiments.records.reading import read_metrics
from experiments.superb import command, running
from experiments.superb.options import RunSettings, TaskData
from experiments.superb.preparation import Prepared, prepare
from experiments.superb.results import summary_of
from lightning_modules.superb import heads
from lightning_modules.superb.classification_tasks import ClassificationTask
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.tasks import TaskInputs
from tests.datamodules.superb import corpora
from tests.experiments.superb.test_command import superb

PRESET_FOLDERS = {"probe": "sid_probe", "superb": "sid"}


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


def test_a_probe_and_the_benchmark_share_an_output_and_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe's rate is the first of the grid."""
    root = corpora.table(tmp_path / "corpus")
    common = ["--updates", "2", "--wandb.mode", "offline", "--trainer.log_every_n_steps", "1"]
    probe = superb("sid", "fbank", root, tmp_path / "out", "--preset", "probe", *common)
    assert "Probes (not comparable with SUPERB)" in capsys.readouterr().out
    full = superb("sid", "fbank", root, tmp_path / "out", "--lr_sweep", "--lr_grid", "[0.1]", *common)
    assert "Probes" not in capsys.readouterr().out
    assert (probe["preset"], full["preset"], probe["lr"]) == ("probe", "superb", full["lr"])
    folders = {preset: tmp_path / "out" / name / "lr0.1_seed1337" for preset, name in PRESET_FOLDERS.items()}
    header = {preset: (folder / "metrics.csv").read_text().splitlines()[0] for preset, folder in folders.items()}
    assert ("probe_dev/accuracy" in header["probe"], "probe" in header["superb"]) == (True, False)
    logged = read_metrics(folders["superb"] / "metrics.csv")
    assert logged["dev/accuracy"].steps.tolist() == [2]  # updates done
    assert logged["train/loss"].steps.tolist() == [1, 2]
    names = {preset: [path.name for path in folder.rglob("*.table.json")] for preset, folder in folders.items()}
    assert len(names["probe"]) == len(names["superb"]) == 2
    assert all(name.startswith("probe_") for name in names["probe"])
    assert not any("probe" in name for name in names["superb"])
    keys = {preset: summary_of(result).keys() for preset, result in (("probe", probe), ("superb", full))}
    assert {"probe_dev", "probe_test", "probe_tests"} == keys["probe"] - keys["superb"]
    assert {"dev", "test", "tests"} == keys["superb"] - keys["probe"]


def test_a_run_keeps_its_wandb_id_and_shares_it_with_none(tmp_path: Path) -> None:
    """Also where another machine has a folder of the same name."""
    folder = tmp_path / "run"
    first = running._wandb_id(folder)
    assert running._wandb_id(folder) == first
    folder.rename(tmp_path / "elsewhere")
    assert running._wandb_id(folder) != first
    assert running._wandb_id(tmp_path / "elsewhere") == first


def test_a_missing_corpus_ends_a_call_of_several_tasks_before_the_first_is_trained(tmp_path: Path) -> None:
    root = corpora.voxceleb1(tmp_path / "corpora")
    with pytest.raises(ValueError, match="Fluent Speech Commands is not there"):
        superb("sid,ic", "fbank", root, tmp_path / "out", "--updates", "1")
    assert not (tmp_path / "out" / "sid").exists()
    corpora.fluent(root)
    superb("sid,ic", "fbank", root, tmp_path / "out", "--updates", "1")
    assert {path.parent.parent.name for path in (tmp_path / "out").glob("*/*/result.json")} == {"sid", "ic"}
    root.rename(tmp_path / "gone")  # what is finished needs no corpus
    superb("sid,ic", "fbank", root, tmp_path / "out", "--updates", "1")


def test_a_run_keeps_its_labels_and_an_earlier_one_gets_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = corpora.table(tmp_path / "corpus")

    def again() -> None:
        superb("sid", "fbank", table, tmp_path / "out", "--updates", "1")

    again()
    (file,) = (tmp_path / "out").glob("sid/*/labels.json")
    kept = read_json(file)
    assert kept == {"labels": [["tone0", "tone1", "tone2"]]}
    file.unlink()
    again()
    assert read_json(file) == kept
    file.unlink()
    table.write_text(table.read_text().replace("tone2", "tone1"))
    again()
    assert "the corpus no longer has the labels of the run" in caplog.text
    table.unlink()
    again()
    assert "the corpus cannot be read: " in caplog.text
    assert not file.exists()


def test_a_sweep_reads_its_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(settings: RunSettings, hop: int) -> Prepared:
        read.append(settings.task)
        return prepare(settings, hop)

    for module in (command, running):
        monkeypatch.setattr(module, "prepare", reading)
    root = corpora.table(tmp_path / "corpus")
    superb("sid", "fbank", root, tmp_path / "out", "--updates", "1", "--lr_sweep", "--lr_grid", "[0.1, 0.01]")
    assert read == ["sid"]


def test_fewer_evaluation_batches_than_processes_are_an_error() -> None:
    """A process without a batch would leave the others waiting; KS scores 32 utterances at a time."""
    rows = {"train": corpora.rows([400]), "dev": corpora.rows([400] * 64), "test": corpora.rows([400] * 65)}
    labels = [["yes"]]
    corpus = SuperbCorpus(rows["train"], rows["dev"], {"test": rows["test"]}, labels)
    prepared = Prepared(build_task("ks", TaskInputs(labels)), corpus, {}, {})
    settings = RunSettings("ks", "fbank", TaskData("none"), "none", "superb", 0.1, 0, 1, 1, 1)
    running._require_batches(prepared, settings, 2)
    with pytest.raises(ValueError, match="'dev' has 2 batches of 32, fewer than 3 processes: use fewer devices"):
        running._require_batches(prepared, settings, 3)
