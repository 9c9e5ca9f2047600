"""The specification of a study's dashboard: plain JSON, equal for all studies except for name, title and rows."""

import json
from importlib.resources import files
from typing import Any

from experiments.studies.study import load_study

FORMAT = 1


def study_specification(study: str) -> dict[str, Any]:
    """Build sections and panels for the runs of a study: W&B group = study, W&B tag = row.

    Raises:
        InputError: there is no such study.
    """
    loaded = load_study(study)
    shipped = json.loads(files("experiments.dashboards").joinpath("spec.json").read_text(encoding="utf-8"))
    rows = [{"tag": row.name, "label": row.label} for row in loaded.rows]
    return {"study": loaded.name, "title": loaded.title, "rows": rows, **shipped}
