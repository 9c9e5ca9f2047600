"""The pictures of a study: which there are, how rows look in them, and their form for a paper."""

import json
import re
from pathlib import Path

import pytest

from experiments.report.command import report as report_command
from experiments.report.plots import depth_vs_step, loss_curves
from experiments.report.speed_quality import ideal_front, speed_quality, summary
from experiments.report.stage_figures import copies_picture
from experiments.report.study import PaperColumns, PaperForm, study_values
from experiments.report.study_plots import stage_runs, study_looks, study_pairs, study_runs
from experiments.report.study_reading import read_study
from experiments.report.theme import LIGHT
from tests.experiments.report.made_up_study import ROWS, write_study
from tests.experiments.report.test_study import results

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the made-up study."""
    return write_study(tmp_path_factory.mktemp("study") / "table1")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study of one row and seed."""
    return write_study(tmp_path_factory.mktemp("small") / "table1", seeds=1, rows=("interleave_equal",))


def test_curves_show_every_seed_of_the_study_and_no_other(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", seeds=3, rows=("full_l2l", "interleave_equal"))
    labels = [[run.label for run, _ in row] for row in study_runs(read_study(folder))]
    assert labels == [[ROWS[name][0]] * 3 for name in ("full_l2l", "interleave_equal")]
    described = json.loads((folder / "study.json").read_text()) | {"seeds": [0, 1]}
    (folder / "study.json").write_text(json.dumps(described))
    assert [len(row) for row in study_runs(read_study(folder))] == [2, 2]


def test_a_row_has_its_colour_in_every_picture_and_whichever_others_ran(study: Path, tmp_path: Path) -> None:
    few = write_study(tmp_path / "few", rows=("interleave_equal", "full_l2l"))
    colours = set()
    for folder in (study, few):
        found = read_study(folder)
        values, looks = study_values(found), study_looks(found)
        pictures = [
            loss_curves(study_runs(found), "steps"),
            depth_vs_step(study_pairs(found)),
            speed_quality(values, "pr/per", looks),
            copies_picture(stage_runs(found), looks),
        ]
        for picture in pictures:
            assert picture is not None
            (legend,) = picture.figure.legends
            names = [text.get_text() for text in legend.get_texts()]
            place = names.index("InterleaveStack, equal")
            colours.add(legend.legend_handles[place].get_color())  # type: ignore[union-attr]
    assert colours == {LIGHT["vermilion"]}


def test_copies_and_depth_use_carry_the_labels_of_rows(study: Path) -> None:
    runs = stage_runs(read_study(study))
    labels = [row["label"] for row in read_study(study).study["rows"]]
    assert [run["name"] for run in runs] == labels
    assert runs[0]["stages"] == results(study, "similarity", next(iter(ROWS)))[0]["runs"][0]["stages"]


def test_the_ideal_front_holds_what_no_other_row_beats() -> None:
    points = [(1.0, 9.0), (1.0, 8.0), (1.3, 8.5), (1.2, 8.7), (1.5, 11.0)]
    assert ideal_front(points, lower_is_better=True) == [(1.0, 8.0), (1.3, 8.5), (1.5, 11.0)]
    assert ideal_front(points, lower_is_better=False) == [(1.5, 11.0)]


def test_published_points_are_ringed_and_stand_beside_ours(study: Path) -> None:
    found = read_study(study)
    values, looks = study_values(found), study_looks(found)
    picture = speed_quality(values, "pr/per", looks)
    assert picture is not None
    assert "published by the paper" in picture.caption
    rings = [line for line in picture.figure.axes[0].lines if line.get_markersize() == 13]
    assert [(float(ring.get_xdata()[0]), float(ring.get_ydata()[0])) for ring in rings] == [(1.24, 9.08)]  # type: ignore[index]
    assert summary(values, looks) is None  # one panel is what the other picture shows
    alone = speed_quality(values | {"references": []}, "pr/per", looks)
    assert alone is not None
    assert "published" not in alone.caption


def test_the_summary_gives_published_values_of_another_measure_their_own_panel(study: Path) -> None:
    found = read_study(study)
    values, looks = study_values(found), study_looks(found)
    other = [{"label": "InterleaveStack", "schedule": "equal", "values": {"asr/wer": 10.22, "speed_up": 1.24}}]
    picture = summary(values | {"references": other}, looks)
    assert picture is not None
    assert [axes.get_title(loc="left") for axes in picture.figure.axes] == ["PR PER, %", "ASR WER, % (published)"]
    assert "The last panel, ASR WER, %, is another measure" in picture.caption


def test_a_long_title_stays_in_its_panel(study: Path) -> None:
    found = read_study(study)
    values = study_values(found)
    values["columns"] += ["pr/per@test-other-of-a-corpus"]
    for row in values["values"].values():
        row["pr/per@test-other-of-a-corpus"] = row["pr/per"]
    picture = summary(values, study_looks(found))
    assert picture is not None
    picture.figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in picture.figure.axes if axes.axison]
    boxes += [axes._left_title.get_window_extent() for axes in picture.figure.axes if axes.axison]  # type: ignore[attr-defined]
    assert max(box.x1 for box in boxes) <= picture.figure.bbox.x1


def test_the_ideal_speed_up_is_that_of_the_flops_and_untrained_rows_have_none(study: Path) -> None:
    found = read_study(study)
    values, looks = study_values(found), study_looks(found)
    values["untrained"] = ["full"]
    picture = speed_quality(values, "pr/per", looks)
    assert picture is not None
    bars = [line for line in picture.figure.axes[0].lines if line.get_marker() == "|"]
    assert {round(float(bar.get_xdata()[0]), 3) for bar in bars} == {1.0, round(1 / 0.9, 3)}  # type: ignore[index]
    assert "Full" not in [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_a_row_with_fewer_seeds_is_not_on_the_ideal_front(study: Path) -> None:
    found = read_study(study)
    values, looks = study_values(found), study_looks(found)

    def front() -> set[float]:
        picture = speed_quality(values, "pr/per", looks)
        assert picture is not None
        (dotted,) = (line for line in picture.figure.axes[0].lines if line.get_linestyle() == ":")
        return {round(float(place), 6) for place in dotted.get_ydata()}  # type: ignore[union-attr]

    values["values"]["full"]["pr/per"] = {"0": 1.0, "1": 1.0, "2": 1.0}
    assert 1.0 in front()
    values["values"]["full"]["pr/per"] = {"0": 1.0, "1": "missing", "2": "missing"}
    assert 1.0 not in front()


@pytest.mark.parametrize(("form", "columns", "millimetres"), [("pdf", 1, 80), ("pdf", 2, 170), ("svg", 1, 80)])
def test_pictures_for_a_paper_have_its_width_and_carry_their_fonts(
    form: PaperForm, columns: PaperColumns, millimetres: int, small: Path, tmp_path: Path
) -> None:
    name = f"depth_vs_step.{form}"
    report_command([str(small)], str(tmp_path), [name], form, columns)
    (path,) = tmp_path.iterdir()
    drawn = path.read_bytes()
    if form == "pdf":
        (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", drawn)
        assert float(box) * 25.4 / 72 == pytest.approx(millimetres)
        assert b"/FontFile2" in drawn
        assert b"/Type3" not in drawn
    else:
        assert re.search(rb'<svg [^>]*width="226\.77', drawn)
        assert b"<text" not in drawn
        assert LIGHT["vermilion"].encode() in drawn


def test_without_a_format_there_are_no_pictures_for_a_paper(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file depth_vs_step.pdf"):
        report_command([str(small)], str(tmp_path), ["depth_vs_step.pdf"])


def test_measured_speed_ups_are_shown_only_if_all_rows_have_one(study: Path) -> None:
    found = read_study(study)
    values, looks = study_values(found), study_looks(found)

    def whiskers_bars_and_label() -> tuple[int, int, str]:
        picture = speed_quality(values, "pr/per", looks)
        assert picture is not None
        axes = picture.figure.axes[0]
        bars = sum(line.get_marker() == "|" for line in axes.lines)
        return sum(bool(each.has_xerr) for each in axes.containers), bars, axes.get_xlabel()

    whiskers, bars, label = whiskers_bars_and_label()
    assert min(whiskers, bars) > 1
    assert label == "speed-up"
    del values["values"]["full"]["speed_up"]
    assert whiskers_bars_and_label() == (0, 0, "ideal speed-up, by FLOPs")  # a bar would look like a whisker
