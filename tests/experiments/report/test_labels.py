"""Labels must not cover one another."""

from itertools import combinations, pairwise

import pytest

from experiments.report.labels import Box, place_beside, spread


def test_spread_leaves_what_is_far_apart() -> None:
    assert spread([5.0, 1.0, 9.0], gap=2) == [5.0, 1.0, 9.0]


def test_spread_separates_ties_around_their_mean() -> None:
    places = spread([1.0, 1.0, 1.0, 9.0], gap=2)
    assert sorted(places) == pytest.approx([-1, 1, 3, 9])


def test_spread_keeps_order_and_gap_when_blocks_meet() -> None:
    wanted = [0.0, 0.1, 2.0, 2.1, 2.2, 7.0]
    places = spread(wanted, gap=1)
    assert all(high - low >= 1 - 1e-9 for low, high in pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted))
    assert spread([], gap=1) == []


def test_labels_beside_crowded_points_cover_neither_points_nor_labels() -> None:
    points = [(50.0, 50.0), (50.0, 56.0), (55.0, 44.0), (150.0, 50.0)]
    area = Box(0, 0, 200, 120)
    boxes = place_beside(points, [(60.0, 10.0)] * 4, area)
    assert all(first.overlap(second) == 0 for first, second in combinations(boxes, 2))
    assert all(not (box.left < x < box.right and box.bottom < y < box.top) for box in boxes for x, y in points)
    assert all(box.overlap(area) == pytest.approx(600) for box in boxes)
    right_only = [Box(x + 9, y - 5, x + 69, y + 5) for x, y in points]
    assert any(first.overlap(second) for first, second in combinations(right_only, 2))
