"""A tiny study from its file to its report, by way of every kind of job that has a command of its own."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.files import read_json
from experiments.dashboards.specification import study_specification
from experiments.report.study import study_texts, study_values
from experiments.report.study_reading import read_study
from experiments.studies.executors import run_here
from experiments.studies.job import Workspace, execute, read_result
from experiments.studies.plan import Inputs, Plan
from experiments.studies.reproduce import reproduce
from experiments.studies.study import load_study
from tests.conftest import REPOSITORY
from tests.datamodules.superb import corpora
from tests.helpers import save_corpus, save_teacher

STUDY = """
title: Tiny
baseline: grown
data: root
overrides:
  model.student: {hidden_size: 16, intermediate_size: 24, num_heads: 2}
  data: {train_splits: [train], val_splits: [dev], batch_size: 4, crop: fixed, batches_per_epoch: 1, num_workers: 0}
  trainer: {accelerator: cpu, devices: 1, max_epochs: 4, enable_progress_bar: false, enable_model_summary: false}
  wandb.mode: disabled
rows:
- {name: grown, label: Grown, configs: [interleave_equal]}
tasks: [pr, pr_probe]
similarity: true
cache: targets
upstreams: [teacher, fbank]
evaluation:
  pr: &options
    updates: 2
    data: {train_splits: [train], dev_splits: [dev], test_splits: [test], num_workers: 0}
  pr_probe: *options
"""


@pytest.mark.slow
def test_superb_probe_and_similarity_run_as_jobs_and_stand_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("signal.signal", lambda *args: None)  # pytest's own stays
    (tmp_path / "tiny.yaml").write_text(STUDY)
    corpus = save_corpus(tmp_path / "corpus", {"train": 8, "dev": 2, "test": 2})
    teacher, output = save_teacher(tmp_path / "teacher", layers=12), tmp_path / "output"
    lexicon = corpora.lexicon(tmp_path / "lexicon.txt")
    reproduce(str(tmp_path / "tiny.yaml"), str(output), root=str(corpus), teacher=str(teacher), lexicon=str(lexicon))
    printed = capsys.readouterr().out
    assert "what is left to do" in printed
    assert "PR probe" in printed
    jobs = json.loads((output / "results.json").read_text())["jobs"]
    assert all(job["status"] == "done" for job in jobs)
    kinds = {(job["kind"], job["task"]): job for job in jobs if job["row"] not in ("teacher", "fbank")}
    assert_targets_were_read_from_one_cache(output)
    full, probe = kinds["evaluate", "pr"]["result"], kinds["evaluate", "pr_probe"]["result"]
    assert (full["preset"], probe["preset"], full["task"], probe["task"]) == ("superb", "probe", "pr", "pr_probe")
    assert full["trainable_parameters"] > probe["trainable_parameters"]
    stages = kinds["similarity", ""]["result"]["runs"][0]["stages"]
    assert [stage["depth"] for stage in stages] == [3, 6, 9, 12]
    assert_dashboard_finds_its_metrics(output, full)
    report = study_values(read_study(output))
    assert report["values"]["grown"]["pr/per"] == {"0": full["test"]["per"]}
    assert report["values"]["grown"]["pr_probe/per"] == {"0": probe["test"]["per"]}
    references = {reference["name"]: reference["values"] for reference in report["measured_references"]}
    assert references.keys() == {"teacher", "fbank"}
    assert all("pr/per" in values for values in references.values())
    assert (output / "report.md").read_text().startswith(study_texts(report)["md"])
    assert {"similarity_cka", "layer_weights_pr", "layer_weights_pr_probe"} <= {p.stem for p in output.glob("*.png")}


def assert_targets_were_read_from_one_cache(output: Path) -> None:
    (cache,) = (output / "jobs").glob("*/targets/targets.json")
    configs = {path: path.with_name("job.json").read_text() for path in (output / "jobs").glob("*/config.yaml")}
    (config,) = (path for path, job in configs.items() if '"kind": "distil"' in job)
    assert str(cache.parent) in config.read_text()


def assert_dashboard_finds_its_metrics(output: Path, superb: dict[str, Any]) -> None:
    """Every key of the specification is one that a run logs, or that its summary has."""
    (run,) = (output / "runs").iterdir()
    with (run / "metrics.csv").open() as file:
        known = {"Step", *next(csv.reader(file)), *json.loads((run / "summary.json").read_text())}
    sections = {section["name"]: section["panels"] for section in study_specification("table1")["sections"]}
    for panel in [*sections["Loss"], *sections["Speed"]]:
        axes = [panel.get("x", "Step"), panel.get("y", []), panel.get("metrics", [])]
        shown = {key for axis in axes for key in ([axis] if isinstance(axis, str) else axis)}
        assert shown <= known, panel["title"]
    assert "test.per" in [metric for panel in sections["SUPERB"] for metric in panel["metrics"]]
    assert "per" in superb["test"]


@pytest.mark.ci
def test_a_run_reads_the_features_of_the_front_end_that_its_seed_draws(tmp_path: Path) -> None:
    head, row, _ = STUDY.partition("- {name: grown")
    overrides = "model.student.front_end: frozen, model.student.front_end_init: random, model.student.conv_channels: 16"
    text = f"{head}{row}, label: Grown, configs: [interleave_equal], cache: features, overrides: {{{overrides}}}}}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    corpus = save_corpus(tmp_path / "corpus", {"train": 8, "dev": 2})
    inputs = Inputs(str(corpus), str(save_teacher(tmp_path / "teacher", layers=12)))
    plan = Plan(load_study(str(tmp_path / "tiny.yaml")), inputs, seeds=[0, 1])
    workspace = Workspace(tmp_path / "output", inputs)
    for job in plan.to_run:
        if job.kind in ("targets", "distil"):
            assert execute(workspace, job, launch=run_here), (workspace.path(job) / "log.txt").read_text()
    results = [read_result(workspace.output, plan.distil["grown", seed].id) for seed in (0, 1)]
    assert all(read_json(workspace.output / r["run"] / "summary.json")["cached_features"] for r in results)
    made = [workspace.needed(plan.distil["grown", seed], "targets") for seed in (0, 1)]
    caches = [workspace.output / "jobs" / str(job) for job in made]
    made_with = [read_json(cache / "targets" / "targets.json")["settings"] for cache in caches]
    assert made_with[0]["student.front_end_weights"] != made_with[1]["student.front_end_weights"]
