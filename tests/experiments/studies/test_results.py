"""A study that goes on from the results of another machine."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig

from datamodules.files import read_json, write_json
from experiments.deployment.macs import superb_gmacs
from experiments.records.accounting import student_layout
from experiments.report.study import study_values
from experiments.report.study_reading import read_study, study_results
from experiments.studies.job import Workspace, is_done, read_result
from experiments.studies.loop import write_study
from experiments.studies.plan import Inputs, Job, Plan
from experiments.studies.reproduce import reproduce
from experiments.studies.results import differing_jobs, restore_results
from experiments.studies.study import load_study
from lightning_modules.student_config import StudentConfig
from tests.helpers import save_teacher

STUDY = """
title: T
corpus: {minutes: 1.0}
data: corpus
teacher: {steps: 2}
tasks: [pr_probe]
baseline: a
columns: [val_output]
seeds: [0, 1]
rows:
- {name: a, label: A, configs: [full_l2l]}
- {name: b, label: B, configs: [interleave_equal]}
"""


def finish(output: Path, plan: Plan, *left_out: str) -> Path:
    """All jobs of ``plan`` as done, but those with these labels; returns results.json."""
    for number, job in enumerate(plan.jobs.values()):
        if job.label not in left_out:
            write_json(output / job.folder / "result.json", {"val_output": float(number)})
            write_json(output / job.folder / "job.json", job.described() | {"status": "done", "seconds": 3.0})
    write_study(output, plan, {})
    return write_json(output / "results.json", study_results(output))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "own.yaml").write_text(STUDY)
    return Plan(load_study(str(tmp_path / "own.yaml")))


def test_complete_rows_are_taken_over_and_the_others_are_not(plan: Plan, tmp_path: Path) -> None:
    path = finish(tmp_path / "one", plan, "evaluate pr_probe b seed 1")
    restored = restore_results(Workspace(tmp_path / "two"), plan, path)
    done = {job.label for job in plan.jobs.values() if is_done(tmp_path / "two", job.id)}
    complete = {job.label for job in plan.jobs.values() if job.row and (job.row, job.seed) != ("b", 1)}
    assert done == complete
    assert {plan.jobs[job_id].label for job_id in restored} == complete
    assert {job.kind for job in plan.jobs.values() if not job.row} == {"corpus", "teacher"}  # which are made again
    for job in plan.jobs.values():
        if job.label in complete:
            assert read_result(tmp_path / "two", job.id) == read_result(tmp_path / "one", job.id)
    assert restore_results(Workspace(tmp_path / "two"), plan, path) == []


def test_results_of_an_earlier_version_get_what_their_settings_say(plan: Plan, tmp_path: Path) -> None:
    path = finish(tmp_path / "one", plan)
    teacher = save_teacher(tmp_path / "teacher")
    restore_results(Workspace(tmp_path / "two", Inputs(teacher=str(teacher))), plan, path)
    (job,) = (job for job in plan.jobs.values() if job.label == "distil a seed 0")
    gmacs = sum(superb_gmacs(student_layout(StudentConfig(), AutoConfig.from_pretrained(teacher))))
    loss = {"loss_function": "mse to hidden states of layer 4 (normalize_targets: none)"}
    expected = read_result(tmp_path / "one", job.id) | {"superb_gmacs": gmacs, "summary": loss}
    assert read_result(tmp_path / "two", job.id) == expected
    newer = {"superb_gmacs": 1.0, "summary": {"loss_function": "l1", "steps": 4}}
    write_json(tmp_path / "one" / job.folder / "result.json", newer)
    write_json(path, study_results(tmp_path / "one"))
    restore_results(Workspace(tmp_path / "three", Inputs(teacher=str(teacher))), plan, path)
    assert read_result(tmp_path / "three", job.id) == newer


def test_the_report_is_that_of_the_first_machine(plan: Plan, tmp_path: Path) -> None:
    path = finish(tmp_path / "one", plan)
    restore_results(Workspace(tmp_path / "two"), plan, path)
    write_study(tmp_path / "two", plan, {})
    one, two = (study_values(read_study(tmp_path / name))["values"] for name in ("one", "two"))
    assert one == two
    assert two["b"]["val_output"].keys() == {"0", "1"}
    assert "missing" not in two["b"]["val_output"].values()


def test_a_dry_run_writes_nothing(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finish(tmp_path / "one", plan)
    reproduce(str(tmp_path / "own.yaml"), str(tmp_path / "two"), dry_run=True, finished=str(path))
    jobs = sum(1 for job in plan.jobs.values() if job.row)
    assert f"{jobs} jobs would be taken over from" in capsys.readouterr().out
    assert not (tmp_path / "two").exists()
    workspace = Workspace(tmp_path / "two")
    assert restore_results(workspace, plan, path, dry_run=True) == restore_results(workspace, plan, path)


def test_a_corpus_is_needed_only_for_what_is_not_taken_over(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finish(tmp_path / "one", plan, "evaluate pr_probe b seed 1")
    looked_at: list[str] = []

    def refuse(workspace: Workspace, jobs: list[Job]) -> None:
        looked_at.extend(job.label for job in jobs if job.row)
        raise ValueError("not there")

    monkeypatch.setattr("experiments.studies.reproduce.require_corpora", refuse)
    with pytest.raises(ValueError, match="not there"):
        reproduce(str(tmp_path / "own.yaml"), str(tmp_path / "two"), finished=str(path))
    assert set(looked_at) == {job.label for job in plan.jobs.values() if (job.row, job.seed) == ("b", 1)}
    assert not (tmp_path / "two").exists()


def test_results_of_other_settings_are_left_alone_and_named(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finish(tmp_path / "one", plan)
    (tmp_path / "own.yaml").write_text(STUDY + "overrides: {trainer.max_epochs: 5}\n")
    other = Plan(load_study(str(tmp_path / "own.yaml")))
    restore_results(Workspace(tmp_path / "two"), other, path)
    assert not any(is_done(tmp_path / "two", job.id) for job in other.jobs.values() if job.row in ("a", "b"))
    two = Workspace(tmp_path / "two")
    assert differing_jobs(two, plan, path) == []
    kinds = Counter(f"{job.kind} {job.task}".strip() for job in other.jobs.values() if job.row in ("a", "b"))
    named = [f"{kind} ({count})" for kind, count in kinds.items()]
    assert differing_jobs(two, other, path) == named
    reproduce(str(tmp_path / "own.yaml"), str(tmp_path / "two"), dry_run=True, finished=str(path))
    said = " ".join(capsys.readouterr().out.split())
    assert f"of: {', '.join(named)}; their rows and seeds run again as a whole" in said
    finish(tmp_path / "two", other)
    assert differing_jobs(two, other, path) == []


def test_a_task_with_another_corpus_is_named(tmp_path: Path) -> None:
    """Only that task differs; the other jobs of its rows have the ids of the file."""
    (tmp_path / "own.yaml").write_text(STUDY.replace("[pr_probe]", "[pr_probe, sid_probe]"))
    plans = []
    for name in ("one", "two"):
        (tmp_path / f"speakers_{name}.tsv").write_text(f"{name}.wav\tspeaker\ttrain\n")
        roots = {"sid_probe": str(tmp_path / f"speakers_{name}.tsv")}
        plans.append(Plan(load_study(str(tmp_path / "own.yaml")), Inputs(roots=roots)))
    path = finish(tmp_path / "out", plans[0])
    rows = sum(job.task == "sid_probe" and bool(job.row) for job in plans[1].jobs.values())
    two = Workspace(tmp_path / "two")
    assert differing_jobs(two, plans[0], path) == []
    assert differing_jobs(two, plans[1], path) == [f"evaluate sid_probe ({rows})"]


def test_what_is_no_such_file_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    for path in (tmp_path / "report.json", tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match=r"is no results\.json of `interstack reproduce`"):
            restore_results(Workspace(tmp_path / "two"), plan, path)
    assert read_json(tmp_path / "report.json") == {}
