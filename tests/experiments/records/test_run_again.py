"""A run started anew from its kept configuration, and a longer run that starts from a finished one's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.training.fit import DistillationCLI
from tests import tiny_run
from tests.callbacks.test_checkpointing import equal


@pytest.fixture(scope="module")
def home(inputs: Path) -> Path:
    """``runs/whole``: a finished run."""
    fit(inputs, "whole")
    return inputs


def fit(home: Path, name: str, *arguments: str) -> DistillationCLI:
    return tiny_run.fit(home, "--name", name, *arguments)


def checkpoint(home: Path, name: str = "whole", file: str = "last.ckpt") -> Path:
    return home / "runs" / name / "checkpoints" / file


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.ci
def test_a_kept_configuration_starts_the_same_run_anew_whatever_attempt_it_is_from(home: Path) -> None:
    first = checkpoint(home, "resumed", "step=000000006.ckpt")
    first.parent.mkdir(parents=True)
    shutil.copy(checkpoint(home, file="step=000000006.ckpt"), first)
    fit(home, "resumed", "--ckpt_path", str(first), "--allow-config-change")
    kept = home / "runs" / "resumed" / "config_1.yaml"
    assert json.loads((home / "runs" / "resumed" / "run.json").read_text())["attempts"][0]["resumed_from"] == str(first)

    anew = DistillationCLI(["fit", "--config", str(kept), "--name", "anew"])
    (attempt,) = json.loads((home / "runs" / "anew" / "run.json").read_text())["attempts"]
    assert attempt["resumed_from"] is None
    assert anew.config.fit.allow_config_change is False
    assert (home / "runs" / "anew" / "metrics.csv").read_text().splitlines()[1].startswith("1,")
    assert equal(load(checkpoint(home)), load(checkpoint(home, "anew")))


@pytest.mark.ci
def test_a_finished_run_keeps_its_record_whatever_machine_asks_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = home / "runs" / "whole"
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "run.lock"}
    monkeypatch.setattr("callbacks.summary.hardware", lambda *_: "another machine")
    monkeypatch.setattr("experiments.records.runs.git_commit", lambda: "another commit")
    fit(home, "whole", "--ckpt_path", "last")
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "run.lock"} == before
    (run / "summary.json").unlink()  # control: as if it had been interrupted before it wrote its summary
    fit(home, "whole", "--ckpt_path", "last")
    assert json.loads((run / "summary.json").read_text())["hardware"] == "another machine"
    assert len(json.loads((run / "run.json").read_text())["attempts"]) == 2


def test_a_wandb_id_belongs_to_one_run(home: Path) -> None:
    settings = ["--wandb.mode", "disabled", "--trainer.max_epochs", "4"]
    fit(home, "named", "--wandb.id", "mine", *settings)
    run = home / "runs" / "named"
    assert json.loads((run / "run.json").read_text())["wandb_id"] == "mine"
    DistillationCLI(["fit", "--config", str(run / "config_1.yaml"), "--name", "other"])
    assert json.loads((home / "runs" / "other" / "run.json").read_text())["wandb_id"] != "mine"


STILL = ["--growth.policy", "none", "--model.optimizer.lr", "0", "--trainer.max_epochs", "6"]


def student(path: Path) -> dict[str, Any]:
    return {name: value for name, value in load(path)["state_dict"].items() if torch.is_tensor(value)}


@pytest.mark.ci
def test_a_longer_run_starts_from_the_weights_of_a_finished_one(home: Path) -> None:
    cli = fit(home, "longer", "--model.init_from", str(checkpoint(home)), *STILL)
    assert cli.trainer.global_step == 18
    before, after = student(checkpoint(home)), student(checkpoint(home, "longer"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert load(checkpoint(home, "longer"))["interstack"]["recipe"]["init_from"] == str(checkpoint(home))
    fit(home, "control", *STILL)
    other = student(checkpoint(home, "control"))
    assert not all(torch.equal(value, other[name]) for name, value in before.items())


@pytest.mark.ci
def test_it_resumes_without_the_file_that_it_started_from(home: Path) -> None:
    source = shutil.copy(checkpoint(home), home / "source.ckpt")
    settings = ["--model.init_from", str(source), "--growth.policy", "none"]
    fit(home, "started", *settings)
    (home / "source.ckpt").unlink()
    middle = checkpoint(home, "started", "step=000000005.ckpt")
    end = load(checkpoint(home, "started"))
    cli = fit(home, "started", *settings, "--ckpt_path", str(middle))
    assert cli.trainer.global_step == 12
    assert equal(end, load(checkpoint(home, "started")))


def test_a_stage_may_be_what_a_growing_run_starts_from(home: Path) -> None:
    first_stage = checkpoint(home, file="stage_1.ckpt")
    cli = fit(home, "grown", "--model.init_from", str(first_stage), "--growth.policy", "midas")
    assert cli.model.student.depth == 4


def test_projections_of_other_losses_start_anew(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = [
        "--model.init_from",
        str(checkpoint(home)),
        "--growth.policy",
        "none",
        "--model.objective.layers",
        "[1]",
    ]
    fit(home, "other_losses", *settings, "--model.objective.intermediate", "l2l")
    assert "the projections of" in caplog.text


def test_layers_that_have_moved_cannot_be_the_first_ones_of_their_targets(home: Path) -> None:
    start = ["--model.init_from", str(checkpoint(home)), "--growth.policy", "none", "--trainer.max_epochs", "1"]
    l2l = ["--model.objective.intermediate", "l2l", "--model.objective.layers", "[1]"]
    with pytest.raises(ValueError, match=r"last.ckpt has grown, .*attach=original takes them: set it to block_end"):
        fit(home, "moved", *start, *l2l, "--model.objective.attach", "original")


@pytest.mark.ci
def test_statistics_of_targets_are_those_of_the_new_run(home: Path) -> None:
    """Those of the source would be taken for measured ones, of whatever layers and speech they are."""
    standard = ["--model.objective.normalize_targets", "standardize", *STILL[:2], "--trainer.max_epochs", "1"]
    layers = "--model.objective.layers"
    source = fit(home, "standardized", *standard, layers, "[1]", "--model.objective.statistics_seconds", "0.5")
    start = ["--model.init_from", str(checkpoint(home, "standardized"))]
    for chosen in ("[1]", "[1, 3]"):  # with the source's layers its projections are taken, and its statistics are not
        anew = fit(home, f"anew {chosen}", *standard, layers, chosen).model.objective.normalizer.statistics
        found = fit(home, f"started {chosen}", *standard, layers, chosen, *start).model.objective.normalizer.statistics
        assert torch.equal(found.mean_SD, anew.mean_SD)
        assert torch.equal(found.deviation_SD, anew.deviation_SD)
        assert not torch.equal(found.mean_SD[0], source.model.objective.normalizer.mean_SD[0])  # control


REFUSED = {
    "another depth": (
        ["--model.init_from", "LAST"],
        r"model.init_from=.*last.ckpt has 4 layers, but this run begins with 1: add --growth.policy none",
    ),
    "another width": (
        ["--model.init_from", "LAST", "--growth.policy", "none", "--model.student.hidden_size", "32"],
        r"last.ckpt has a student of other sizes: .*size mismatch",
    ),
    "no file": (["--model.init_from", "none.ckpt"], r"there is no checkpoint 'none.ckpt'"),
    "damaged": (["--model.init_from", "DAMAGED"], r"damaged.ckpt is damaged \(.* cut off"),
    "finished, elsewhere": (
        ["--ckpt_path", "LAST"],
        r"last.ckpt is of a finished run of 4 epochs: nothing is left to train. "
        r"A new run, with a schedule of its own, starts from these weights by --model.init_from .*last.ckpt and "
        r"another --name \(--growth.policy none, or a policy whose first stage has 4 layers\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_from_is_refused_with_the_way_on(name: str, home: Path) -> None:
    damaged = home / "damaged.ckpt"
    damaged.write_bytes(checkpoint(home).read_bytes()[:1000])
    settings, message = REFUSED[name]
    places = {"LAST": str(checkpoint(home)), "DAMAGED": str(damaged)}
    with pytest.raises(ValueError, match=message):
        fit(home, f"refused {name}", *(places.get(setting, setting) for setting in settings))
    assert not checkpoint(home, f"refused {name}").exists()


def test_a_finished_run_that_is_continued_says_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(home, "whole", "--ckpt_path", "last")
    assert "is of a finished run of 4 epochs: nothing is left to train" in caplog.text


@pytest.mark.parametrize("allowed", [False, True])
def test_more_epochs_of_a_finished_run_are_refused_with_the_way_on(allowed: bool, home: Path) -> None:
    before, record = checkpoint(home).read_bytes(), (home / "runs" / "whole" / "run.json").read_text()
    settings = ["--ckpt_path", "last", "--trainer.max_epochs", "8", *(["--allow-config-change"] if allowed else [])]
    with pytest.raises(ValueError, match=r"--model\.init_from .*--growth\.policy none"):
        fit(home, "whole", *settings)
    assert checkpoint(home).read_bytes() == before
    assert json.loads((home / "runs" / "whole" / "run.json").read_text()) == json.loads(record)
