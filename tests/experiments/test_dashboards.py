"""Dashboards: the specification, the objects built from it without a server, and the sweep's command line."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import dashboards
from experiments.cli import run
from experiments.dashboards import command
from experiments.dashboards.specification import study_specification
from tests.conftest import REPOSITORY
from tests.patience import PATIENCE
from tests.tiny_run import TINY
from tests.wandb_server import PROJECT, TEAM, WandbServer


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


# -- the sweep -----------------------------------------------------------------------------------------------


def shipped_sweep() -> dict[str, Any]:
    return yaml.safe_load((Path(dashboards.__file__).parent / "sweep.yaml").read_text())


def points(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Every point of the grid."""
    values = [setting.get("values", [setting.get("value")]) for setting in sweep["parameters"].values()]
    return [dict(zip(sweep["parameters"], point, strict=True)) for point in itertools.product(*values)]


def program(folder: Path, text: str) -> dict[str, str]:
    """Environment in which ``interstack`` is this shell script."""
    folder.mkdir()
    (folder / "interstack").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "interstack").chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_every_run_of_the_sweep_has_a_name_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = shipped_sweep()
    assert len(points(sweep)) == 15
    environment = program(tmp_path / "bin", 'printf "%s\\n" "$@"')
    written = []
    for number, point in enumerate(points(sweep)[3:5]):
        arguments = [f"--{name}={value}" for name, value in point.items()]  # as the agent writes them
        command = [*sweep["command"][:-1], *arguments]
        assert sweep["command"][-1] == "${args}"
        ran = subprocess.run(
            command, env=environment | {"WANDB_RUN_ID": f"id{number}"}, check=True, capture_output=True, text=True
        )
        with pytest.raises(SystemExit) as stop:
            run([*ran.stdout.splitlines(), "--print_config"])
        printed = capsys.readouterr()
        assert stop.value.code in (0, None), printed.err
        written.append(yaml.safe_load(printed.out))
    assert [each["name"] for each in written] == ["sweep-id0", "sweep-id1"]
    assert [each["wandb"]["id"] for each in written] == ["id0", "id1"]
    assert [each["model"]["objective"]["weight"] for each in written] == [0.25, 0.25]
    assert [each["seed_everything"] for each in written] == [0, 1]
    assert {each["ckpt_path"] for each in written} == {"last"}


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_the_agent_trains_every_point_of_the_sweep(tmp_path: Path, inputs: Path, server: WandbServer) -> None:
    places = ["--model.teacher.init_args.model", inputs / "teacher", "--data.cache_dir", inputs / "cache"]
    tiny = shlex.join(map(str, [*TINY, *places, "--wandb.mode", "online"]))
    python = shlex.quote(sys.executable)
    environment = program(tmp_path / "bin", f'exec {python} -m experiments.cli "$@" {tiny}')
    server.sweep = shipped_sweep()
    server.points = [
        {"data.root": str(inputs / "corpus"), "model.objective.weight": weight, "seed_everything": 0}
        for weight in (0.0, 0.5, 1.0)
    ]
    agent = [sys.executable, "-m", "wandb", "agent", f"{TEAM}/{PROJECT}/sweep"]
    subprocess.run(agent, env=environment | {"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, check=True)
    assert sorted(server.runs) == ["point0", "point1", "point2"]
    assert {each.exit_code for each in server.runs.values()} == {0}
    assert {each.sweep for each in server.runs.values()} == {"sweep"}
    weights = [server.runs[name].config["model"]["value"]["objective"]["weight"] for name in sorted(server.runs)]
    assert weights == [1.0, 0.5, 0.0]
    assert all("val/output" in each.summary for each in server.runs.values())
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == [f"sweep-{name}" for name in sorted(server.runs)]
    assert all((folder / "summary.json").is_file() for folder in folders)
