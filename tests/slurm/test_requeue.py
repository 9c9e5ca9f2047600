"""`slurm.sbatch` on a cluster: time limit, requeue, signals at any moment, a lost node, arrays, failed launches."""

import time
from pathlib import Path

import pytest

from tests.holding import NOTE_BEGINNING, beginnings
from tests.slurm.cluster import GRACE_SECONDS, Cluster, processes_of
from tests.test_configs import SHRUNK
from tests.test_kill import BATCHES_PER_EPOCH, STEPS, assert_same_end
from tests.wandb_server import KEY, PROJECT, wandb_server


class Runs:
    """Runs of the shipped script in one folder.

    Args:
        cluster: cluster that runs them.
        inputs: folder of a teacher and a corpus.
        folder: folder that they are submitted from.
    """

    def __init__(self, cluster: Cluster, inputs: Path, folder: Path) -> None:
        self.cluster, self.inputs, self.folder = cluster, inputs, folder

    def submit(self, name: str, *arguments: str, options: list[str] = [], **variables: str) -> str:  # noqa: B006
        own = ["--data.root", str(self.inputs / "corpus"), "--data.cache_dir", str(self.inputs / "cache")]
        own += ["--model.teacher.init_args.model", str(self.inputs / "teacher"), "--name", name]
        own += ["--data.batches_per_epoch", str(BATCHES_PER_EPOCH), "--checkpoint.keep", "100", NOTE_BEGINNING]
        words = ["--config", "interleave_equal", *SHRUNK, *own, *arguments]
        return self.cluster.submit(self.folder, options, words, **variables)

    def hold(self, *steps: int) -> list[str]:
        """Arguments of a run that waits at these steps, one for each start."""
        holder = "--trainer.callbacks+=tests.slurm.holding.HoldInAttempt"
        return [holder, f"--trainer.callbacks.steps={list(steps)}"]

    def wait_for(self, name: str, step: int) -> None:
        held = [self.run(name) / f"held_{step}_{rank}" for rank in range(2)]
        self.cluster.wait(lambda: all(path.exists() for path in held), f"step {step} of {name}")

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def last(self, name: str) -> Path:
        return self.run(name) / "checkpoints" / "last.ckpt"

    def log(self, job: str) -> str:
        return (self.folder / f"interstack-{job}.log").read_text()


@pytest.fixture(scope="module")
def runs(cluster: Cluster, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(cluster, place, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """The last checkpoint of a run over two nodes that nothing interrupts."""
    job = runs.submit("whole")
    assert runs.cluster.finish(job) == "COMPLETED", runs.log(job)
    return runs.last("whole")


def test_a_growing_run_over_two_nodes_goes_through_limit_signal_and_requeue(runs: Runs, whole: Path) -> None:
    cluster = runs.cluster
    job = runs.submit("limited", *runs.hold(3, 8, 13), options=["--time", "2"])
    cluster.wait(lambda: cluster.restarts(job) == 1, "the requeue at the time limit")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    cluster.hurry(job)
    runs.wait_for("limited", 8)
    cluster.call("scancel", "--signal", "USR1", job)
    cluster.wait(lambda: cluster.restarts(job) == 2, "the requeue after scancel --signal")
    cluster.hurry(job)
    runs.wait_for("limited", 13)
    cluster.call("scontrol", "requeue", job)
    assert cluster.finish(job) == "COMPLETED", runs.log(job)
    assert cluster.restarts(job) == 3
    assert runs.log(job).count("is back in the queue") == 2  # the third was not the run's own
    assert_same_end(whole, runs.last("limited"))
    assert beginnings(runs.run("limited"))[-1] in (13, 14, 15)  # SLURM may leave it time for the steps to its stop


def test_a_preempted_run_saves_within_its_grace_time_and_goes_back_into_the_queue(runs: Runs, whole: Path) -> None:
    cluster = runs.cluster
    job = runs.submit("preempted", *runs.hold(8))
    runs.wait_for("preempted", 8)
    began = time.monotonic()
    urgent = ["--partition", "urgent", "--nodes", "2", "--exclusive", "--output", "urgent.log", "--wrap", "sleep 5"]
    other = cluster.call("sbatch", "--parsable", *urgent, cwd=runs.folder).strip()
    cluster.wait(lambda: cluster.restarts(job) == 1, "the requeue of the preempted run")
    assert time.monotonic() - began < GRACE_SECONDS, "SLURM requeued it at the end of the grace time"
    log = runs.log(job)
    assert log.count("stopped by a signal after step 10") == 1  # two ranks tell each other in step 9
    assert log.count("is back in the queue") == 1
    assert cluster.finish(other) == "COMPLETED"
    assert cluster.finish(job) == "COMPLETED", runs.log(job)
    assert_same_end(whole, runs.last("preempted"))
    assert beginnings(runs.run("preempted")) == [0, 10]


def test_control_a_cancelled_run_saves_and_does_not_come_back(runs: Runs) -> None:
    cluster = runs.cluster
    job = runs.submit("cancelled", *runs.hold(8), options=["--nodes", "1"])
    cluster.wait(lambda: (runs.run("cancelled") / "held_8_0").exists(), "step 8")
    cluster.call("scancel", job)
    assert cluster.finish(job) == "CANCELLED"
    cluster.wait(lambda: "stopped by a signal after step 9" in runs.log(job), "the checkpoint")
    assert cluster.restarts(job) == 0
    assert "is back in the queue" not in runs.log(job)


def starting(word: str) -> list[int]:
    """Processes on the nodes whose command line contains the word."""
    found = [process for node in ("n1", "n2") for process in processes_of(node)]
    return [n for n in found if word.encode() in Path(f"/proc/{n}/cmdline").read_bytes()]


def test_a_signal_before_training_requeues_too(runs: Runs, whole: Path) -> None:
    cluster = runs.cluster
    job = runs.submit("early")
    cluster.wait(lambda: len(starting("bin/interstack")) == 2, "both tasks")
    cluster.call("scancel", "--signal", "USR1", job)
    cluster.wait(lambda: cluster.restarts(job) == 1, "the requeue")
    assert "came outside training" in runs.log(job)
    assert not (runs.run("early") / "checkpoints").exists()
    assert cluster.finish(job) == "COMPLETED", runs.log(job)
    assert_same_end(whole, runs.last("early"))


def test_control_a_program_that_does_not_listen_is_ended_by_the_signal(runs: Runs) -> None:
    cluster = runs.cluster
    program = "srun python -c 'import time; time.sleep(1000)'"
    options = ["--nodes", "1", "--requeue", "--output", "control.log", "--wrap", program]
    job = cluster.call("sbatch", "--parsable", *options, cwd=runs.folder).strip()
    cluster.wait(lambda: len(starting("sleep(1000)")) > 1, "the program")
    cluster.call("scancel", "--signal", "USR1", job)
    assert cluster.finish(job) == "FAILED"
    assert cluster.restarts(job) == 0


def test_a_lost_node_costs_no_more_than_the_steps_since_the_last_checkpoint(runs: Runs, whole: Path) -> None:
    cluster = runs.cluster
    job = runs.submit("lost", *runs.hold(8))
    runs.wait_for("lost", 8)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.restarts(job) == 1, "SLURM's requeue after the loss of a node")
    time.sleep(15)  # a node is never back at once; in that moment SLURM still holds the steps of the first start
    cluster.start_node("n2")
    assert cluster.finish(job) == "COMPLETED", runs.log(job)
    assert_same_end(whole, runs.last("lost"))
    assert beginnings(runs.run("lost")) == [0, 8]


def test_each_task_of_an_array_has_its_own_run_and_its_own_requeue(runs: Runs) -> None:
    cluster = runs.cluster
    options = ["--nodes", "1", "--array", "0-1"]
    seeds = ["--seed_everything", "%a", *runs.hold(3)]
    array = runs.submit("seed%a", *seeds, options=options)
    held = [runs.run(f"seed{task}") / "held_3_0" for task in (0, 1)]
    cluster.wait(lambda: all(path.exists() for path in held), "both tasks of the array")
    for task in (1, 0):
        cluster.call("scancel", "--signal", "USR1", f"{array}_{task}")
        cluster.wait(lambda task=task: cluster.restarts(f"{array}_{task}") == 1, f"the requeue of task {task}")
        assert task == 0 or cluster.restarts(f"{array}_0") == 0
    assert [cluster.finish(f"{array}_{task}") for task in (0, 1)] == ["COMPLETED", "COMPLETED"]
    first, second = (runs.last(f"seed{task}").read_bytes() for task in (0, 1))
    assert first != second


def test_an_array_whose_tasks_would_share_a_run_is_refused(runs: Runs) -> None:
    array = runs.submit("shared", options=["--nodes", "1", "--array", "0"])
    assert runs.cluster.finish(f"{array}_0") == "FAILED"
    assert "such as --name seed%a" in runs.log(array)
    assert not runs.run("shared").exists()


def test_a_launch_that_fails_is_tried_again_and_wrong_input_is_not(runs: Runs) -> None:
    """Each start of the program after the first finds it; the shell file makes the first one fail."""
    setup = runs.folder / "setup.sh"
    setup.write_text(
        f"mkdir -p {runs.folder}/bin\n"
        f"printf '#!/bin/sh\\nrm {runs.folder}/bin/interstack\\nexit 1\\n' > {runs.folder}/bin/interstack\n"
        f"chmod +x {runs.folder}/bin/interstack\n"
        f"export PATH={runs.folder}/bin:$PATH\n"
    )
    options = ["--nodes", "1"]
    job = runs.submit("again", options=options, INTERSTACK_SETUP=str(setup))
    assert runs.cluster.finish(job) == "COMPLETED", runs.log(job)
    assert "start 1 ended with status 1; another one follows" in runs.log(job)
    wrong = runs.submit("wrong", "--growth.policy", "no_such_policy", options=options)
    assert runs.cluster.finish(wrong) == "FAILED"
    assert "another one follows" not in runs.log(wrong)
    hopeless = runs.submit("hopeless", options=options, INTERSTACK_SETUP=str(setup), INTERSTACK_TRIES="1")
    assert runs.cluster.finish(hopeless) == "FAILED"


@pytest.mark.parametrize("fault", ["none", "drop"])
def test_wandb_shows_the_run_as_preempted_and_cannot_delay_the_requeue(runs: Runs, fault: str) -> None:
    """Control: a server that closes every connection, for which the requeue does not wait long."""
    cluster, name = runs.cluster, f"wandb_{fault}"
    with wandb_server() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        online = ["--wandb.mode", "online", "--wandb.project", PROJECT, "--wandb.id", name]
        online += ["--trainer.log_every_n_steps", "1"]
        job = runs.submit(name, *online, *runs.hold(8), options=["--nodes", "1"], **variables)
        cluster.wait(lambda: (runs.run(name) / "held_8_0").exists(), "step 8")
        server.fault = fault
        cluster.call("scancel", "--signal", "USR1", job)
        cluster.wait(lambda: cluster.restarts(job) == 1, "the requeue")
        cluster.wait(lambda: not starting("bin/interstack"), "the end of the first start")
        log = runs.log(job)
        assert log.index("is back in the queue") > log.index("stopped by SLURM's signal after step")
        first = server.runs[name]
        assert (first.preempting, first.exit_code) == ((True, 143) if fault == "none" else (False, None))
        assert ("wandb sync --include-online" in log) is (fault == "drop")
        server.fault = "none"
        assert cluster.finish(job) == "COMPLETED", runs.log(job)
        assert first.exit_code == 0
        steps = {row["trainer/global_step"] for row in first.history if "train/output" in row}
    # Of the first start, the server that failed lacks what it had not got by then; the folder has it.
    assert steps >= set(range(1 if fault == "none" else 10, STEPS + 1))
