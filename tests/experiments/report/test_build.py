"""A whole report: its numbers, its footnotes, its files."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from experiments.report import ReferenceRow, Report, ReportRun, build_report
from experiments.report.document import assemble, read_runs
from experiments.report.markdown import markdown
from experiments.report.tables import RESULT_COLUMNS, cell, markdown_table
from tests.experiments.report.made_up_runs import NOTES, REFERENCES, two_runs, write_run

pytest.importorskip("matplotlib")


def report_of(runs: list[ReportRun]) -> Report:
    return assemble(read_runs(runs), REFERENCES, NOTES)


def test_rows(tmp_path: Path) -> None:
    rows = [[cell(column, row) for column in RESULT_COLUMNS] for row in report_of(two_runs(tmp_path)).rows]
    assert rows == [
        ["Full", "none", "-", "873k", "21.3", "0.148", "0.159", "100", "1.00", "12.0"],
        ["Interleave", "interleaved", "equal", "873k", "24.0", "0.0513", "0.200", "80", "1.25", "7.5"],
        ["Teacher", "-", "-", "2.61M", "17.7", "-", "-", "-", "-", "-"],
        ["Untrained", "-", "-", "873k", "87.9", "-", "-", "-", "-", "-"],
    ]


def test_speed_up_is_against_full_wherever_it_stands(tmp_path: Path) -> None:
    rows = report_of(two_runs(tmp_path)[::-1]).rows
    assert [row.speed_up for row in rows[:2]] == [pytest.approx(1.25), pytest.approx(1)]


def test_without_full_there_is_no_speed_up_and_it_says_so(tmp_path: Path) -> None:
    report = report_of(two_runs(tmp_path)[1:])
    assert report.rows[0].speed_up is None
    assert any("No speed-up is given" in note for note in report.footnotes)
    assert not any("No speed-up" in note for note in report_of(two_runs(tmp_path / "both")).footnotes)


def test_a_diverged_run_is_a_dash_and_is_explained(tmp_path: Path) -> None:
    run = ReportRun(write_run(tmp_path / "run", val_output=float("nan")), "Bad", float("inf"))
    report = report_of([run])
    assert (report.rows[0].val_output, report.rows[0].per) == (None, None)
    assert "Bad: per, val_output came out as NaN or infinite; the run diverged." in report.footnotes


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_that_the_summary_says_as_null_diverged_only_where_there_was_a_validation(
    validated: bool, tmp_path: Path
) -> None:
    run = ReportRun(write_run(tmp_path / "run", val_output=None), "Bad")
    if validated:
        path = run.folder / "metrics.csv"
        path.write_text(path.read_text().replace("val/loss", "val/output"))
    report = report_of([run])
    assert report.rows[0].val_output is None
    assert any("val_output came out as NaN" in note for note in report.footnotes) == validated


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    (runs[1].folder / "summary.json").unlink()
    assert "Interleave: the run has not finished, its row is incomplete." in report_of(runs).footnotes


def test_different_hardware_is_named(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    other = ReportRun(write_run(tmp_path / "other", hardware={"gpu": "another"}), "Other")
    assert not any("different hardware" in note for note in report_of(runs).footnotes)
    assert any("different hardware" in note for note in report_of([*runs, other]).footnotes)


def test_labels_must_differ(tmp_path: Path) -> None:
    runs = [replace(run, label="same") for run in two_runs(tmp_path)]
    with pytest.raises(ValueError, match="'same' names 2 runs"):
        report_of(runs)


def test_tables_come_back_from_json_alone(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    paths = build_report(tmp_path / "out", runs, REFERENCES, NOTES)
    text = paths.json.read_text()
    again = Report.from_json(text)
    assert again == report_of(runs)
    written = paths.markdown.read_text()
    assert markdown_table(RESULT_COLUMNS, again.rows) in written
    pictures = re.findall(r"^## (.+)\n\n!\[.*\]\((.+)\)\n\n(.+)$", written, flags=re.MULTILINE)
    assert markdown(again, [(name, heading, caption) for heading, name, caption in pictures]) == written
    values = json.loads(text)
    values["rows"][0]["per"] = 99.0
    assert markdown_table(RESULT_COLUMNS, Report.from_json(json.dumps(values)).rows) not in written
    with pytest.raises(ValueError, match="format is 7"):
        Report.from_json(json.dumps(values | {"format": 7}))


def test_files(tmp_path: Path) -> None:
    paths = build_report(tmp_path / "out", two_runs(tmp_path), REFERENCES, NOTES)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {f"{name}.png" for name in paths.plots}
    assert names == {"report.md", "report.json", "report.html"} | plots
    assert {"loss_vs_time.png", "depth_vs_step.png", "similarity.png", "per_vs_seconds.png"} <= plots
    assert all(f"]({name})" in paths.markdown.read_text() for name in plots)
    written = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    build_report(tmp_path / "out", two_runs(tmp_path / "same"), REFERENCES, NOTES)
    changed = [path.name for path, content in written.items() if path.read_bytes() != content]
    assert changed == ["report.json"]  # it names the run folders


def test_the_report_is_plain_about_what_it_is(tmp_path: Path) -> None:
    paths = build_report(tmp_path / "out", two_runs(tmp_path), REFERENCES, NOTES)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(paths.table)
    for text in (
        paths.markdown.read_text(),
        paths.html.read_text().replace("&#x27;", "'"),
        console.export_text(),
    ):
        plain = " ".join(text.split())
        assert "This is a miniature" in plain
        assert "one seed" in plain
        assert "may be noise" in plain
        assert "cannot show the paper's ordering" in plain
    for text in (paths.markdown.read_text(), paths.html.read_text()):
        assert "interstack fit --config interleave_equal --data.root DIR" in text
        assert "full-scale SUPERB" in text
        assert all(value in text for value in (NOTES.commit, NOTES.command, NOTES.hardware, "torch 2.11.0"))


class Page(HTMLParser):
    """Collects what would make a page depend on anything but itself, and unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path) -> None:
    text = build_report(tmp_path / "out", two_runs(tmp_path), REFERENCES, NOTES).html.read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert text.count("<svg ") == 5
    assert "A &lt;small&gt; comparison" in text
    assert len(text) < 1_000_000


def test_a_report_of_nothing_but_references(tmp_path: Path) -> None:
    paths = build_report(tmp_path / "out", [], [ReferenceRow("Teacher", 17.7)], NOTES)
    assert paths.plots == {}
    assert "| Teacher | - | - | - | 17.7 |" in paths.markdown.read_text()
