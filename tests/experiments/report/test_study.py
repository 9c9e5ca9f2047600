"""The report of a study: numbers recomputed from the result files, gaps, few seeds, all its forms."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report.command import report as report_command
from experiments.report.study import build_report, study_texts, study_values
from experiments.report.study_reading import FAILED, MISSING, cell_values, read_study
from experiments.report.study_tables import column, difference_grid, paired_difference, result_grid
from tests.experiments.report.made_up_runs import write_run
from tests.experiments.report.made_up_study import ROWS, write_job, write_study

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the made-up study, with its report."""
    folder = write_study(tmp_path_factory.mktemp("study") / "table1")
    build_report(read_study(folder))
    return folder


def results(folder: Path, kind: str, row: str) -> list[dict[str, Any]]:
    """Results of the jobs of a row, in the order of seeds, read without the code under test."""
    paths = sorted((folder / "jobs").glob(f"{kind}-{row}-?/result.json"))
    return [json.loads(path.read_text()) for path in paths]


def markdown_row(folder: Path, label: str, heading: str = "## Results") -> list[str]:
    section = (folder / "report.md").read_text().split(heading)[1].split("\n## ")[0]
    (line,) = (line for line in section.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip().strip("*") for cell in line.split("|")[2:-1]]


@pytest.mark.ci
@pytest.mark.parametrize("row", ["full", "interleave_prop1"])
def test_cells_are_means_and_spreads_of_the_result_files(study: Path, row: str) -> None:
    pers = [result["metrics"]["per"] for result in results(study, "evaluate", row)]
    seconds = [result["train_seconds"] for result in results(study, "distil", row)]
    baseline = [result["train_seconds"] for result in results(study, "distil", "full_l2l")]
    speed_ups = np.array(baseline) / np.array(seconds)
    cells = markdown_row(study, ROWS[row][0])
    assert cells[0] == f"{np.mean(pers):.2f} \u00b1 {np.std(pers, ddof=1):.2f}"
    assert cells[2].split()[0] == f"{np.mean(seconds):,.0f}"
    assert cells[3] == f"{speed_ups.mean():.2f} \u00b1 {speed_ups.std(ddof=1):.2f}"


def test_a_spread_has_the_decimals_and_the_unit_of_its_mean() -> None:
    values = {
        "val_output": {"0": 0.5661, "1": 0.5662, "2": 0.5663},
        "peak_memory_bytes": {"0": 1.4e9, "1": 1.5e9, "2": 1.6e9},
        "parameters": {"0": 25e6, "1": 26e6, "2": 27e6},
    }
    report = {"columns": list(values), "values": {"a": values}, "rows": [{"name": "a", "label": "A"}]}
    grid = result_grid(report | {"measured_references": [], "references": []})
    shown = [cell.text for cell in grid.rows[0][1:]]
    assert shown == ["0.566 \u00b1 0.000", "1.50 \u00b1 0.10", "26.00M \u00b1 1.00M"]


def test_texts_come_back_from_json_alone(study: Path, tmp_path: Path) -> None:
    values = json.loads((study / "report.json").read_text())
    again = study_texts(values)
    assert (study / "report.md").read_text().startswith(again["md"])
    assert (study / "report.tex").read_text() == again["tex"]
    assert (study / "report.csv").read_text() == again["csv"]
    values["values"]["full"]["pr/per"]["0"] = 99.0
    assert study_texts(values)["md"] != again["md"]
    with pytest.raises(ValueError, match="format is 7"):
        study_texts(values | {"format": 7})


def test_failures_and_gaps_are_shown(study: Path) -> None:
    text = (study / "report.md").read_text()
    assert "MIDAS, equal, seed 2: distil failed, see jobs/distil-midas_equal-2/log.txt" in text
    assert markdown_row(study, "MIDAS, equal")[0].endswith("(2 of 3)")
    assert markdown_row(study, "MIDAS, prop-1")[0].endswith("(2 of 3)")
    assert not markdown_row(study, "MIDAS, prop-1")[2].endswith("(2 of 3)")
    states = {row["seed"]: row["status"] for row in csv_rows(study) if row["row"] == "midas_equal" and is_per(row)}
    assert states == {"0": "done", "1": "done", "2": "failed"}


def csv_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))


def is_per(row: dict[str, str]) -> bool:
    return row["column"] == "pr/per"


def test_the_best_is_bold_and_a_published_row_never(study: Path) -> None:
    grid = result_grid(json.loads((study / "report.json").read_text()))
    bold = [row[0].text for row in grid.rows if row[1].bold]
    assert bold == ["Full"]  # though the teacher and the published rows have lower error rates
    assert [row[0].text for row in grid.rows[-3:]] == [
        "Teacher",
        "InterleaveStack, equal (published)",
        "HuBERT Base (published)",
    ]
    assert re.search(r"Full & \\textbf\{[\d.]+ \$\\pm\$ [\d.]+\} &", (study / "report.tex").read_text())


def test_headings_read_well_in_every_form(study: Path) -> None:
    assert "| System | PR PER, % | Dev output loss | Training, s | Speed-up |" in (study / "report.md").read_text()
    assert r"System & PR PER, \% & Dev output loss & Training, s &" in (study / "report.tex").read_text()
    assert "<th scope='col' class=number>PR PER,\u00a0%</th>" in (study / "report.html").read_text()
    assert "teacher,Teacher,reference,pr/per" in (study / "report.csv").read_text()
    titles = [column(key).title for key in ("pr_probe/per", "sf/slot_value_cer_legacy", "sid/accuracy", "ks/x")]
    assert titles == ["PR probe PER, %", "SF CER, % (legacy)", "SID accuracy, %", "KS x"]
    assert [column(key).better for key in ("pr/per_fixed", "sf/slot_type_f1", "flops")] == ["low", "high", "low"]


def test_differences_are_paired_by_seed() -> None:
    baseline = {"0": 10.0, "1": 20.0, "2": 30.0}
    found = paired_difference({"0": 11.0, "1": 22.0, "2": 33.0}, baseline)
    assert (found.seeds, found.mean) == (3, pytest.approx(2.0))
    reach = 4.3027 / math.sqrt(3)  # 97.5 % of Student's t with two degrees of freedom; the deviation is 1
    assert (found.low, found.high) == (pytest.approx(2 - reach, abs=1e-3), pytest.approx(2 + reach, abs=1e-3))
    assert paired_difference({"0": 11.0, "1": "failed", "2": 33.0}, baseline).low is None
    assert paired_difference({"5": 1.0}, baseline).mean is None


def test_a_difference_is_bold_where_its_interval_excludes_zero() -> None:
    changes = {"base": (0, 0, 0, 0), "higher": (1, 2, 1, 2), "even": (1, -1, 1, -1), "wide": (1, 9, 1, 9)}
    values = {name: {"pr/per": {str(s): 10.0 + by for s, by in enumerate(change)}} for name, change in changes.items()}
    rows = [{"name": name, "label": name} for name in values]
    grid = difference_grid({"values": values, "baseline": "base", "rows": rows, "columns": ["pr/per"]})
    assert grid is not None
    assert [row[1].bold for row in grid.rows] == [True, False, False]
    assert "[+" in grid.rows[0][1].text


def test_an_interval_of_three_seeds_excludes_zero_by_chance_in_one_of_twenty_cells() -> None:
    drawn = np.random.default_rng(0).normal(size=(2000, 3))
    zero = dict.fromkeys("012", 0.0)
    found = [paired_difference(dict(zip("012", row, strict=True)), zero) for row in drawn.tolist()]
    share = np.mean([each.low > 0 or each.high < 0 for each in found if each.low is not None and each.high is not None])
    assert share == pytest.approx(0.05, abs=0.015)  # three standard errors


def test_with_fewer_than_three_seeds_nothing_can_be_concluded(study: Path, tmp_path: Path) -> None:
    two = study_values(read_study(write_study(tmp_path / "two", seeds=2, rows=("full_l2l", "interleave_equal"))))
    text = study_texts(two)["md"]
    assert "There are 2 seeds per row: nothing can be concluded" in text
    grid = difference_grid(two)
    assert grid is not None
    assert not any("concluded" in cell.text or "[" in cell.text or cell.bold for cell in grid.rows[0][1:])
    assert text.split("## Differences")[1].count("nothing can be concluded") == 1
    assert "In brackets" not in text
    assert "seeds per row" not in (whole := (study / "report.md").read_text())
    assert "In brackets" in whole
    assert whole.count("nothing can be concluded") == 2  # of the row that misses a seed: at the head and of differences
    one = study_values(read_study(write_study(tmp_path / "one", seeds=1, rows=("full_l2l", "interleave_equal"))))
    assert "There is 1 seed per row" in study_texts(one)["md"]
    assert "\u00b1" not in study_texts(one)["tex"]
    planned = write_study(tmp_path / "planned", seeds=3, rows=("full_l2l", "interleave_equal"))
    for result in planned.glob("jobs/*/result.json"):
        if json.loads(result.read_text()).get("seed") != 0:
            result.unlink()
            (result.parent / "job.json").unlink()
    assert "There is 1 seed per row" in study_texts(study_values(read_study(planned)))["md"]


def test_jobs_of_an_older_plan_do_not_count(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    study = json.loads((folder / "study.json").read_text())
    jobs = [path.name for path in (folder / "jobs").iterdir()]
    kept = [name for name in jobs if name != "evaluate-interleave_equal-0"]
    (folder / "study.json").write_text(json.dumps(study | {"jobs": kept}))
    assert study_values(read_study(folder))["values"]["interleave_equal"]["pr/per"] == {"0": "missing"}


def test_without_the_baselines_run_there_is_no_speed_up(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=2, rows=("full_l2l", "interleave_equal"))
    (folder / "jobs" / "distil-full_l2l-1" / "result.json").unlink()
    speeds = study_values(read_study(folder))["values"]["interleave_equal"]["speed_up"]
    assert isinstance(speeds["0"], float)
    assert speeds["1"] == "missing"


def change_result(folder: Path, row: str, **values: object) -> None:
    path = folder / "jobs" / f"distil-{row}-0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def seconds_of(values: dict[str, Any]) -> tuple[int, list[bool]]:
    """The number of best training seconds, and for each row but the baseline whether its difference is missing."""
    results, differences = result_grid(values), difference_grid(values)
    assert differences is not None
    place = {grid: grid.titles.index("Training, s") for grid in (results, differences)}
    return (
        sum(row[place[results]].bold for row in results.rows),
        [row[place[differences]].missing for row in differences.rows],
    )


@pytest.mark.parametrize("key", ["hardware", "commit"])
def test_other_hardware_or_code_is_named_and_has_no_speed_up(key: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    for name in ("full_l2l", "interleave_equal"):
        change_result(folder, name, **{key: "A"})
    values = study_values(read_study(folder))
    assert isinstance(values["values"]["interleave_equal"]["speed_up"]["0"], float)
    assert not any("differ in" in line for line in values["caveats"])
    assert seconds_of(values) == (1, [False])
    change_result(folder, "interleave_equal", **{key: "B"})
    values = study_values(read_study(folder))
    assert seconds_of(values) == (0, [True])
    assert any(
        f"differ in {key} (A; B): seconds do not compare, and no difference or speed-up" in line
        for line in values["caveats"]
    )
    assert values["values"]["interleave_equal"]["speed_up"] == {"0": "missing"}
    assert values["values"]["full_l2l"]["speed_up"] == {"0": 1.0}
    assert isinstance(values["values"]["interleave_equal"]["flops_ratio"]["0"], float)


def test_students_side_by_side_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    assert not any("side by side" in line for line in study_values(read_study(folder))["caveats"])
    path = folder / "jobs" / "distil-full_l2l-0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"students": 3}))
    assert any("side by side (3 on a device" in line for line in study_values(read_study(folder))["caveats"])


def test_resumed_runs_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    change_result(folder, "full_l2l", attempts=1)
    assert not any("Resumed" in line for line in study_values(read_study(folder))["caveats"])
    change_result(folder, "interleave_equal", attempts=3)
    values = study_values(read_study(folder))
    assert any("Resumed runs (interleave_equal, seed 0: 3 attempts)" in line for line in values["caveats"])


def test_the_page_stands_alone(study: Path) -> None:
    text = (study / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "Main table &lt;made up&gt;" in text
    assert text.count("<svg ") == 12
    names = {path.stem for path in study.glob("*.png")} | {path.stem for path in study.glob("*.svg")}
    assert names == {
        *("loss_vs_steps", "loss_vs_time", "loss_vs_flops", "depth_vs_step", "speed_quality_pr_per", "ancestry"),
        *("similarity_cka", "similarity_cosine", "similarity_cka_teacher", "layer_weights_pr"),
        *("copies", "depth_use"),
    }
    assert all(f"]({name}." in (study / "report.md").read_text() for name in names)


def test_a_study_without_any_result_has_a_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=3, rows=("full_l2l", "interleave_equal"))
    for path in (folder / "jobs").glob("*/result.json"):
        path.unlink()
    files = build_report(read_study(folder)).files
    forms = {f"report.{form}" for form in ("md", "tex", "csv", "json", "html")}
    assert set(files) == forms | {"results.json"}
    assert "jobs have not been done" in files["report.md"].read_text()


def test_a_null_is_a_failure_and_what_is_not_there_is_missing(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=3, rows=("full_l2l",))
    for seed, change in enumerate(({}, {"val_output": None})):
        path = folder / "jobs" / f"distil-full_l2l-{seed}" / "result.json"
        result = json.loads(path.read_text())
        del result["val_output"]
        path.write_text(json.dumps(result | change))
    path = folder / "jobs" / "evaluate-full_l2l-0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"per": None}}))
    values = cell_values(read_study(folder), ["full_l2l"], ["val_output", "pr/per"])["full_l2l"]
    assert [values["val_output"]["0"], values["val_output"]["1"], values["pr/per"]["0"]] == [MISSING, FAILED, FAILED]
    assert isinstance(values["val_output"]["2"], float)


@pytest.mark.parametrize("status", ["planned", "failed"])
def test_a_teacher_without_one_of_its_evaluations_keeps_the_others(status: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full_l2l", "interleave_equal"))
    described = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(described | {"columns": ["pr/per", "asr/wer"]}))
    write_job(folder, "evaluate-teacher-asr", "evaluate", "teacher", 0, status=status, task="asr")
    (teacher,) = study_values(read_study(folder))["measured_references"]
    assert teacher["values"] == {"pr/per": 12.5}
    write_job(folder, "evaluate-teacher-asr-1", "evaluate", "teacher", 1, {"metrics": {"wer": 7.0}}, task="asr")
    (teacher,) = study_values(read_study(folder))["measured_references"]
    assert teacher["values"] == {"pr/per": 12.5, "asr/wer": 7.0}


def test_columns_that_nobody_named_compare_between_objectives(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=1, rows=("full", "full_l2l"))
    described = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(described | {"columns": []}))
    text = study_texts(study_values(read_study(folder)))["md"]
    assert "| System | PR PER, % | Dev output loss | Training, s |" in text
    assert "| Memory, GB |" in text
    assert "| **1.50** |" in text  # both rows hold as much
    assert "Train loss" not in text
    (folder / "study.json").write_text(json.dumps(described | {"columns": ["final_loss"]}))
    text = study_texts(study_values(read_study(folder)))["md"]
    assert "Train loss has the terms that a row is trained on" in text
    assert "Memory" not in text


def test_a_row_of_equal_cost_says_how_near_it_came(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=2, rows=("full", "full_l2l", "interleave_equal"))
    described = json.loads((folder / "study.json").read_text())
    described["rows"][0]["match"] = {"cost": "flops", "target": "interleave_equal", "reference": "full_l2l"}
    (folder / "study.json").write_text(json.dumps(described))
    for seed, flops in ((0, 0.9e15), (1, 1.08e15)):
        path = folder / "jobs" / f"distil-full-{seed}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"flops": flops}))
    line = "Full: took 110 % of the FLOPs of InterleaveStack, equal."  # 100 % and 120 %
    assert study_values(read_study(folder))["matched"] == [line]
    assert f"- {line}" in study_texts(study_values(read_study(folder)))["md"]
    described["rows"][0]["match"]["cost"] = "train_seconds"
    (folder / "study.json").write_text(json.dumps(described))
    assert len(study_values(read_study(folder))["matched"]) == 1
    for seed, other in ((0, {"commit": "another"}), (1, {"students": 3})):
        path = folder / "jobs" / f"distil-full-{seed}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
    assert study_values(read_study(folder))["matched"] == []  # these seconds do not compare
    described["rows"][0]["match"]["cost"] = "flops"
    (folder / "study.json").write_text(json.dumps(described))
    for seed in (0, 1):
        (folder / "jobs" / f"distil-full-{seed}" / "result.json").unlink()
    assert study_values(read_study(folder))["matched"] == []


@pytest.mark.ci
def test_the_command_makes_a_studys_report_again(study: Path, tmp_path: Path) -> None:
    before = (study / "report.json").read_bytes()
    report_command([str(study)])
    assert (study / "report.json").read_bytes() == before
    with pytest.raises(ValueError, match="no study, but others are"):
        report_command([str(study), str(write_run(tmp_path / "run"))])


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
