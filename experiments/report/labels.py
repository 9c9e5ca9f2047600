"""Place labels so that they do not cover one another: pure geometry in points or pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle from (left, bottom) to (right, top)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Find positions that are at least ``gap`` apart and, in least squares, nearest to ``wanted``, in its order.

    Neighbours that are too close are pooled into a block, centred on their mean, until no two blocks touch.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[int]] = []

    def centre(block: list[int]) -> float:
        return sum(wanted[index] for index in block) / len(block)

    for index in order:
        blocks.append([index])
        while len(blocks) > 1:
            below, above = blocks[-2], blocks[-1]
            if centre(above) - centre(below) >= gap * (len(below) + len(above)) / 2:
                break
            blocks[-2:] = [below + above]
    positions = [0.0] * len(wanted)
    for block in blocks:
        for place, index in enumerate(block):
            positions[index] = centre(block) + gap * (place - (len(block) - 1) / 2)
    return positions


def place_beside(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    distance: float = 9.0,
) -> list[Box]:
    """Place a box of ``sizes`` near each point so that it covers as little else as possible.

    The search is greedy, point by point: right, left, above, below, then the diagonals, at growing distance.
    """
    markers = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        candidates = list(_around(x, y, width, height, distance))
        costs = [_cost(box, [*markers, *placed], area) + 1e-3 * rank for rank, box in enumerate(candidates)]
        placed.append(candidates[costs.index(min(costs))])
    return placed


def _around(x: float, y: float, width: float, height: float, distance: float) -> Iterator[Box]:
    for reach in (distance, 2 * distance, 3.5 * distance):
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            left = x + right * reach - (1 - right) / 2 * width
            bottom = y + up * reach - (1 - up) / 2 * height
            yield Box(left, bottom, left + width, bottom + height)


def _cost(box: Box, taken: Sequence[Box], area: Box) -> float:
    inside = box.overlap(area)
    outside = (box.right - box.left) * (box.top - box.bottom) - inside
    return outside + sum(box.overlap(other) for other in taken)
