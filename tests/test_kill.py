"""Killed runs: ``kill -9`` at any moment, then the same command; both ranks of two killed, or one."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from experiments.cli import run
from tests.ddp.launch import REPOSITORY, environment
from tests.helpers import save_corpus, save_teacher
from tests.holding import NOTE_BEGINNING, beginnings
from tests.patience import PATIENCE
from tests.processes import ended, fork_program, wait_for
from tests.resuming import differences
from tests.students import THIN
from tests.test_configs import SHRUNK

BATCHES_PER_EPOCH, EPOCHS = 5, 4  # three growths, at steps 5, 10 and 15
STEPS = BATCHES_PER_EPOCH * EPOCHS


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher", layers=12)
    save_corpus(folder / "corpus", {"train": 20, "dev": 4})
    inputs = ["--data.root", str(folder / "corpus"), "--model.teacher.init_args.model", str(folder / "teacher")]
    inputs += ["--data.cache_dir", str(folder / "cache"), "--data.batches_per_epoch", str(BATCHES_PER_EPOCH)]
    return ["fit", "--config", "interleave_equal", *SHRUNK, *inputs, "--ckpt_path", "last", NOTE_BEGINNING]


def start(command: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A process group of its own, whose output goes to a file."""
    with output.open("ab") as file:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment() | variables, start_new_session=True, stdout=file, stderr=file
        )


def cli(arguments: list[str], runs: Path) -> list[str]:
    return [sys.executable, "-m", "experiments.cli", *arguments, "--runs_dir", str(runs)]


def run_to_the_end(arguments: list[str], runs: Path) -> Path:
    """In this process, where nothing is to be imported; two ranks are processes of their own."""
    if "ddp" in arguments:
        process = start(cli(arguments, runs), runs.with_suffix(".txt"))
        assert process.wait(timeout=PATIENCE) == 0, runs.with_suffix(".txt").read_text()[-4000:]
    else:
        run([*arguments, "--runs_dir", str(runs)])
    return runs / "interleave_equal" / "checkpoints" / "last.ckpt"


def newest_step(run: Path) -> int:
    """The last optimizer step that has a checkpoint; 0 for none."""
    return max((int(path.stem.removeprefix("step=")) for path in run.glob("checkpoints/step=*.ckpt")), default=0)


def kill_after(step: int, delay: float, arguments: list[str], runs: Path) -> int:
    """Run until ``step`` has a checkpoint and ``delay`` seconds more, then SIGKILL the group; the step reached.

    However slowly this process is scheduled, the run is not over by then: it holds after at most three steps more.
    """
    folder = runs / "interleave_equal"
    hold = ["--trainer.callbacks+=tests.holding.Hold", f"--trainer.callbacks.step={min(step + 3, STEPS - 1)}"]
    command, output = [*arguments, *hold, "--runs_dir", str(runs)], runs.with_suffix(".txt")
    # Lightning starts a second rank by the first one's command line, which a child of this process does not have.
    two = start(cli(command, runs), output) if "ddp" in command else None
    one = None if two else fork_program(command, output, variables=environment())
    deadline = time.monotonic() + PATIENCE
    while newest_step(folder) < step and time.monotonic() < deadline:
        if not (two.poll() is None if two else one.is_alive()):
            break
        time.sleep(0.005)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and its output tells why
        os.killpg((two or one).pid, signal.SIGKILL)
    assert (two.wait() if two else ended(one)) == -signal.SIGKILL, output.read_text()[-4000:]
    return newest_step(folder)


def assert_kills_leave_no_trace(kills: int, seed: int, arguments: list[str], folder: Path) -> None:
    whole = run_to_the_end(arguments, folder / "whole")
    generator, reached = random.Random(seed), []
    # Moments spread over the run: after some step, plus anything up to about two steps or one growth more. The first
    # kill comes before there is any checkpoint.
    steps = sorted(generator.sample(range(1, STEPS - 3), kills - 1))
    kill_after(0, generator.uniform(0.1, 0.6), arguments, folder / "killed")
    for step in steps:
        if reached and step <= reached[-1]:
            step = min(reached[-1] + 1, STEPS - 1)
        reached.append(kill_after(step, generator.uniform(0, 0.2), arguments, folder / "killed"))
    assert reached == sorted(set(reached)), "every run went on, and none was over before it was killed"
    assert reached[-1] < STEPS
    assert len({step // BATCHES_PER_EPOCH for step in reached}) > 1
    last = run_to_the_end(arguments, folder / "killed")
    assert_same_end(whole, last)
    # A kill may come between the newest checkpoint and its name last.ckpt.
    begun = beginnings(last.parents[1])[-len(reached) :]
    assert all(0 <= step - start <= 1 for step, start in zip(reached, begun, strict=True)), (reached, begun)
    assert not list((folder / "killed").rglob("*.tmp")), "the next checkpoint removes what a kill leaves"


def assert_same_end(whole: Path, last: Path) -> None:
    one, other = (torch.load(path, weights_only=True) for path in (whole, last))
    assert one["global_step"] == other["global_step"] == STEPS
    assert one["interstack"]["ancestry"] == other["interstack"]["ancestry"]
    assert list(differences(one["state_dict"], other["state_dict"])) == []
    assert list(differences(one["optimizer_states"], other["optimizer_states"])) == []


@pytest.mark.ci
def test_a_run_killed_three_times_ends_as_if_it_never_was(arguments: list[str], tmp_path: Path) -> None:
    assert_kills_leave_no_trace(3, seed=1, arguments=arguments, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_killed_nine_times_in_a_row(num_workers: int, arguments: list[str], tmp_path: Path) -> None:
    workers = ["--data.num_workers", str(num_workers)]
    assert_kills_leave_no_trace(9, seed=num_workers, arguments=[*arguments, *workers], folder=tmp_path)


OTHER_STUDENTS = {
    "joined frames": {"time_reduction": "2"},
    "reused maps": {"reuse_attention": "true", "feature_projection": "false", "scale_layer_gradients": "true"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER_STUDENTS)
def test_runs_of_other_students_killed_three_times(kind: str, arguments: list[str], tmp_path: Path) -> None:
    settings = {"front_end_init": "random", "conv_layers": json.dumps(THIN), **OTHER_STUDENTS[kind]}
    student = [word for name, value in settings.items() for word in (f"--model.student.{name}", value)]
    growth = ["--growth.stages", "[2,4,8,12]", "--model.objective.layers", "[6]"]  # pairs
    options = [*student, *(growth if kind == "reused maps" else [])]
    assert_kills_leave_no_trace(3, seed=3, arguments=[*arguments, *options], folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["frozen", "trained_until_growth"])
def test_a_run_from_cached_features_killed_four_times(front_end: str, arguments: list[str], tmp_path: Path) -> None:
    """From a cache that was there before, and from one that the run writes at its first growth."""
    command, options, resume = arguments[0], arguments[1:-2], arguments[-2:]
    options += ["--data.crop", "fixed", "--model.student.front_end", front_end]
    features = ["--features", "float32"] if front_end == "frozen" else []
    words = ["cache-targets", *options, "--output", str(tmp_path / "cache"), *features]
    log = tmp_path / "cache.txt"
    assert start([sys.executable, "-m", "experiments.cli", *words], log).wait(timeout=PATIENCE) == 0, log.read_text()
    options += ["--data.targets", str(tmp_path / "cache"), "--log_samples", "false"]
    options += [] if features else ["--trainer.callbacks+=callbacks.feature_cache.FeatureCache"]
    assert_kills_leave_no_trace(4, seed=2, arguments=[command, *options, *resume], folder=tmp_path)
    summary = json.loads((tmp_path / "killed" / "interleave_equal" / "summary.json").read_text())
    assert summary["cached_features"]


# -- two ranks ----------------------------------------------------------------------------------------------------


BY_PROC = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds processes by /proc")


class Process(NamedTuple):
    """What ``/proc`` tells of one."""

    parent: int
    variables: dict[str, str]

    @property
    def local_rank(self) -> str:
        # Lightning's own launcher is rank 0 itself and sets the variable for the others only.
        return self.variables.get("LOCAL_RANK", "0")


def processes_of(marker: str) -> dict[int, Process]:
    """Living processes with ``marker`` in their command line, by id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command, variables, stat = ((folder / name).read_bytes() for name in ("cmdline", "environ", "stat"))
        except OSError:
            continue  # it ended while we looked
        if marker.encode() in command:
            lines = [line.partition("=") for line in variables.decode(errors="replace").split("\0")]
            parent = int(stat.rpartition(b")")[2].split()[1])
            found[int(folder.name)] = Process(parent, {key: value for key, _, value in lines})
    return found


def ranks_of(marker: str, launcher: str) -> dict[int, int]:
    """Process ids by rank, without torchrun itself and without data workers, which look like their parents."""
    found = processes_of(marker)
    if launcher == "torchrun":
        found = {pid: process for pid, process in found.items() if "RANK" in process.variables}
    return {
        int(process.local_rank): pid
        for pid, process in found.items()
        if process.parent not in found or found[process.parent].local_rank != process.local_rank
    }


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "lightning": [sys.executable],
}


@pytest.mark.ci
@BY_PROC
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("torchrun", 1),
        pytest.param("torchrun", 0, marks=pytest.mark.slow),
        pytest.param("lightning", 1, marks=pytest.mark.slow),
        pytest.param("lightning", 0, marks=pytest.mark.slow),
    ],
)
def test_when_one_rank_is_killed_the_other_stops(
    launcher: str, rank: int, arguments: list[str], tmp_path: Path
) -> None:
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "400"]
    options += ["--data.num_workers", "1", "--runs_dir", str(tmp_path / "runs")]
    command = [*LAUNCHERS[launcher], "-m", "experiments.cli", *arguments, *options]
    process = start(command, tmp_path / "output.txt")
    try:
        wait_for(lambda: newest_step(tmp_path / "runs" / "interleave_equal") >= 2, process)
        ranks = ranks_of(str(tmp_path), launcher)
        assert set(ranks) == {0, 1}
        os.kill(ranks[rank], signal.SIGKILL)
        assert process.wait(timeout=PATIENCE) != 0
        wait_for(lambda: not processes_of(str(tmp_path)))
    finally:
        for pid in processes_of(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "output.txt").read_text()
    if launcher == "torchrun":
        assert f"rank      : {rank}" in text
        assert "SIGKILL" in text
    assert "summary.json" not in {path.name for path in (tmp_path / "runs").rglob("*")}
    assert newest_step(tmp_path / "runs" / "interleave_equal") >= 2


@pytest.mark.ci
@BY_PROC
def test_torchrun_starts_the_ranks_again_and_they_go_on(arguments: list[str], tmp_path: Path) -> None:
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--runs_dir", str(tmp_path / "runs")]
    # Both attempts would wait at that step, so that the run is not over before the kill.
    hold = ["--trainer.callbacks+=tests.slurm.holding.HoldUntil", f"--trainer.callbacks.path={tmp_path / 'go'}"]
    hold += ["--trainer.callbacks.step=8"]
    command = [*LAUNCHERS["torchrun"], "--max_restarts=1", "-m", "experiments.cli", *arguments, *options, *hold]
    process = start(command, tmp_path / "output.txt", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    run = tmp_path / "runs" / "interleave_equal"
    try:
        wait_for(lambda: newest_step(run) == 8, process)
        os.kill(ranks_of(str(tmp_path), "torchrun")[1], signal.SIGKILL)
        (tmp_path / "go").touch()
        assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "output.txt").read_text()[-4000:]
    finally:
        for pid in processes_of(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    assert beginnings(run) == [0, 8]
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


@BY_PROC
@pytest.mark.slow
def test_when_both_are_killed_the_run_goes_on_as_if_they_never_were(arguments: list[str], tmp_path: Path) -> None:
    # By Lightning's launcher, whose second rank is in the process group of the first.
    both = [*arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    whole = run_to_the_end(both, tmp_path / "whole")
    reached = kill_after(7, 0.05, both, tmp_path / "killed")
    assert 7 <= reached < STEPS
    wait_for(lambda: not processes_of(str(tmp_path)))
    last = run_to_the_end(both, tmp_path / "killed")
    assert_same_end(whole, last)
    assert beginnings(last.parents[1])[1] in (reached - 1, reached)
