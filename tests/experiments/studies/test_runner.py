"""The runner: nothing is repeated, a kill leaves no trace, failures are told, one runner to a folder.

The jobs are those of real tiny runs; the logic of many jobs is tested with an executor that only writes records.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from datamodules.files import write_json
from experiments.report.study import study_texts, study_values
from experiments.report.study_reading import cell_values, read_study, study_results
from experiments.studies.executors import LocalExecutor
from experiments.studies.job import Workspace, is_done, read_record, read_result
from experiments.studies.loop import Runner, only_runner, planned_seeds, write_study
from experiments.studies.plan import Inputs, Job, Plan
from experiments.studies.slurm import SlurmExecutor, SlurmSettings
from experiments.studies.study import load_study
from tests.ddp.launch import REPOSITORY, environment
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE
from tests.processes import holding, wait_for

STUDY = """
title: Tiny
baseline: full_l2l
columns: [val_output, final_loss, flops_ratio, mean_depth]
overrides:
  model.student: {hidden_size: 16, intermediate_size: 24, num_heads: 2}
  data: {train_splits: [train], val_splits: [dev], batch_size: 4, batches_per_epoch: 3, num_workers: 0}
  trainer: {accelerator: cpu, devices: 1, max_epochs: 4, enable_progress_bar: false, enable_model_summary: false}
  log_samples: false
  checkpoint.every_n_steps: 1
  wandb.mode: disabled
rows:
- {name: full_l2l, label: Full, configs: [full_l2l]}
- {name: broken, label: Broken, configs: [interleave_equal], overrides: {growth.schedule: explicit-9}}
- {name: grown, label: Grown, configs: [interleave_equal]}
"""

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from experiments.report.study import study_texts, study_values
from experiments.report.study_reading import read_study
from experiments.studies.executors import LocalExecutor
from experiments.studies.job import Workspace
from experiments.studies.loop import Runner, only_runner
from experiments.studies.plan import Inputs, Plan
from experiments.studies.study import load_study
study, root, teacher, output = sys.argv[1:]
plan = Plan(load_study(study), Inputs(root, teacher))
plan.jobs = {job.id: job for job in plan.distil.values()}
with only_runner(Path(output)):
    workspace = Workspace(Path(output), Inputs(root, teacher), "tiny")
    Runner(plan, workspace, LocalExecutor(workspace), Console()).run()
"""


class Setup:
    """A tiny study with its inputs."""

    def __init__(self, folder: Path) -> None:
        self.study, self.folder = folder / "tiny.yaml", folder
        self.study.write_text(STUDY)
        self.teacher = save_teacher(folder / "teacher", layers=12)
        self.corpus = save_corpus(folder / "corpus", {"train": 12, "dev": 2})
        self.inputs = Inputs(str(self.corpus), str(self.teacher))

    def plan(self, **options: Any) -> Plan:
        return Plan(load_study(str(self.study)), self.inputs, **options)

    def workspace(self, output: Path) -> Workspace:
        return Workspace(output, self.inputs, "tiny")

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        words = [str(path) for path in (self.study, self.corpus, self.teacher, output)]
        with output.with_suffix(".txt").open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *words],
                cwd=REPOSITORY,
                env=environment() | {"XDG_CACHE_HOME": str(self.folder / "cache")},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("study"))


DETERMINISTIC = ("steps", "flops", "audio_seconds", "final_loss", "val_output", "mean_depth", "parameters")


def tables(output: Path, plan: Plan) -> dict[str, str]:
    """The report's tables without what depends on the clock, or tells of a resume."""
    write_study(output, plan, {})
    report = study_values(read_study(output))
    report["caveats"] = [line for line in report["caveats"] if not line.startswith("Resumed runs")]
    return study_texts(report)


def outcome(output: Path, plan: Plan) -> dict[str, Any]:
    """What tables are made of, without seconds and bytes."""
    distilled = [job for job in plan.distil.values() if is_done(output, job.id)]
    return {job.label: [read_result(output, job.id)[key] for key in DETERMINISTIC] for job in distilled}


@pytest.mark.slow
def test_a_killed_runner_goes_on_repeats_nothing_and_ends_as_if_never_killed(setup: Setup, tmp_path: Path) -> None:
    plan, whole, killed = setup.plan(), tmp_path / "whole", tmp_path / "killed"
    first, broken, grown = (plan.distil[row, 0] for row in ("full_l2l", "broken", "grown"))
    process = setup.start(killed)
    wait_for(lambda: list((killed / grown.run).glob("checkpoints/step=*.ckpt")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_done(killed, first.id)
    assert not is_done(killed, grown.id)
    before = read_record(killed, first.id)
    for output in (whole, killed):
        assert setup.start(output).wait(timeout=PATIENCE) == 0
    assert read_record(killed, first.id) == before, "a finished job was repeated"
    attempts = json.loads((killed / grown.run / "run.json").read_text())["attempts"]
    assert len(attempts) == 2
    assert attempts[1]["resumed_from"], "the interrupted run began again"
    assert outcome(killed, plan) == outcome(whole, plan)
    assert tables(killed, plan) == tables(whole, plan)
    for output, resumed in ((whole, []), (killed, ["Resumed runs (grown, seed 0: 2 attempts)"])):
        caveats = study_values(read_study(output))["caveats"]
        assert [line.partition(": their")[0] for line in caveats if line.startswith("Resumed")] == resumed
    assert "| Grown | 0." in tables(whole, plan)["md"]
    assert set(outcome(whole, plan)) == {first.label, grown.label}
    record = read_record(whole, broken.id)
    assert record["status"] == "failed"
    assert "growth epochs [9], but 4 stages need 3" in (whole / record["log"]).read_text()
    assert f"failed: {broken.label}" in whole.with_suffix(".txt").read_text()
    result = read_result(whole, grown.id)
    assert [event["depth"] for event in result["growth"]] == [6, 9, 12]
    assert (whole / result["run"] / "summary.json").is_file()
    assert read_result(killed, grown.id)["attempts"] == 2
    run_record = json.loads((whole / result["run"] / "run.json").read_text())
    assert (result["attempts"], result["commit"]) == (1, run_record["git_commit"])

    side_by_side, rows = tmp_path / "side_by_side", setup.plan(only=["full_l2l", "grown"])
    rows.train_together(lambda job: False)
    workspace = setup.workspace(side_by_side)
    with only_runner(side_by_side):
        runner = Runner(rows, workspace, LocalExecutor(workspace), Console())
        runner.run()
    assert runner.failed == []
    assert outcome(side_by_side, rows) == outcome(whole, plan)
    assert read_result(side_by_side, grown.id)["students"] == 2
    attempts = json.loads((side_by_side / grown.run / "run.json").read_text())["attempts"]
    assert len(attempts) == 1, "the run was made once, side by side with the other"


# -- the logic, with jobs that only write their records -----------------------------------------------------------


class Recorder:
    """An executor whose jobs are done at once, save those that are to fail."""

    def __init__(self, workspace: Workspace, failing: tuple[str, ...] = (), capacity: int = 2) -> None:
        self.workspace, self.failing, self.capacity, self.ran = workspace, failing, capacity, []

    def submit(self, job: Job) -> Any:
        self.ran.append(job.label)
        failed = job.label in self.failing
        if not failed:
            write_json(self.workspace.path(job) / "result.json", {})
        write_json(self.workspace.path(job) / "job.json", job.described() | {"status": "failed" if failed else "done"})
        return self

    def explain(self, handle: Any) -> str:
        return "SLURM job 1: TIMEOUT" if self.failing else ""

    def done(self) -> bool:
        return True

    def stop(self) -> None:
        pass


def run(plan: Plan, workspace: Workspace, *failing: str) -> tuple[list[str], Runner]:
    executor = Recorder(workspace, failing)
    runner = Runner(plan, workspace, executor, Console(quiet=True), poll_seconds=0)
    runner.run()
    return executor.ran, runner


def test_a_changed_row_runs_again_and_nothing_else(setup: Setup, tmp_path: Path) -> None:
    workspace = setup.workspace(tmp_path)
    assert len(run(setup.plan(), workspace)[0]) == 6
    assert run(setup.plan(), workspace)[0] == []
    setup.study.write_text(STUDY.replace("name: grown, label: Grown, configs: [interleave_equal]", CHANGED))
    try:
        ran, _ = run(setup.plan(), workspace)
    finally:
        setup.study.write_text(STUDY)
    assert ran == ["distil grown seed 0", "export grown seed 0"]


CHANGED = "name: grown, label: Grown, configs: [interleave_prop1]"


def test_what_needs_a_failed_job_waits_for_another_call_and_the_rest_goes_on(setup: Setup, tmp_path: Path) -> None:
    workspace, plan = setup.workspace(tmp_path), setup.plan()
    ran, runner = run(plan, workspace, "distil broken seed 0")
    assert [job.label for job in runner.failed] == ["distil broken seed 0", "export broken seed 0"]
    assert read_record(tmp_path, runner.failed[0].id)["ended_by"] == "SLURM job 1: TIMEOUT"
    assert len(ran) == 5
    ran, runner = run(plan, workspace)
    assert ran == ["distil broken seed 0", "export broken seed 0"]
    assert runner.failed == []


def test_a_student_that_fails_beside_others_fails_alone(setup: Setup, tmp_path: Path) -> None:
    workspace, plan = setup.workspace(tmp_path), setup.plan()
    plan.train_together(lambda job: False)
    joined = next(job for job in plan.jobs.values() if job.kind == "together")
    for row in ("full_l2l", "grown"):
        write_json(tmp_path / plan.distil[row, 0].run / "summary.json", {})
    ran, runner = run(plan, workspace, "together seed 0")
    assert ran == [
        "together seed 0",
        *(f"{kind} {row} seed 0" for kind in ("distil", "export") for row in ("full_l2l", "grown")),
    ]
    assert [job.label for job in runner.failed] == ["together seed 0", "distil broken seed 0", "export broken seed 0"]
    record = read_record(tmp_path, plan.distil["broken", 0].id)
    assert (record["status"], record["log"]) == ("failed", f"jobs/{joined.id}/log.txt")
    assert read_record(tmp_path, plan.distil["grown", 0].id)["status"] == "done"


def test_a_job_that_ended_without_a_word_has_failed(setup: Setup, tmp_path: Path) -> None:
    class Silent(Recorder):
        def submit(self, job: Job) -> Any:
            write_json(self.workspace.path(job) / "job.json", job.described() | {"status": "running"})
            return self

    workspace = setup.workspace(tmp_path)
    runner = Runner(setup.plan(only=["grown"]), workspace, Silent(workspace), Console(quiet=True), poll_seconds=0)
    runner.run()
    assert [job.kind for job in runner.failed] == ["distil", "export"]
    assert read_record(tmp_path, runner.failed[0].id)["status"] == "failed"


def test_a_second_runner_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with holding(lambda: only_runner(tmp_path).__enter__(), tmp_path / "held") as process:
        refused = pytest.raises(ValueError, match=f"in use by another command .process {process.pid} on ")
        with refused, only_runner(tmp_path):
            pass
    with only_runner(tmp_path):
        assert str(os.getpid()) in (tmp_path / "runner.lock").read_text()


def test_study_json_holds_what_the_report_needs(setup: Setup, tmp_path: Path) -> None:
    plan = setup.plan(only=["grown"], seeds=[3, 4])
    write_study(tmp_path, plan, {"command": "c", "commit": "d"})
    study = json.loads((tmp_path / "study.json").read_text())
    rows = ["full_l2l", "broken", "grown"]
    assert ([row["name"] for row in study["rows"]], study["seeds"], study["commit"]) == (rows, [0, 3, 4], "d")
    assert study["jobs"] == list(plan.jobs)


def test_seeds_of_an_earlier_call_stay_in_the_plan_and_do_not_run_again(setup: Setup, tmp_path: Path) -> None:
    assert planned_seeds(tmp_path) == []
    write_study(tmp_path, setup.plan(seeds=[3, 4]), {})
    plan = setup.plan(earlier_seeds=planned_seeds(tmp_path))
    assert plan.seeds == [0, 3, 4]
    assert {job.seed for job in plan.to_run if job.kind == "distil"} == {0}


def test_a_part_of_a_study_leaves_the_rest_of_its_results_in_place(setup: Setup, tmp_path: Path) -> None:
    workspace, plan = setup.workspace(tmp_path), setup.plan(seeds=[0, 1])
    run(plan, workspace, "distil broken seed 0")
    for (row, _), job in plan.distil.items():
        if row != "broken":
            write_json(workspace.path(job) / "result.json", {"train_seconds": 6.0 if row == "full_l2l" else 4.0})
    part = setup.plan(only=["grown"], seeds=[1])
    (workspace.path(part.distil["grown", 1]) / "result.json").unlink()
    ran, runner = run(part, workspace)
    assert ran == ["distil grown seed 1"]
    assert runner.failed == []
    write_study(tmp_path, part, {})
    report = study_values(read_study(tmp_path))
    assert report["seeds"] == [0, 1]
    speed_ups = cell_values(read_study(tmp_path), ["grown"], ["speed_up"])["grown"]["speed_up"]
    assert speed_ups == {"0": 1.5, "1": "missing"}  # the Recorder's result is empty
    assert report["values"]["broken"]["val_output"]["0"] == "failed"
    jobs = study_results(tmp_path)["jobs"]
    assert {job["id"]: job["status"] for job in jobs}[plan.distil["full_l2l", 1].id] == "done"


def test_a_part_alone_is_a_report_with_gaps(setup: Setup, tmp_path: Path) -> None:
    part = setup.plan(only=["grown"])
    run(part, setup.workspace(tmp_path))
    write_study(tmp_path, part, {})
    jobs = study_results(tmp_path)["jobs"]
    assert {(job["row"], job["kind"]): job["status"] for job in jobs} == {
        (row, kind): "done" if row == "grown" else "planned"
        for row in ("full_l2l", "broken", "grown")
        for kind in ("distil", "export")
    }
    assert "4 of 6 jobs have not been done." in study_values(read_study(tmp_path))["caveats"]


# -- commands and schedulers --------------------------------------------------------------------------------------


def test_commands_name_what_other_jobs_made(tmp_path: Path) -> None:
    plan = Plan(load_study("table1_mini"), only=["interleave_equal"], seeds=[1])
    workspace = Workspace(tmp_path, study="table1_mini", wandb={"project": "p"})
    run(plan, workspace)
    jobs = {job.label: job for job in plan.jobs.values()}
    distil, export = jobs["distil interleave_equal seed 1"], jobs["export interleave_equal seed 1"]
    assert plan.corpus is not None
    assert plan.teacher is not None
    corpus, teacher = (tmp_path / job.folder for job in (plan.corpus, plan.teacher))
    command = workspace.command(distil)
    assert command[command.index("--data.root") + 1] == str(corpus / "corpus" / "LibriSpeech")
    assert command[command.index("--ckpt_path") + 1] == "last"
    config = (tmp_path / distil.folder / "config.yaml").read_text()
    assert "group: table1_mini" in config
    assert "- interleave_equal" in config
    probe = jobs["evaluate pr_probe interleave_equal seed 1"]
    evaluation = workspace.command(probe)
    assert evaluation[:5] == ["superb", "--task", "pr", "--preset", "probe"]
    assert workspace.command(replace(probe, task="asr"))[:5] == ["superb", "--task", "asr", "--preset", "superb"]
    assert evaluation[evaluation.index("--wandb.group") + 1] == "table1_mini"
    assert evaluation[evaluation.index("--wandb.tags") + 1] == '["interleave_equal"]'
    assert evaluation[evaluation.index("--upstream") + 1] == str(tmp_path / export.folder / "student")
    reference = workspace.command(jobs["evaluate pr_probe untrained seed 0"])
    assert reference[reference.index("--upstream") + 1].endswith("/teacher")
    assert reference[reference.index("--upstream") + 1] != str(teacher / "teacher")


def test_slurm_gets_the_resources_and_the_sbatch_file_says_so(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    from submitit.slurm import slurm

    monkeypatch.setattr(slurm.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    settings = SlurmSettings(partition="gpu", account="speech", hours=2, gpus=4, cpus=6, setup=("source env.sh",))
    executor = SlurmExecutor(setup.workspace(tmp_path), settings)
    job = setup.plan().distil["grown", 0]
    executor._executor.update_parameters(**executor.parameters(job))
    text = executor._executor._executor._make_submission_file_text("python -m submitit", "u")
    assert isinstance(executor._executor, submitit.AutoExecutor)
    for line in ("partition=gpu", "account=speech", "time=120", "gpus-per-node=4", "cpus-per-task=6"):
        assert f"#SBATCH --{line}" in text
    assert "#SBATCH --job-name=distil-grown" in text
    assert "source env.sh" in text


@pytest.mark.slow  # 10 s, most of them to start two processes
def test_a_job_runs_through_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    workspace, plan = Workspace(tmp_path), Plan(load_study("table1_mini"), only=["full"], seeds=[0])
    assert plan.corpus is not None
    plan.jobs = {plan.corpus.id: replace(plan.corpus, row="full")}  # as if no other job needed it
    executor = SlurmExecutor(workspace, SlurmSettings(gpus=0, hours=0.1, cluster="local"))
    runner = Runner(plan, workspace, executor, Console(quiet=True))
    runner.run()
    assert runner.failed == []
    assert len(list((workspace.path(plan.corpus) / "corpus").rglob("*.flac"))) > 20
