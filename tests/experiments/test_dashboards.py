"""Dashboards: the specification, the objects built from it without a server, and the sweep's command line."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import dashboards
from experiments.cli import run
from experiments.dashboards import command
from experiments.dashboards.specification import study_specification


@pytest.mark.filterwarnings("ignore")
def test_the_workspace_shows_the_group_of_the_study() -> None:
    pytest.importorskip("wandb_workspaces")
    from experiments.dashboards.build import build_workspace

    spec = study_specification("table1_mini")
    text = build_workspace(spec, "someone", "interstack")._to_model().model_dump_json()
    assert "table1_mini" in text
    for section in spec["sections"]:
        assert all(panel["title"] in text for panel in section["panels"])
    assert "ablation_w" not in text


@pytest.mark.filterwarnings("ignore")
def test_the_report_has_run_sets_that_name_no_project() -> None:
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.reports.v2 as reports

    from experiments.dashboards.build import build_report, panel

    spec = study_specification("table1_mini")
    grids = [each for each in build_report(spec, "someone", "p").blocks if isinstance(each, reports.PanelGrid)]
    assert len(grids) == len(spec["sections"])
    for grid, section in zip(grids, spec["sections"], strict=True):
        assert [each.title for each in grid.panels] == [each["title"] for each in section["panels"]]
        assert all((runset.project, runset.entity) == ("", "") for runset in grid.runsets)
        assert all("table1_mini" in str(runset.filters) for runset in grid.runsets)
    with pytest.raises(ValueError, match="kind 'pie'"):
        panel({"kind": "pie", "title": "x"})


def test_without_a_key_the_specification_is_written_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "has_key", lambda: False)
    command.dashboard("table1_mini", entity="someone", output=str(tmp_path))
    written = json.loads((tmp_path / "table1_mini.json").read_text())
    assert written == study_specification("table1_mini")
    assert "nothing was sent to W&B" in " ".join(capsys.readouterr().out.split())


def sweep_arguments(sweep: dict[str, Any]) -> list[list[str]]:
    """What W&B's agent puts in the place of ``${args}``, for every point of the grid."""
    values = [setting.get("values", [setting.get("value")]) for setting in sweep["parameters"].values()]
    return [
        [f"--{name}={value}" for name, value in zip(sweep["parameters"], point, strict=True)]
        for point in itertools.product(*values)
    ]


def test_the_sweeps_command_line_parses(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = yaml.safe_load((Path(dashboards.__file__).parent / "sweep.yaml").read_text())
    assert sweep["command"] == ["interstack", "fit", "${args}"]
    points = sweep_arguments(sweep)
    assert len(points) == 15
    with pytest.raises(SystemExit) as stop:
        run(["fit", *points[4], "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code in (0, None), printed.err
    assert yaml.safe_load(printed.out)["model"]["objective"]["weight"] == 0.25
