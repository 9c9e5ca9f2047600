"""`slurm.sbatch` as a shell script, with a stand-in `srun`; tests/slurm submits it to a cluster."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "experiments" / "launch" / "slurm.sbatch"


def run(folder: Path, *arguments: str, statuses: tuple[int, ...] = (0,), **variables: str) -> tuple[int, str]:
    """Run the script in ``folder``; its starts of ``srun``, in ``started``, end with these statuses in turn."""
    stand_ins = {"srun": 'echo "$@" >> started; read -r status < left; sed -i 1d left; exit "$status"', "sleep": ""}
    for name, body in stand_ins.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "left").write_text("".join(f"{status}\n" for status in statuses))
    environ = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    done = subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=environ | variables, capture_output=True)
    return done.returncode, done.stderr.decode()


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines() if (folder / "started").exists() else []


def test_the_run_gets_the_jobs_size_and_resumes(tmp_path: Path) -> None:
    assert run(tmp_path, "--config", "full", "--name", "a b") == (0, "")
    assert started(tmp_path) == [
        "--kill-on-bad-exit=1 env --block-signal=USR1 interstack fit --config full --name a b --trainer.num_nodes 2 "
        "--trainer.devices 4 --ckpt_path last"
    ]


@pytest.mark.parametrize("name", [["--name", "seed%a"], ["--name=seed%a"]])
def test_a_task_of_an_array_has_its_number_in_every_argument(name: list[str], tmp_path: Path) -> None:
    status, _ = run(tmp_path, *name, "--seed_everything", "%a", "--data.root", "50%", SLURM_ARRAY_TASK_ID="7")
    assert status == 0
    assert f"{' '.join(name).replace('%a', '7')} --seed_everything 7 --data.root 50% " in started(tmp_path)[0]


@pytest.mark.parametrize("arguments", [[], ["--name", "first"], ["--name", "first", "--seed_everything", "%a"]])
def test_an_array_whose_tasks_share_a_name_is_refused(arguments: list[str], tmp_path: Path) -> None:
    status, text = run(tmp_path, *arguments, SLURM_ARRAY_TASK_ID="7")
    assert (status, started(tmp_path)) == (2, [])
    assert "give one with %a, such as --name seed%a" in text


@pytest.mark.parametrize(
    ("statuses", "tries", "ended", "starts"),
    [
        ((1, 137, 0), "3", 0, 3),
        ((1, 1, 1, 0), "3", 1, 3),
        ((1, 0), "1", 1, 1),
        ((2, 0), "3", 2, 1),
        ((143, 0), "3", 143, 1),
        ((1, 143, 0), "3", 143, 2),
    ],
)
def test_only_failures_that_may_pass_are_tried_again(
    statuses: tuple[int, ...], tries: str, ended: int, starts: int, tmp_path: Path
) -> None:
    status, text = run(tmp_path, statuses=statuses, INTERSTACK_TRIES=tries)
    assert (status, len(started(tmp_path))) == (ended, starts)
    assert text.count("another one follows") == starts - 1


def test_an_env_that_cannot_block_signals_is_left_out(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "bin" / "env").write_text("#!/bin/bash\nexit 1\n")  # as of older systems
    (tmp_path / "bin" / "env").chmod(0o755)
    run(tmp_path)
    assert ["env" in line for line in started(tmp_path)] == [True, False]


def test_the_environment_is_the_users_file_or_the_clones(tmp_path: Path) -> None:
    own, default = tmp_path / "site.sh", tmp_path / ".venv" / "bin" / "activate"
    default.parent.mkdir(parents=True)
    own.write_text("echo own >> sourced")
    default.write_text("echo default >> sourced")
    run(tmp_path)
    run(tmp_path, INTERSTACK_SETUP=str(own))
    assert (tmp_path / "sourced").read_text() == "default\nown\n"
    status, text = run(tmp_path, INTERSTACK_SETUP="no_such_file")
    assert (status, len(started(tmp_path))) == (2, 2)
    assert "no_such_file" in text
