"""Study files: each one loads, plans and can be looked at; inheritance; what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import HubertConfig

from datamodules.synthetic import plan_speakers
from experiments.records.accounting import Growth
from experiments.studies.estimate import Estimator, estimate_table, teacher_config
from experiments.studies.job import Workspace
from experiments.studies.plan import Plan
from experiments.studies.reproduce import reproduce
from experiments.studies.study import load_study, row_settings, shipped_studies
from lightning_modules.pretraining import PretrainingConfig
from lightning_modules.pretraining import hubert_config as pretraining_config

NAMES = ["table1", "ablation_w", "ablation_intermediate", "ablation_policy", "ablation_schedule"]
NAMES += ["ablation_optimizer_state", "ablation_speed", "controls", "similarity"]
SHALLOW = {"distilhubert": 2, "distilhubert_equal": 2, "one_3layer": 3, "one_3layer_equal": 3}
"""Depth of the rows that do not have twelve layers."""


def test_every_study_of_the_paper_has_a_mini_variant() -> None:
    assert set(shipped_studies()) == {
        *NAMES,
        *(f"{name}_mini" for name in NAMES),
        "quickstart",
        "quickstart_fast",
        "table1_gpu",
        "table1_gpu_short",
        "ablation_targets_whisper",
        "front_end_whisper",
        "published_students",
        "published_students_whisper",
        "table1_whisper",
        "table1_whisper_gpu",
        "table1_whisper_length",
    }


@pytest.mark.parametrize("name", shipped_studies())
def test_a_study_plans_and_prints_its_costs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study(name)
    reproduce(name, str(tmp_path / "output"), dry_run=True)
    printed = capsys.readouterr().out
    assert all(row.name[:8] in printed for row in study.rows)
    assert "FLOP/s" in printed
    assert "only distillation (its checkpoints) in FLOPs" in " ".join(printed.split())
    assert not (tmp_path / "output").exists()
    plan = Plan(study)
    assert len(plan.distil) == len(study.rows) * len(study.seeds)
    assert len({job.id for job in plan.distil.values()}) == len(plan.distil)
    for (row, _), job in plan.distil.items():
        model = job.settings.get("model", {})
        depth = model.get("student", {}).get("num_layers", 12)
        epochs = job.settings.get("trainer", {}).get("max_epochs", 75)
        assert Growth.of(job.settings.get("growth", {}), depth, epochs).stages[-1] == SHALLOW.get(row, 12), row


@pytest.mark.parametrize("name", [f"{name}_mini" for name in NAMES])
def test_a_row_of_a_mini_study_is_estimated_at_a_minute_at_most(name: str) -> None:
    plan = Plan(load_study(name))
    estimator = Estimator(plan, on_gpu=False)
    for row in plan.study.rows:
        jobs = [job for job in plan.jobs.values() if job.row == row.name and job.seed == plan.seeds[0]]
        assert sum(estimator.of(job).seconds for job in jobs) <= 60


@pytest.mark.parametrize("name", ["ablation_policy", "ablation_policy_mini"])
def test_policies_are_compared_at_equal_mean_depth(name: str) -> None:
    study = load_study(name)
    depths = set()
    for row in study.rows[1:]:
        settings = row_settings(study, row, 0)
        growth = Growth.of(settings["growth"], 12, settings.get("trainer", {}).get("max_epochs", 75))
        depths.add(round(growth.mean_depth, 6))
    assert len(study.rows) == 11
    assert len(depths) == 1


def test_the_paper_stands_beside_the_main_table_and_is_no_row_of_it() -> None:
    study = load_study("table1")
    assert [row.name for row in study.rows][:3] == ["full", "full_l2l", "gradstack_equal"]
    published = {(line["label"], line.get("schedule")): line["values"] for line in study.references}
    assert published["InterleaveStack", "prop-1"]["pr/per"] == 8.88
    assert published["DPHuBERT", None]["sid/accuracy"] == 76.83


def test_the_planned_comparisons_of_the_whisper_study() -> None:
    study = load_study("table1_whisper")
    pairs = [(each.row, each.reference, each.margin) for each in study.comparisons]
    assert pairs == [
        ("interleave_equal", "full_l2l", -1),
        ("interleave_equal", "gradstack_l2l_equal", 0),
        ("interleave_equal", "gradstack_equal", 0),
        ("interleave_equal", "midas_equal", 0),
        ("gradstack_equal", "gradstack_l2l_equal", 0),
    ]
    assert {each.measure for each in study.comparisons} == {"frames_probe/accuracy"}
    assert load_study("table1_whisper_gpu").comparisons == study.comparisons
    for name in ("table1_whisper_length", "ablation_targets_whisper"):
        assert load_study(name).comparisons == []


def test_growth_at_random_times_depends_on_the_seed_alone() -> None:
    study = load_study("controls")
    row = study.row("interleave_random_times")
    drawn = [row_settings(study, row, seed)["growth"]["schedule"] for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert Growth.of({"policy": "interleaved", "schedule": drawn[1]}, 12, 75).stages == (3, 6, 9, 12)


def test_the_gpu_study_has_the_papers_sizes_and_is_estimated_on_one(tmp_path: Path) -> None:
    study, paper = load_study("table1_gpu"), load_study("table1")
    assert ([row.name for row in study.rows], study.seeds) == ([row.name for row in paper.rows], [0, 1, 2])
    for row in study.rows:
        settings, published = row_settings(study, row, 0), row_settings(paper, row, 0)
        assert settings["trainer"]["precision"] == "bf16-mixed"
        assert "student" not in settings.get("model", {})  # the defaults are the paper's
        assert settings.get("growth") == published.get("growth")
    teacher = pretraining_config(PretrainingConfig(**study.teacher["recipe"]))
    for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim"):
        assert getattr(teacher, size) == getattr(HubertConfig(), size)
    assert study.corpus is not None
    speakers = plan_speakers(**study.corpus)
    assert len(speakers) > 100
    assert sum(speaker.seconds for speaker in speakers if speaker.split == "train-clean-100") == pytest.approx(72_000)
    units = [
        estimate_table(Plan(each), Workspace(tmp_path)).columns[4].header for each in (study, load_study("table1_mini"))
    ]
    assert units == ["GPU hours", "GPU hours" if torch.cuda.is_available() else "seconds"]


@pytest.mark.parametrize(("policy", "stages"), [("stackbert", (3, 6, 12)), ("one_shot_stack", (3, 12))])
def test_growth_at_random_times_has_the_stages_of_its_policy(
    policy: str, stages: tuple[int, ...], tmp_path: Path
) -> None:
    rows = (
        "rows: [{name: a, label: A, configs: [interleave_equal], random_growth: true, overrides: {growth.policy: %s}}]"
    )
    study = load_study(write(tmp_path, "title: T\n" + rows % policy))
    settings = row_settings(study, study.rows[0], 0)
    assert Growth.of(settings["growth"], 12, 75).stages == stages
    study = load_study(write(tmp_path, "title: T\n" + rows % "none"))
    with pytest.raises(ValueError, match="row a has random_growth, but no"):
        row_settings(study, study.rows[0], 0)


def write(folder: Path, text: str, name: str = "own.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def comparison(text: str, **changes: str) -> str:
    """A study of two rows and a task, with a comparison of which some keys are others."""
    keys = {"label": "X", "row": "a", "reference": "b", "measure": "pr_probe/per"} | changes
    one = "{" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"
    return f"title: T\n{ROWS}tasks: [pr_probe]\ncomparisons:\n- {one}\n{text}"


ROWS = "rows:\n- {name: a, label: A, configs: [full]}\n- {name: b, label: B, configs: [full_l2l]}\n"


def test_a_variant_holds_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path, f"title: T\noverrides: {{data.batch_size: 2, trainer.max_epochs: 5}}\n{ROWS}", "first.yaml")
    variant = write(
        tmp_path,
        "base: first\noverrides: {trainer.max_epochs: 7}\nkeep_rows: [b]\nrow_overrides: {b: {data.max_samples: 9}}\n",
    )
    study = load_study(variant)
    assert (study.name, study.title, [row.name for row in study.rows]) == ("own", "T", ["b"])
    settings = row_settings(study, study.rows[0], 0)
    assert settings["data"] == {"batch_size": 2, "max_samples": 9}
    assert settings["trainer"] == {"max_epochs": 7}
    assert settings["growth"] == {"policy": "none"}


def test_what_stands_in_the_variant_counts_however_it_is_written(tmp_path: Path) -> None:
    first = "{trainer: {max_epochs: 5, devices: 1}, trainer.max_epochs: 3}"
    write(tmp_path, f"title: T\noverrides: {first}\n{ROWS}", "first.yaml")
    for overrides in ("overrides: {trainer: {max_epochs: 7}}", "row_overrides: {b: {trainer.max_epochs: 7}}"):
        study = load_study(write(tmp_path, f"base: first\nkeep_rows: [b]\n{overrides}\n"))
        assert row_settings(study, study.rows[0], 0)["trainer"] == {"max_epochs": 7, "devices": 1}
    study = load_study(write(tmp_path, "base: first\nkeep_rows: [b]\noverrides: {trainer: {devices: 2}}\n"))
    assert row_settings(study, study.rows[0], 0)["trainer"] == {"max_epochs": 3, "devices": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + "titel: T", "unknown key titel"),
        ("title: T\n" + ROWS + "tasks: [speling]", "unknown tasks speling"),
        ("title: T\n" + ROWS + "evaluation: {pr: {preset: probe}}", "the task pr_probe is the probe"),
        ("title: T\n" + ROWS + "keep_rows: [c]", "keep_rows names c"),
        ("title: T\n" + ROWS + "row_overrides: {c: {}}", "row_overrides names c"),
        ("title: T\n" + ROWS + "baseline: c", "no row 'c'"),
        ("title: T\n" + ROWS + "data: corpus", "no settings under `corpus`"),
        ("title: T\n" + ROWS + "- {name: a, label: C, configs: []}", "two rows have the name a"),
        ("title: T\nrows: [{name: a-b, label: A, configs: []}]", "not a-b"),
        (ROWS, "the study own lacks title"),
        ("title: T\nrows: [{name: a, configs: []}]", "the row a lacks label"),
        ("title: T\nrows: [{name: a, label: A}]", "the row a lacks configs"),
        ("title: T\nrows: [{label: A, configs: []}]", "rows are mappings with a name, not {'label': 'A', 'configs': "),
        ("title: T\nrows: [a]", "rows are mappings with a name, not a"),
        ("title: T\nrows:", "needs rows and seeds"),
        ("title: T\nrows: [{name: a, label: A, configs: [], match: {cost: flops}}]", "lacks target, reference"),
        ("title: [T\n" + ROWS, "is not valid YAML: .* line"),
        ("- title", "must be a mapping"),
        (comparison("", row="c"), "the comparison 'X' names c, which is no row of it: choose from a, b"),
        (comparison("", reference="c"), "the comparison 'X' names c, which is no row"),
        (comparison("keep_rows: [a]"), "the comparison 'X' names b, which is no row of it: choose from a"),
        (comparison("", measure="pr/per"), r"has the measure pr/per: name TASK/METRIC with a task .* \(pr_probe\)"),
        (comparison("", measure="val_ouput"), "has the measure val_ouput: name .*, val_output"),
        (comparison("", measure="mean_depth"), "has the measure mean_depth: name"),
        (comparison("", margin="1"), r"has the margin 1: give 0, or a number below it \(how much worse\)"),
        (comparison("", margin=".nan"), "has the margin nan: give 0"),
        (comparison("", margin="one"), "has the margin one: give 0"),
        (comparison("- {label: X, row: b, reference: a, measure: val_output}"), "two comparisons have the label X"),
        (comparison("- {label: Y, row: a}"), "the comparison Y lacks reference, measure"),
        (comparison("- {label: Y, rows: a}"), "unknown key rows in comparison: label, row, reference, measure, margin"),
        (comparison("- a against b"), "a comparison is a mapping of label, row, .*, not a against b"),
    ],
)
def test_a_mistake_in_a_study_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_study(write(tmp_path, text))
    assert "own.yaml" in str(error.value)


@pytest.mark.parametrize("measure", ["pr_probe/per", "val_output", "val_layer_4", "flops"])
def test_comparisons_take_metrics_losses_and_costs(measure: str, tmp_path: Path) -> None:
    (found,) = load_study(write(tmp_path, comparison("", measure=measure, margin="-0.5"))).comparisons
    assert (found.row, found.reference, found.measure, found.margin) == ("a", "b", measure, -0.5)


def test_a_mistake_in_a_base_is_named_with_its_file(tmp_path: Path) -> None:
    write(tmp_path, "title: [", "first.yaml")
    with pytest.raises(ValueError, match=r"first\.yaml is not valid YAML"):
        load_study(write(tmp_path, "base: first\n"))


def test_an_unknown_study_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="table1_mini"):
        load_study("table7")


def test_the_estimate_of_the_paper_is_that_of_its_step() -> None:
    plan = Plan(load_study("table1"), only=["full_l2l"], seeds=[0])
    assert Estimator(plan, on_gpu=True).of(plan.distil["full_l2l", 0]).flops == pytest.approx(9.1e18, rel=0.15)


@pytest.mark.parametrize(
    ("model", "width", "layers"),
    [
        ("openai/whisper-base", 512, 6),
        ("openai/whisper-tiny.en", 384, 4),
        ("openai/whisper-large-v3", 1280, 32),
        ("facebook/hubert-base-ls960", 768, 12),
        ("openai/whisper-unknown", 768, 12),
    ],
)
def test_an_estimate_counts_a_teacher_by_its_hub_name(model: str, width: int, layers: int) -> None:
    config = teacher_config(model)
    assert (config.hidden_size, config.num_hidden_layers) == (width, layers)
