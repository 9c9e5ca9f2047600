"""The quick start as a study: its size on a slow machine, its settings, and jobs that run in this process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.files import read_json, write_json
from experiments.studies import estimate, executors, job
from experiments.studies.estimate import Estimator, estimate_table
from experiments.studies.executors import InProcessExecutor, run_here
from experiments.studies.job import Workspace, is_done
from experiments.studies.plan import Job, Plan
from experiments.studies.quickstart import BUDGET, SMALLEST_SHARE, fitting_share, quickstart, sized
from experiments.studies.study import load_study


def seconds(share: float, slowness: float) -> float:
    plan = Plan(sized(load_study("quickstart"), 0, share), seeds=[0])
    estimator = Estimator(plan, on_gpu=False, slowness=slowness)
    return sum(estimator.of(each).seconds for each in plan.jobs.values())


def test_a_slow_machine_does_the_share_that_fits() -> None:
    study = load_study("quickstart")
    assert fitting_share(study, 0, 1.0) == 1.0
    shares = [fitting_share(study, 0, slowness) for slowness in (2.0, 4.0, 1e6)]
    assert 1 > shares[0] > shares[1] > shares[2] == SMALLEST_SHARE
    # Starting, exporting and comparing layers take their time at any share.
    assert seconds(shares[0], 2.0) < 1.25 * BUDGET < seconds(1.0, 2.0)


def test_teacher_students_and_probes_do_the_share() -> None:
    half = sized(load_study("quickstart"), 3, 0.5)
    assert half.teacher == {"steps": 450, "seed": 3}
    assert half.overrides["data.batches_per_epoch"] == 30
    assert half.evaluation["pr_probe"]["updates"] == 150
    assert (half.corpus or {})["seed"] == 3
    assert "50% of their steps" in half.notes[-1]
    assert len(sized(load_study("quickstart"), 3, 1.0).notes) == len(half.notes) - 1


def test_the_fastest_step_counts_and_no_random_number_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 10.0 + 3 * estimate.REFERENCE_STEP, 20.0, 25.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    state = torch.get_rng_state()
    assert estimate.measured_slowness(steps=3) == pytest.approx(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_study_for_a_cpu_is_counted_in_seconds_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(estimate, "machine", lambda: "a GPU")
    units = [
        estimate_table(Plan(load_study(name)), Workspace(tmp_path)).columns[4].header
        for name in ("quickstart", "table1")
    ]
    assert units == ["seconds", "GPU hours"]


def test_a_whole_task_is_estimated_by_its_own_updates() -> None:
    settings = {"inputs": {}}
    pr, probe = (Job("0", "evaluate", [], task=task, settings=settings) for task in ("pr", "pr_probe"))
    estimator = Estimator(Plan(load_study("quickstart")), on_gpu=False)
    assert estimator.of(pr).seconds > 100 * estimator.of(probe).seconds


@pytest.mark.parametrize(
    "kept", [{"fast": True, "seed": 1, "share": 1.0}, {"fast": True, "seed": 0}], ids=["other seed", "older version"]
)
def test_a_folder_with_other_settings_is_refused_and_left_as_it_is(
    kept: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.studies.quickstart.measured_slowness", lambda: 1.0)
    write_json(tmp_path / "quickstart.json", kept)
    with pytest.raises(ValueError, match="choose another --output, or delete it"):
        quickstart(str(tmp_path), fast=True)
    assert read_json(tmp_path / "quickstart.json") == kept
    assert not (tmp_path / "jobs").exists()


# -- jobs in this process -------------------------------------------------------------------------------------------


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        print("some output")
        os.write(2, b"output of a library\n")
        if cause is not None:
            try:
                raise cause
            except BaseException:
                raise error  # noqa: B904 (as Lightning does)
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit(2), 2), (SystemExit(None), 0), (SystemExit("words"), 1), (OSError("odd"), 1)]
)
def test_a_command_ends_with_its_status_and_its_output_is_in_its_log(
    error: BaseException,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(executors, "run", raising(error))
    assert run_here(["fit"], tmp_path / "log.txt", dict(os.environ)) == status
    print("afterwards")
    text = (tmp_path / "log.txt").read_text()
    assert "interstack fit" in text
    assert "output of a library" in text
    assert ("OSError: odd" in text) == isinstance(error, OSError)
    assert capfd.readouterr().out.splitlines()[-1] == "afterwards"


@pytest.mark.parametrize(
    ("error", "cause"), [(SystemExit(143), None), (SystemExit(1), KeyboardInterrupt()), (KeyboardInterrupt(), None)]
)
def test_an_interrupt_ends_the_study_and_the_job_says_so(
    error: BaseException, cause: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "run", raising(error, cause))
    workspace, corpus = Workspace(tmp_path), Job("0123", "corpus", [], settings={"minutes": 1.0})
    with pytest.raises(KeyboardInterrupt):
        InProcessExecutor(workspace).submit(corpus)
    assert read_json(tmp_path / "jobs" / "0123" / "job.json")["status"] == "interrupted"
    assert not is_done(tmp_path, "0123")


def test_a_jobs_environment_has_no_launcher_and_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setattr(executors, "run", lambda arguments: seen.append(os.environ.get("SLURM_NTASKS")))
    run_here(["fit"], tmp_path / "log.txt", job.environment(None))
    assert seen == [None]
    assert os.environ["SLURM_NTASKS"] == "4"
