"""Files of an earlier version go on working: a packed corpus, a run to resume, a cache of targets, a study, an export.

``data/version_before.tar.xz`` was written by commit 55fa942, by these commands on a tiny teacher of random weights and
tones: ``pack``, ``fit`` (2 epochs of 2 steps, grown from 1 to 2 layers after the first), ``cache-targets`` and
``reproduce``. Of the run's checkpoints it keeps the one before the growth; ``end.json`` has the sum of absolute values
of each of the student's weights at the run's end. Its dropout has torch's random numbers.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from transformers import HubertModel

from datamodules.files import read_json
from experiments.cli import run
from experiments.records.reading import read_run
from experiments.training.fit import DistillationCLI
from lightning_modules import dropout
from tests.holding import NOTE_BEGINNING, beginnings

ARCHIVE = Path(__file__).parent / "data" / "version_before.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The earlier version's folder, which is the current directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def resume(*arguments: str) -> dict[str, float]:
    """Continue the run by its kept configuration; the sum of absolute values of each weight of the student."""
    fit = DistillationCLI(
        ["fit", "--config", "runs/first/config_1.yaml", "--ckpt_path", "last", *arguments, NOTE_BEGINNING]
    )
    weights = fit.model.student.hubert.state_dict()
    return {f"student.hubert.{name}": float(value.double().abs().sum()) for name, value in weights.items()}


def differing(sums: dict[str, float], expected: dict[str, float]) -> list[str]:
    """Names of weights that differ; a key's bias has no gradient but rounding, which AdamW blows up to a whole step."""
    shared = {name: value for name, value in sums.items() if not name.endswith("k_proj.bias")}
    return [name for name, value in shared.items() if value != pytest.approx(expected[name], rel=1e-3, abs=1e-3)]


def test_a_run_resumes_grows_and_ends_as_it_did(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "draws_here", lambda *_: False)
    expected = read_json(old / "end.json")
    sums = resume()
    assert set(sums) <= set(expected)
    assert differing(sums, expected) == []
    assert beginnings(old / "runs" / "first") == [2]
    log = read_run(old / "runs" / "first")
    assert log.finished
    assert log.steps == 4
    assert [mark.plan for mark in log.growth] == [(0, 0)]


def test_control_a_run_of_another_rate_is_refused_and_would_end_elsewhere(old: Path) -> None:
    lower = ("--model.optimizer.lr", "1e-3")
    with pytest.raises(ValueError, match=r"lr was 0\.02, is 0\.001"):
        resume(*lower)
    assert differing(resume(*lower, "--allow-config-change"), read_json(old / "end.json"))


def test_a_cache_of_targets_is_read(old: Path) -> None:
    fit = ["fit", "--config", "runs/first/config_1.yaml", "--name", "cached", "--data.crop", "fixed"]
    DistillationCLI([*fit, "--data.targets", "targets"])
    assert read_json(old / "runs" / "cached" / "summary.json")["steps"] == 4
    with pytest.raises(ValueError, match="segment"):
        DistillationCLI([*fit, "--data.targets", "targets", "--data.segment_seed", "1", "--name", "control"])


def test_a_study_is_finished_and_its_report_is_made_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["reproduce", "study.yaml", "--output", "study", "--root", "packed", "--teacher", "teacher"]
    results = {path: path.read_bytes() for path in (old / "study").glob("jobs/*/*.json")}
    run([*again, "--lexicon", "lexicon.txt"])
    assert len(results) > 10
    assert results == {path: path.read_bytes() for path in results}
    assert len(list((old / "study" / "jobs").iterdir())) == 6  # the ids are the same
    text = (old / "study" / "report.md").read_text()
    assert "Grown" in text
    assert "depth_vs_step.png" in text
    run(["report", "study/results.json", "--output", "again"])
    assert (old / "again" / "report.csv").read_bytes() == (old / "study" / "report.csv").read_bytes()


def test_an_exported_student_loads_and_can_be_a_probes_upstream(old: Path) -> None:
    (student,) = [path.parent for path in (old / "study").glob("jobs/*/student/model.safetensors")]
    states = HubertModel.from_pretrained(student)(torch.zeros(1, 4000), output_hidden_states=True).hidden_states
    assert len(states) == 3
    probe = ["superb", "--task", "pr", "--preset", "probe", "--upstream", str(student), "--data.root", "packed"]
    probe += ["--data.lexicon", "lexicon.txt", "--data.train_splits", "[train]", "--data.dev_splits", "[dev]"]
    probe += ["--data.test_splits", "[dev]", "--updates", "1", "--trainer.accelerator", "cpu", "--output", "probe"]
    run([*probe, "--data.num_workers", "0", "--wandb.mode", "disabled", "--trainer.progress_bar", "false"])
    assert read_json(old / "probe" / "result.json")["task"] == "pr"
