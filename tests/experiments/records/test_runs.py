"""Run folders: new, continued, refused."""

import json
import os
import socket
from pathlib import Path

import pytest

from experiments.records.runs import RunFolder, git_commit
from tests.lightning_modules.test_checkpoint_files import DAMAGES, save
from tests.processes import holding


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
    save(folder.last_checkpoint, 1)
    again = RunFolder(tmp_path / "a")
    assert again.resolve_checkpoint("last") == str(folder.last_checkpoint)
    assert again.resolve_checkpoint(str(folder.last_checkpoint)) == str(folder.last_checkpoint)
    elsewhere = save(tmp_path / "other.ckpt", 1)
    with pytest.raises(ValueError, match="holds another run"):
        again.resolve_checkpoint(str(elsewhere))
    assert RunFolder(tmp_path / "new").resolve_checkpoint(str(elsewhere)) == str(elsewhere)
    with pytest.raises(ValueError, match="is not a file"):
        again.resolve_checkpoint(str(tmp_path / "none.ckpt"))
    DAMAGES["half"][0](elsewhere)
    with pytest.raises(ValueError, match=r"other.ckpt is damaged \(.*\): copy it again"):
        RunFolder(tmp_path / "new").resolve_checkpoint(str(elsewhere))


def a_run(folder: Path) -> RunFolder:
    """Three steps on, with the end of a stage; ``run.json`` is of no importance."""
    for name, step in (("stage_1", 1), ("step=000000002", 2), ("step=000000003", 3), ("last", 3)):
        save(folder / "checkpoints" / f"{name}.ckpt", step)
    return RunFolder(folder)


@pytest.mark.parametrize("record", [True, False], ids=["with run.json", "without"])
@pytest.mark.parametrize("left", ["last", "step=000000003", "stage_1"])
def test_a_folder_with_any_checkpoint_is_used(left: str, record: bool, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    if record:
        folder.start_attempt("", None)
    for path in folder.checkpoints:
        if path.stem != left:
            path.unlink()
    again = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="already holds a run: continue it with --ckpt_path last"):
        again.resolve_checkpoint(None)
    assert again.resolve_checkpoint("last") == str(tmp_path / "checkpoints" / f"{left}.ckpt")
    with pytest.raises(ValueError, match="holds another run"):
        again.resolve_checkpoint(str(save(tmp_path / "elsewhere" / "last.ckpt", 9)))


def test_a_branch_that_was_left_can_be_taken_up_again(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    aside = save(tmp_path / "checkpoints" / "abandoned_20260101T000000" / "step=000000009.ckpt", 9)
    assert folder.resolve_checkpoint(str(aside)) == str(aside)
    folder.last_checkpoint.unlink()
    assert folder.resolve_checkpoint("last") == str(tmp_path / "checkpoints" / "step=000000003.ckpt")


@pytest.mark.parametrize("left", ["checkpoints/step=000000004.ckpt", "metrics.csv", "summary.json"])
def test_other_traces_of_a_run_count_as_well(left: str, tmp_path: Path) -> None:
    assert RunFolder(tmp_path).resolve_checkpoint(None) is None
    save(tmp_path / left, 4)
    with pytest.raises(ValueError, match="already holds a run"):
        RunFolder(tmp_path).resolve_checkpoint(None)
    found = RunFolder(tmp_path).resolve_checkpoint("last")
    assert found == (str(tmp_path / left) if left.endswith(".ckpt") else None)


def test_without_last_the_newest_whole_checkpoint_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = a_run(tmp_path)
    folder.last_checkpoint.unlink()
    newest = tmp_path / "checkpoints" / "step=000000003.ckpt"
    assert folder.resolve_checkpoint("last") == str(newest)
    assert f"last.ckpt is missing: going on from {newest}" in caplog.text
    DAMAGES["one bit changed"][0](newest)
    assert folder.resolve_checkpoint("last") == str(newest.with_stem("step=000000002"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_way_on(kind: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    folder.start_attempt("", None)
    DAMAGES[kind][0](folder.last_checkpoint)
    newest = tmp_path / "checkpoints" / "step=000000003.ckpt"
    way_on = rf"newest that is whole \(step 3\) with --ckpt_path {newest}"
    for given in ("last", str(folder.last_checkpoint)):
        for resolve in (folder.resolve_checkpoint, folder.trained_checkpoint):
            with pytest.raises(ValueError, match=rf"last.ckpt is damaged \(.*\): go on from the {way_on}"):
                resolve(given)
    assert folder.resolve_checkpoint(str(newest)) == str(newest)
    for path in folder.checkpoints:
        if path != folder.last_checkpoint:
            DAMAGES[kind][0](path)
    with pytest.raises(ValueError, match=r"no other checkpoint of .* is whole; choose another --name"):
        folder.resolve_checkpoint("last")


def test_a_damaged_record_is_named_and_can_be_moved_away(tmp_path: Path) -> None:
    a_run(tmp_path).start_attempt("first", None)
    (tmp_path / "run.json").write_text('{"name": "a", "att')
    with pytest.raises(ValueError, match=r"run.json, line 1: this is not JSON .*; restore it, or move it away"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").unlink()
    RunFolder(tmp_path).start_attempt("second", "last.ckpt")
    assert (tmp_path / "config_1.yaml").read_text() == "first"
    assert (tmp_path / "config_2.yaml").read_text() == "second"


def test_a_second_command_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    def hold() -> RunFolder:
        folder = RunFolder(tmp_path)
        folder.hold()
        return folder

    with holding(hold, tmp_path / "held") as process:
        who = f"process {process.pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=rf"in use by another command \({who}\): wait for it, or choose"):
            RunFolder(tmp_path).hold()
        RunFolder(tmp_path / "other").hold()
    again = RunFolder(tmp_path)
    again.hold()  # the file is still there, the lock is not
    assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


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
        monkeypatch.setattr("experiments.records.runs.git_commit", lambda commit=commit: commit)
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
    monkeypatch.setattr("experiments.records.runs.git_commit", lambda: "d")
    RunFolder(tmp_path / "run").start_attempt("", "last.ckpt")
    assert RunFolder(tmp_path / "run").commit == "c, d"


def test_a_wandb_id_that_is_asked_for_after_the_attempt_began_stays_too(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "a")
    first.start_attempt("", None)
    assert first.wandb_id == RunFolder(tmp_path / "a").wandb_id


def test_commit_is_a_hash_or_nothing() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 12
