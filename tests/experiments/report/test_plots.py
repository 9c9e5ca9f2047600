"""Pictures: what is drawn, and what an SVG needs to live inside a page."""

import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from datamodules.errors import InputError
from experiments.records.reading import Series, read_run
from experiments.report import figures
from experiments.report.figures import WIDTH, Picture, log_scale, require_matplotlib, single_axes
from experiments.report.heat_maps import COMPARISONS, layer_weights, similarity
from experiments.report.looks import SYSTEMS, look_of, looks_of
from experiments.report.plots import depth_vs_step, loss_curves, loss_stages, running_mean
from experiments.report.runs import Pair, ReportRun
from experiments.report.theme import DARK, LIGHT, MUTED
from tests.experiments.report.made_up_runs import two_pairs, write_run

pytest.importorskip("matplotlib")


def draw_all(pairs: list[Pair]) -> list[Picture]:
    drawn = [loss_curves(alone(pairs), "time"), depth_vs_step(pairs), similarity(pairs, "cka"), layer_weights(pairs)]
    return [picture for picture in drawn if picture is not None]


def alone(pairs: list[Pair]) -> list[list[Pair]]:
    """Rows of one seed."""
    return [[pair] for pair in pairs]


def many_runs(folder: Path, count: int) -> list[Pair]:
    looks = looks_of([{"name": f"run {i}"} for i in range(count)])
    runs = [read_run(write_run(folder / f"{i}", (3, 6))) for i in range(count)]
    return [(ReportRun(label, look), log) for (label, look), log in zip(looks.items(), runs, strict=True)]


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


def growth_marks(picture: Picture | None) -> list[tuple[str, list[float]]]:
    assert picture is not None
    lines = [line for line in picture.figure.axes[0].lines if line.get_gid() == "growth"]
    return [(str(line.get_color()), np.asarray(line.get_xdata()).tolist()) for line in lines]


def test_growths_are_marked_on_the_axis_in_grey_if_rows_share_them(pairs: list[Pair]) -> None:
    assert growth_marks(loss_curves(alone(pairs), "time")) == [(LIGHT["vermilion"], [25, 50, 75])]
    run, log = pairs[1]
    other = replace(run, label="other", look=look_of({"name": "midas_equal"}))
    assert growth_marks(loss_curves([*alone(pairs), [(other, log)]], "time")) == [(MUTED, [25, 50, 75])]
    faster = replace(log, metrics=log.metrics | {"perf/train_seconds": Series(np.array([40]), np.array([50.0]))})
    apart = growth_marks(loss_curves([*alone(pairs), [(other, faster)]], "time"))
    assert apart == [(LIGHT["vermilion"], [25, 50, 75]), (LIGHT["purple"], [12.5, 25, 37.5])]


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range(tmp_path: Path) -> None:
    run, log = two_pairs(tmp_path)[1]
    logged = log.metrics["train/output"]
    higher = replace(log, metrics=log.metrics | {"train/output": Series(logged.steps, 3 * logged.values)})
    curves = [loss_curves([seeds], "steps") for seeds in ([(run, log)], [(run, log), (run, higher)])]
    figures = [picture.figure.axes[0] for picture in curves if picture is not None]
    one, mean = (np.asarray(axes.lines[0].get_ydata(), float) for axes in figures)
    np.testing.assert_allclose(mean, 2 * one)
    assert [len(axes.collections) for axes in figures] == [0, 1]
    (band,) = figures[1].collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(one.min()), pytest.approx(3 * one.max()))
    assert "band" in str(curves[1] and curves[1].caption)
    assert "band" not in str(curves[0] and curves[0].caption)


def test_a_curve_has_no_gap_at_a_growth(pairs: list[Pair]) -> None:
    picture = loss_curves([[pairs[1]]], "steps")
    assert picture is not None
    (line,) = [line for line in picture.figure.axes[0].lines if line.get_gid() is None]
    steps = np.asarray(line.get_xdata(), float)
    assert np.diff(steps).max() <= 1
    assert np.isfinite(np.asarray(line.get_ydata(), float)).all()


@pytest.mark.parametrize(("scale", "label"), [(1.0, "(s)"), (600.0, "(h)")])
def test_axes_have_units_and_no_loose_exponent(scale: float, label: str, pairs: list[Pair]) -> None:
    run, log = pairs[0]
    clock = log.metrics["perf/train_seconds"]
    log.metrics["perf/train_seconds"] = Series(clock.steps, scale * clock.values)
    costly = replace(run, flops_by_stage=(scale * 1.3e11,))
    for axis, unit in (("time", label), ("flops", "(GFLOP)" if scale == 1 else "(TFLOP)")):
        picture = loss_curves([[(costly, log)]], axis)
        assert picture is not None
        axes = picture.figure.axes[0]
        picture.figure.canvas.draw()
        assert axes.get_xlabel().endswith(unit)
        assert axes.xaxis.get_offset_text().get_text() == ""


def test_every_picture_is_drawn_and_looks_opaque_as_png(pairs: list[Pair]) -> None:
    pictures = draw_all(pairs)
    names = ["loss_vs_time", "depth_vs_step", "similarity_cka", "layer_weights"]
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


@pytest.mark.parametrize(
    ("values", "limits"), [([-0.5, 1.0], (-0.5, 1)), ([0.97, 1.0], (0.97, 1)), ([0.999, 1.0], (0.99, 1))]
)
def test_maps_share_a_scale_that_shows_their_differences(
    values: list[float], limits: tuple[float, float], pairs: list[Pair]
) -> None:
    maps = [[[1.0, value], [value, 1.0]] for value in values]
    shown = [
        (replace(run, similarity={COMPARISONS["cka"]: matrix}), log)
        for (run, log), matrix in zip(pairs, maps, strict=True)
    ]
    picture = similarity(shown, "cka")
    assert picture is not None
    assert [axes.images[0].get_clim() for axes in picture.figure.axes[:2]] == [pytest.approx(limits)] * 2
    picture.figure.canvas.draw()
    bar = picture.figure.axes[-1]
    numbers = [float(tick.get_text()) for tick in bar.get_yticklabels()]
    assert (numbers[0], numbers[-1]) == pytest.approx(limits)
    assert len(set(numbers)) == len(numbers)


def test_without_data_there_is_no_picture(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert draw_all([(ReportRun("empty", look_of({"name": "full"})), read_run(empty))]) == []


LONG = "InterleaveStack, front end trained until the first growth, dropout everywhere"


@pytest.mark.parametrize("width", [80 / 25.4, WIDTH, 170 / 25.4])
def test_names_stand_below_the_plot_whole_and_leave_its_size(width: float, tmp_path: Path) -> None:
    runs = many_runs(tmp_path, 8)
    renamed = [*runs[:-1], (replace(runs[-1][0], label=LONG), runs[-1][1])]
    heights = []
    for shown in (runs[:1], renamed):
        for picture in (loss_curves(alone(shown), "time", width), depth_vs_step(shown, width)):
            assert picture is not None
            picture.figure.draw_without_rendering()
            (legend,) = picture.figure.legends
            names = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
            assert names == [run.label for run, _ in shown]
            axes = picture.figure.axes[0]
            assert legend.get_window_extent().y1 <= axes.xaxis.get_tightbbox().y0
            assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= picture.figure.bbox.x1
            heights.append(axes.bbox.height)
    assert heights[2:] == pytest.approx(heights[:2], rel=0.2)


def test_missing_matplotlib_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'interstack\[report\]'"):
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


# Linear RGB as people without one kind of cones see it (Machado et al., 2009): deuteranopia, protanopia, tritanopia.
SEEN = {
    "d": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "p": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "t": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all": np.eye(3).tolist(),
}


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("seen", SEEN.values(), ids=list(SEEN))
def test_systems_differ_in_colour_for_the_colour_blind(seen: list[list[float]], theme: dict[str, str]) -> None:
    names = {colour for colour, _ in SYSTEMS.values()}
    colours = {name: lab(np.array(seen) @ linear(theme[name])) for name in names}
    distances = [float(np.linalg.norm(colours[a] - colours[b])) for a, b in combinations(names, 2)]
    assert min(distances) > 15
    old = [lab(np.array(SEEN["p"]) @ linear(colour)) for colour in ("#c24e00", "#8a6a00")]
    assert np.linalg.norm(old[0] - old[1]) < 5  # what the measure says of two that look alike without red cones


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear RGB; a distance of 2 is just visible."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(first: str, second: str) -> float:
    """Contrast ratio of the Web Content Accessibility Guidelines 2."""
    low, high = sorted(luminance(colour) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    return float(linear(colour) @ np.array([0.2126, 0.7152, 0.0722]))


def linear(colour: str) -> NDArray[np.float64]:
    """Linear RGB from 0 to 1."""
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


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
