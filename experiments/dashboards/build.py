"""Build a W&B workspace view and a W&B report from a specification with ``wandb-workspaces`` (extra ``dashboards``)."""

from typing import TYPE_CHECKING, Any

from datamodules.errors import InputError

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces


def panel(spec: dict[str, Any]) -> Any:
    """Build one panel.

    Raises:
        InputError: the kind is unknown.
    """
    import wandb_workspaces.reports.v2 as reports

    settings = {key: value for key, value in spec.items() if key != "kind"}
    kinds = {"line": reports.LinePlot, "bar": reports.BarPlot, "scatter": reports.ScatterPlot}
    if spec["kind"] not in kinds:
        raise InputError(f"panel {spec.get('title')!r} has kind {spec['kind']!r}: choose from {', '.join(kinds)}")
    if spec["kind"] == "scatter":  # plots final values, which W&B calls summary metrics
        settings |= {axis: reports.SummaryMetric(settings[axis]) for axis in ("x", "y")}
    return kinds[spec["kind"]](**settings)


def build_workspace(spec: dict[str, Any], entity: str, project: str) -> "workspaces.Workspace":
    """Build a view of the runs whose group is the study; nothing is sent."""
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=spec["title"],
        sections=[
            workspaces.Section(name=section["name"], panels=[panel(each) for each in section["panels"]], is_open=True)
            for section in spec["sections"]
        ],
        runset_settings=workspaces.RunsetSettings(filters=[workspaces.Metric("Group") == spec["study"]]),
    )


def build_report(spec: dict[str, Any], entity: str, project: str) -> "reports.Report":
    """Build a report with one panel grid per section; its run sets name no project, so they use the report's own."""
    import wandb_workspaces.reports.v2 as reports

    blocks: list[Any] = [reports.P(text="Rows: " + ", ".join(f"{r['label']} ({r['tag']})" for r in spec["rows"]))]
    for section in spec["sections"]:
        runset = reports.Runset(name=spec["study"], filters=f"Group == '{spec['study']}'")
        panels = [panel(each) for each in section["panels"]]
        blocks += [reports.H2(text=section["name"]), reports.PanelGrid(runsets=[runset], panels=panels)]
    return reports.Report(entity=entity, project=project, title=spec["title"], blocks=blocks)
