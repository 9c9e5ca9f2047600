"""Run folders: new, continued, refused."""

import json
from pathlib import Path

import pytest

from experiments.runs import RunFolder, git_commit


def test_a_new_run_then_a_used_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    assert folder.resolve_checkpoint(None) is None
    folder.start_attempt("x: 1\n", None)
    # An attempt that failed before its first step, for a mistyped split say, must not bar the corrected command.
    assert RunFolder(tmp_path / "a").resolve_checkpoint(None) is None
    (tmp_path / "a" / "metrics.csv").write_text("step\n")
    with pytest.raises(ValueError, match="already holds a run: continue it with --ckpt_path last"):
        RunFolder(tmp_path / "a").resolve_checkpoint(None)


def test_last_without_a_checkpoint_starts_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert RunFolder(tmp_path / "a").resolve_checkpoint("last") is None
    assert "no checkpoint in" in caplog.text
    assert len(caplog.records) == 1


def test_last_is_the_runs_own_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.start_attempt("", None)
    folder.last_checkpoint.parent.mkdir()
    folder.last_checkpoint.write_bytes(b"x")
    again = RunFolder(tmp_path / "a")
    assert again.resolve_checkpoint("last") == str(folder.last_checkpoint)
    assert again.resolve_checkpoint(str(folder.last_checkpoint)) == str(folder.last_checkpoint)
    elsewhere = tmp_path / "other.ckpt"
    elsewhere.write_bytes(b"x")
    with pytest.raises(ValueError, match="holds another run"):
        again.resolve_checkpoint(str(elsewhere))
    assert RunFolder(tmp_path / "new").resolve_checkpoint(str(elsewhere)) == str(elsewhere)
    with pytest.raises(ValueError, match="is not a file"):
        again.resolve_checkpoint(str(tmp_path / "none.ckpt"))


def test_every_attempt_is_kept_and_the_wandb_id_stays(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "a")
    run_id = first.wandb_id
    first.start_attempt("a: 1\n", None)
    second = RunFolder(tmp_path / "a")
    assert second.wandb_id == run_id
    second.start_attempt("a: 2\n", "last.ckpt")
    assert (tmp_path / "a" / "config_1.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "a" / "config_2.yaml").read_text() == "a: 2\n"
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [attempt["resumed_from"] for attempt in record["attempts"]] == [None, "last.ckpt"]
    assert RunFolder(tmp_path / "b").wandb_id != run_id


def test_a_run_has_the_commits_of_the_attempts_that_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for commit, resumed_from in (("a", None), ("b", None), ("b", "last.ckpt"), ("c", "last.ckpt")):
        monkeypatch.setattr("experiments.runs.git_commit", lambda commit=commit: commit)
        RunFolder(tmp_path / "run").start_attempt("", resumed_from)
        run = RunFolder(tmp_path / "run")
        seen.append((run.commit, len(run.attempts)))
    assert seen == [("a", 1), ("b", 1), ("b", 2), ("b, c", 3)]
    assert RunFolder(tmp_path / "none").commit is None
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    for attempt in record["attempts"]:
        del attempt["git_commit"]  # older runs have the last one's alone
    path.write_text(json.dumps(record))
    assert RunFolder(tmp_path / "run").commit == "c"
    monkeypatch.setattr("experiments.runs.git_commit", lambda: "d")
    RunFolder(tmp_path / "run").start_attempt("", "last.ckpt")
    assert RunFolder(tmp_path / "run").commit == "c, d"


def test_a_wandb_id_that_is_asked_for_after_the_attempt_began_stays_too(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "a")
    first.start_attempt("", None)
    assert first.wandb_id == RunFolder(tmp_path / "a").wandb_id


def test_commit_is_a_hash_or_nothing() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 12
