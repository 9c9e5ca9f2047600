"""`interstack reproduce --executor slurm` without accounting: jobs that end, fail, are cancelled or left alone."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import read_json
from tests.ddp.launch import REPOSITORY
from tests.experiments.studies.test_runner import STUDY
from tests.patience import PATIENCE
from tests.slurm.cluster import Cluster

HOLD = """
  trainer.callbacks:
  - {class_path: tests.slurm.holding.HoldUntil, init_args: {path: GO, step: 1}}
"""


class Study:
    """The tiny study of the runner's tests: `full_l2l`, `broken` and `grown`; runs that hold wait for a file.

    Args:
        cluster: cluster that runs it.
        inputs: folder of a teacher and a corpus.
        folder: folder of the study.
        hold: whether its runs wait at their first step until `go`.
    """

    def __init__(self, cluster: Cluster, inputs: Path, folder: Path, hold: bool = False) -> None:
        self.cluster, self.output, self.go = cluster, folder / "output", folder / "go"
        self.printed = folder / "printed.txt"
        # The schedule that breaks a row there is refused before anything is submitted; this setting only by the run.
        text = STUDY.replace("growth.schedule: explicit-9", "checkpoint.every_n_steps: -1")
        text = text.replace("\nrows:", HOLD.replace("GO", str(self.go)) + "rows:") if hold else text
        (folder / "tiny.yaml").write_text(text)
        resources = ["--slurm.gpus", "0", "--slurm.cpus", "1", "--slurm.memory_gb", "2", "--slurm.hours", "1"]
        inputs_of = ["--root", str(inputs / "corpus"), "--teacher", str(inputs / "teacher")]
        self.words = [sys.executable, "-m", "experiments.cli", "reproduce", str(folder / "tiny.yaml"), *inputs_of]
        self.words += ["--output", str(self.output), "--executor", "slurm", *resources]
        self.cache = inputs / "cache"

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        environ = self.cluster.environment | {"XDG_CACHE_HOME": str(self.cache)}
        with self.printed.open("ab") as file:
            return subprocess.Popen([*self.words, *options], cwd=REPOSITORY, env=environ, stdout=file, stderr=file)

    def wait(self, runner: subprocess.Popen[bytes], condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            assert runner.poll() is None, self.text()
            return condition()

        self.cluster.wait(met, what)

    def held(self) -> int:
        """Number of runs that wait."""
        return len(list(self.output.glob("runs/*/held")))

    def text(self) -> str:
        return self.printed.read_text()

    def records(self) -> dict[str, dict[str, Any]]:
        """What `job.json` of each distillation says, by row."""
        found = [read_json(path) for path in self.output.glob("jobs/*/job.json")]
        return {record["row"]: record for record in found if record["kind"] == "distil"}

    def queued(self) -> dict[str, str]:
        """Names of the jobs that run, by id."""
        lines = self.cluster.call("squeue", "--noheader", "--states=RUNNING", "--format=%A %j").splitlines()
        return dict(line.split() for line in lines)


def test_a_cancelled_job_is_named_as_slurm_ended_it_and_the_others_go_on(
    cluster: Cluster, place: Path, tmp_path: Path
) -> None:
    study = Study(cluster, place, tmp_path, hold=True)
    runner = study.start()
    study.wait(runner, lambda: study.held() == 2, "two runs at their first step")
    (grown,) = (number for number, name in study.queued().items() if name == "distil-grown")
    cluster.call("scancel", grown)
    study.wait(runner, lambda: "failed: distil grown" in study.text(), "the word that the job was cancelled")
    study.go.touch()
    assert runner.wait(timeout=PATIENCE) == 2, study.text()
    text, records = study.text(), study.records()
    assert records["grown"]["ended_by"].startswith("SLURM job ")
    assert "CANCELLED" in records["grown"]["ended_by"]
    assert "failed: distil grown seed 0; SLURM job " in text
    assert (
        f"failed: distil broken seed 0; see {study.output}/jobs/" in text
    )  # it ended by itself, so SLURM adds nothing
    assert {row: record["status"] for row, record in records.items()} == {
        "full_l2l": "done",
        "broken": "failed",
        "grown": "failed",
    }
    # With the output redirected every change is one line, in the order in which it came.
    assert (
        text.index("started: distil grown") < text.index("failed: distil grown") < text.index("done: distil full_l2l")
    )


def test_a_killed_runner_leaves_its_jobs_and_the_next_one_takes_them_up(
    cluster: Cluster, place: Path, tmp_path: Path
) -> None:
    study = Study(cluster, place, tmp_path, hold=True)
    only = ["--only", "[full_l2l]"]
    runner = study.start(*only)
    study.wait(runner, lambda: study.held() == 1, "the run at its first step")
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    again = study.start(*only)
    study.wait(again, lambda: len(study.queued()) == 2, "the second job, which waits for the first")
    study.go.touch()
    assert again.wait(timeout=PATIENCE) == 0, study.text()
    record = study.records()["full_l2l"]
    assert record["status"] == "done"
    run = read_json(study.output / "runs" / f"full_l2l-seed0-{record['id']}" / "run.json")
    assert len(run["attempts"]) == 1  # the first job ended it, and nothing was repeated


def test_a_partition_that_does_not_exist_is_one_line(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    study = Study(cluster, place, tmp_path)
    assert study.start("--slurm.partition", "none_such").wait(timeout=PATIENCE) == 2
    assert "SLURM refuses the job of " in study.text()
    assert "invalid partition specified: none_such" in study.text()
    assert "Traceback" not in study.text()


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: Cluster) -> Any:
    yield
    cluster.clear()
