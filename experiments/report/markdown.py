"""A report as Markdown, with its pictures as files beside it."""

from collections.abc import Sequence

from experiments.report.document import COLUMN_NOTES, PUBLISHED_NOTE, REAL_THING, Report, provenance
from experiments.report.tables import PUBLISHED_COLUMNS, RESULT_COLUMNS, markdown_table


def markdown(report: Report, pictures: Sequence[tuple[str, str, str]] = ()) -> str:
    """Render the whole report; ``pictures`` are (file name beside the report, heading, caption)."""
    notes = report.notes
    parts = [f"# {notes.title}", *(f"> {caveat}" for caveat in notes.caveats), "## Results"]
    parts += [markdown_table(RESULT_COLUMNS, report.rows).rstrip()]
    parts += [_bullets([*report.footnotes, *COLUMN_NOTES])]
    for name, heading, caption in pictures:
        parts += [f"## {heading}", f"![{heading}]({name})", caption]
    parts += ["## Published, full-scale SUPERB", PUBLISHED_NOTE]
    parts += [markdown_table(PUBLISHED_COLUMNS, report.published).rstrip()]
    parts += ["## The real thing", REAL_THING, f"```sh\n{notes.real_command}\n```", "## How this was made"]
    parts += [_bullets([f"{name}: {value}" for name, value in provenance(notes)])]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
