"""``interstack dashboard STUDY``: make the W&B workspace view and report of a study."""

from pathlib import Path

from rich.console import Console

from datamodules.files import write_json
from experiments.dashboards.specification import study_specification
from experiments.records.loggers import has_key


def dashboard(study: str, entity: str | None = None, project: str = "interstack", output: str = "dashboards") -> None:
    """Save a workspace view and a report draft on W&B; without a key or an entity only the specification is written.

    Args:
        study: name of a shipped study, or a YAML file.
        entity: W&B user or team.
        project: W&B project of the study's runs.
        output: folder for the specification, NAME.json.
    """
    spec = study_specification(study)
    path = Path(output) / f"{spec['study']}.json"
    write_json(path, spec)
    console = Console()
    console.print(f"specification: {path}")
    missing = "an --entity" if entity is None else None if has_key() else "a key (`wandb login`)"
    if missing or entity is None:
        console.print(f"nothing was sent to W&B, which needs {missing}")
        return
    from experiments.dashboards.build import build_report, build_workspace

    for built in (build_workspace(spec, entity, project), build_report(spec, entity, project)):
        built.save()
        console.print(f"saved: {built.url}")
