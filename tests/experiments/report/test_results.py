"""``results.json``: the whole report can be made of it, and long curves are thinned in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from datamodules.files import read_json, write_json
from experiments.records.reading import CURVE_POINTS, read_run, recorded_run, run_record
from experiments.report.command import report
from experiments.report.plots import loss_stages
from experiments.report.study import build_report
from experiments.report.study_reading import read_study
from tests.conftest import REPOSITORY
from tests.experiments.report.made_up_study import write_study

ROWS = ("full_l2l", "interleave_equal", "midas_equal")
TEXTS = ("report.md", "report.tex", "report.csv", "report.json", "results.json")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("results") / "study", rows=ROWS)
    build_report(read_study(folder))
    return folder


@pytest.mark.ci
def test_results_alone_make_the_same_report(study: Path, tmp_path: Path) -> None:
    source = write_json(tmp_path / "results.json", read_json(study / "results.json"))
    report([str(source)])
    names = {path.name for path in study.iterdir() if path.is_file()} - {"study.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {"loss_vs_time.png", "similarity_cka.png", "ancestry.svg"} <= names
    for name in (*TEXTS, "ancestry.svg"):
        assert (tmp_path / name).read_text() == (study / name).read_text(), name


def test_control_results_without_curves_have_no_loss_pictures(study: Path, tmp_path: Path) -> None:
    content = read_json(study / "results.json")
    for job in content["jobs"]:
        (job["result"] or {}).pop("curves", None)
    files = build_report(read_study(write_json(tmp_path / "results.json", content))).files
    assert "report.md" in files
    assert "similarity_cka.png" not in files
    assert not any(name.startswith("loss_vs") for name in files)


@pytest.mark.ci
def test_only_the_files_that_were_asked_for_are_written(study: Path, tmp_path: Path) -> None:
    report([str(study)], output=str(tmp_path / "brief"), files=["report.md", "loss_vs_steps.png"])
    assert {path.name for path in (tmp_path / "brief").iterdir()} == {"report.md", "loss_vs_steps.png"}
    text = (tmp_path / "brief" / "report.md").read_text()
    assert "](loss_vs_steps.png)" in text
    assert text.count("![") == 1
    with pytest.raises(ValueError, match=r"no file loss\.png; it has report\.md, .*loss_vs_steps\.png"):
        report([str(study)], output=str(tmp_path / "other"), files=["loss.png"])
    with pytest.raises(ValueError, match=r"--files names none: choose from report\.md"):
        report([str(study)], output=str(tmp_path / "other"), files=[])
    assert not (tmp_path / "other").exists()


def test_what_is_no_study_is_refused(study: Path, tmp_path: Path) -> None:
    run = next((study / "runs").iterdir())
    for arguments, message in (
        ({"folders": [str(study), str(run)]}, "no study, but others are"),
        ({"folders": [str(run)]}, "run folders need --output"),
        ({"folders": [str(study / "report.json")]}, r"report\.json is no results\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            report(**arguments)


KEPT = sorted((REPOSITORY / "experiments" / "results").glob("*/results.json"))


@pytest.mark.parametrize("results", KEPT, ids=lambda path: path.parent.name)
def test_a_kept_report_is_that_of_its_results(results: Path, tmp_path: Path) -> None:
    """If it is older: ``interstack report PATH/results.json --files '[report.md,...]'`` with the pictures there."""
    names = [path.name for path in results.parent.iterdir() if path.name != "results.json"]
    assert len(names) <= 4
    build_report(read_study(results), tmp_path, ["report.md", *(name for name in names if name != "report.md")])
    assert (results.parent / "report.md").read_text() == (tmp_path / "report.md").read_text()


def long_run(folder: Path, steps: int, growth: list[int]) -> Path:
    generator = np.random.default_rng(0)
    folder.mkdir()
    lines = ["step,train/output,perf/train_seconds"]
    for step in range(1, steps + 1):
        stage = sum(step > at for at in growth)
        loss = "nan" if step == 10 else stage + float(generator.uniform(0, 0.1))
        lines.append(f"{step},{loss},{step * 0.5}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    write_json(folder / "summary.json", {"policy": "interleaved", "steps": steps, "depth": 12, "train_seconds": 1.0})
    event = {"epoch": 1, "depth_before": 6, "depth": 12, "ancestry": [0] * 12}
    write_json(folder / "growth.json", [event | {"step": step} for step in growth])
    return folder


@pytest.mark.parametrize(("steps", "most"), [(150, 150), (5000, CURVE_POINTS + 3)])
def test_long_curves_are_thinned_within_a_stage(steps: int, most: int, tmp_path: Path) -> None:
    growth = [steps // 3, steps // 2 + 7]
    run = long_run(tmp_path / "run", steps, growth)
    whole, thin = read_run(run), recorded_run(run, json.loads(json.dumps(run_record(run))))
    series = thin.series("train/output")
    assert most - 3 <= len(series.steps) <= most
    stage = np.searchsorted(growth, series.steps)
    known = np.isfinite(series.values)
    assert (np.floor(series.values[known]) == stage[known]).all()  # no point is a mean across a growth
    assert thin.seconds_at([steps])[0] == pytest.approx(steps / 2)
    assert (thin.growth, thin.steps, thin.depth_profile()) == (whole.growth, whole.steps, whole.depth_profile())
    for (_, one), (_, two) in zip(loss_stages(whole), loss_stages(thin), strict=True):
        assert two.mean() == pytest.approx(one.mean(), abs=0.01)
