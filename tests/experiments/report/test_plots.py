"""Pictures: what is drawn, and what an SVG needs to live inside a page."""

import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.records.reading import read_run
from experiments.report.figures import Picture, log_scale, require_matplotlib, single_axes
from experiments.report.heat_maps import layer_weights, similarity
from experiments.report.plots import depth_vs_step, loss_curves, loss_stages, running_mean
from experiments.report.runs import Pair, ReportRun
from experiments.report.theme import DARK, LIGHT, SERIES
from tests.experiments.report.made_up_runs import two_pairs, write_run

pytest.importorskip("matplotlib")


def draw_all(pairs: list[Pair]) -> list[Picture]:
    drawn = [loss_curves(pairs, "time"), depth_vs_step(pairs), similarity(pairs), layer_weights(pairs)]
    return [picture for picture in drawn if picture is not None]


def many_runs(folder: Path, count: int) -> list[Pair]:
    return [(ReportRun(f"run {i}"), read_run(write_run(folder / f"{i}", (3, 6)))) for i in range(count)]


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return two_pairs(tmp_path)


def test_running_mean_keeps_length_and_follows_a_line() -> None:
    np.testing.assert_allclose(running_mean(np.array([0.0, 1, 2, 3, 4]), 1), [0.5, 1, 2, 3, 3.5])
    np.testing.assert_allclose(running_mean(np.array([7.0]), 5), [7])


def test_stages_of_the_loss_start_at_their_growth_and_do_not_mix(pairs: list[Pair]) -> None:
    stages = loss_stages(pairs[1][1])
    assert [seconds[0] for seconds, _ in stages] == [5, 25, 50, 75]
    assert [seconds[-1] for seconds, _ in stages] == [25, 50, 75, 100]
    assert stages[0][1].min() > stages[1][1].max()
    assert len(loss_stages(pairs[0][1])) == 1


def test_nan_losses_are_left_out_of_the_curve(pairs: list[Pair]) -> None:
    log = pairs[0][1]
    log.metrics["train/output"].values[3:] = np.nan
    (seconds, loss) = loss_stages(log)[0]
    assert np.isfinite(loss).all()
    assert seconds[-1] == 15


def test_growth_is_marked_on_the_curve_that_grows(pairs: list[Pair]) -> None:
    picture = loss_curves(pairs, "time")
    assert picture is not None
    ticks = [line for line in picture.figure.axes[0].lines if line.get_marker() == "|"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in ticks] == [25, 50, 75]
    assert {line.get_color() for line in ticks} == {SERIES[1]}


def test_every_picture_is_drawn_and_looks_opaque_as_png(pairs: list[Pair]) -> None:
    pictures = draw_all(pairs)
    names = ["loss_vs_time", "depth_vs_step", "similarity", "layer_weights"]
    assert [picture.name for picture in pictures] == names
    assert all(picture.png().startswith(b"\x89PNG") for picture in pictures)


def test_svg_follows_the_theme_and_shares_no_id(pairs: list[Pair]) -> None:
    svgs = [picture.svg() for picture in draw_all(pairs)]
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert not any(colour in svg for colour in LIGHT.values())
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", svg)) <= set(LIGHT)
        assert "var(--ink)" in svg or "var(--muted)" in svg
        references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert references <= set(re.findall(r'\bid="([^"]+)"', svg))
    ids = [name for svg in svgs for name in set(re.findall(r'\bid="([^"]+)"', svg))]
    assert len(ids) == len(set(ids))


def test_svg_is_the_same_every_time(pairs: list[Pair]) -> None:
    first, second = (draw_all(pairs) for _ in range(2))
    assert [picture.svg() for picture in first] == [picture.svg() for picture in second]


def test_a_negative_similarity_is_not_cut_off(pairs: list[Pair]) -> None:
    run, log = pairs[1]
    negative = replace(run, similarity={"cosine": [[1.0, -0.5], [-0.5, 1.0]]})
    (picture,) = [one for one in draw_all([(negative, log)]) if one.name == "similarity"]
    assert picture.figure.axes[0].images[0].get_clim() == (-0.5, 1)


def test_without_data_there_is_no_picture(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert draw_all([(ReportRun("empty"), read_run(empty))]) == []


def test_ten_runs_stay_apart(tmp_path: Path) -> None:
    picture = loss_curves(many_runs(tmp_path, 10), "time")
    assert picture is not None
    looks = {
        (line.get_color(), line.get_linestyle()) for line in picture.figure.axes[0].lines if line.get_marker() == "None"
    }
    assert len(looks) == 10


@pytest.mark.parametrize(("count", "below"), [(6, 0), (8, 1)])
def test_many_names_stand_below_the_plot_and_few_beside_it(tmp_path: Path, count: int, below: int) -> None:
    runs = many_runs(tmp_path, count)
    for picture in (loss_curves(runs, "time"), depth_vs_step(runs)):
        assert picture is not None
        picture.figure.draw_without_rendering()
        assert len(picture.figure.legends) == below
        axes = picture.figure.axes[0]
        assert len(axes.texts) == (0 if below else count)
        if below:
            (legend,) = picture.figure.legends
            assert [text.get_text() for text in legend.get_texts()] == [run.label for run, _ in runs]
            assert legend.get_window_extent().y1 <= axes.xaxis.get_tightbbox().y0
            assert legend.get_window_extent().x1 <= picture.figure.bbox.x1


def test_missing_matplotlib_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'interstack\[report\]'"):
        require_matplotlib()


def test_themes_name_the_same_colours_and_light_values_are_unique() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_colours_have_enough_contrast(theme: dict[str, str]) -> None:
    texts = [name for name in theme if name not in ("paper", "grid")]
    assert min(contrast(theme[name], theme["paper"]) for name in texts) >= 3.5
    assert contrast(theme["muted"], theme["paper"]) >= 4.5
    assert contrast(theme["grid"], theme["paper"]) < 3.5


def contrast(first: str, second: str) -> float:
    """Contrast ratio of the Web Content Accessibility Guidelines 2."""
    low, high = sorted(luminance(colour) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("low", "high"), [(1.8, 1.8), (1.8, 1.81), (1.0, 2.4), (0.3, 1.7), (0.3, 5.0), (0.2, 900.0)])
def test_ticks_of_a_loss_do_not_lie_on_each_other(low: float, high: float) -> None:
    figure, axes = single_axes(3.0)
    axes.plot([1, 2], [low, high])
    log_scale(axes, np.array([low, high]))
    figure.canvas.draw()
    shown = [tick.get_window_extent() for tick in axes.get_yticklabels() if tick.get_text()]
    inside = sorted((box.y0, box.y1) for box in shown if axes.bbox.y0 <= (box.y0 + box.y1) / 2 <= axes.bbox.y1)
    assert len(inside) >= 2
    assert all(upper[0] > lower[1] for lower, upper in pairwise(inside))
