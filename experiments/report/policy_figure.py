"""Draw the growth policies, stage by stage, as one SVG file for the README.

    python -m experiments.report.policy_figure docs/policies.svg

Every policy is a panel, every stage a column, every layer a box, layer 1 at the bottom. Colour and number show
the layer of the first stage that a layer descends from. A dot marks a layer that was new at that growth;
a box without a number is a fresh layer. The plans come from `lightning_modules.growth.policies`, so the picture always
agrees with the code.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from datamodules.files import write_text
from experiments.report.theme import ANCESTORS, INK, MUTED, PAPER
from lightning_modules.growth.policies import compose_ancestry, default_stages, kept_positions, make_plan

PANELS = {
    "interleaved": "copy beside original",
    "gradual": "last layers, on top",
    "midas": "middle block, in place",
    "lidas": "middle layers, in place",
    "stackbert": "all layers, on top",
    "identity": "copies start as zero",
    "random": "fresh layers, on top",
    "one_shot_stack": "one growth",
    "one_shot_interleave": "one growth",
}
LEGEND = (
    "Colour and number:",
    "the layer of the first",
    "stage it comes from.",
    "Columns are stages, the",
    "depth below them; layer 1",
    "is at the bottom.",
)
FONTS = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"
COLUMNS = 5
BOX_WIDTH, BOX_HEIGHT, GAP = 26, 15, 3
PANEL_WIDTH, ABOVE, BELOW = 160, 38, 36
MARGIN = 20


@dataclass(frozen=True)
class Stage:
    """Layers of one stage, layer 1 first: first-stage ancestor (None = fresh), and whether the layer is new."""

    ancestry: tuple[int | None, ...]
    new: tuple[bool, ...]


def policy_stages(policy: str) -> list[Stage]:
    """Compute the stages of ``policy`` at its default depths.

    Raises:
        InputError: the policy is unknown.
    """
    depths = default_stages(policy)
    found = [Stage(tuple(range(depths[0])), (False,) * depths[0])]
    for depth, target in pairwise(depths):
        plan = make_plan(policy, depth, target)
        kept = set(kept_positions(plan, depth))
        ancestry = compose_ancestry(found[-1].ancestry, plan)
        found.append(Stage(tuple(ancestry), tuple(place not in kept for place in range(target))))
    return found


@dataclass(frozen=True)
class Panel:
    """One growth policy: its name, a short note, and its stages."""

    name: str
    note: str
    stages: list[Stage]


def draw_policies() -> str:
    """Draw all policies at their default depths."""
    return draw_panels([Panel(policy, note, policy_stages(policy)) for policy, note in PANELS.items()])


def draw_panels(given: Sequence[Panel], columns: int = COLUMNS, explanation: Sequence[str] = LEGEND) -> str:
    """Draw the panels as SVG text, with ``explanation`` below the legend; the opaque background suits any page."""
    rows = -(-(len(given) + 1) // columns)  # one place for the legend
    deepest = max(len(stage.ancestry) for panel in given for stage in panel.stages)
    step = max(ABOVE + deepest * (BOX_HEIGHT + GAP) + BELOW, 128 + 16 * len(explanation))
    width, height = columns * PANEL_WIDTH + MARGIN, rows * step + MARGIN
    panels = "".join(
        _panel(panel, MARGIN + place % columns * PANEL_WIDTH, MARGIN + place // columns * step, step - BELOW)
        for place, panel in enumerate(given)
    )
    spare = rows * columns - len(given)
    legend = _legend(width - spare * PANEL_WIDTH, MARGIN + (rows - 1) * step, explanation)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="{FONTS}">\n'
        "<title>Growth policies, stage by stage</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n{panels}{legend}</svg>\n'
    )


def _panel(panel: Panel, x: float, y: float, height: float) -> str:
    stages = panel.stages
    base = y + height
    parts = [_text(x, y + 14, panel.name, INK, 13, "600"), _text(x, y + 29, panel.note, MUTED, 11)]
    for column, stage in enumerate(stages):
        left = x + column * (BOX_WIDTH + 8)
        parts += [
            _layer(left, base - (layer + 1) * (BOX_HEIGHT + GAP), stage.ancestry[layer], stage.new[layer])
            for layer in range(len(stage.ancestry))
        ]
        parts.append(_text(left + BOX_WIDTH / 2, base + 14, str(len(stage.ancestry)), MUTED, 11, anchor="middle"))
    return "".join(parts)


def _layer(x: float, y: float, ancestor: int | None, new: bool) -> str:
    frame = f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="2.5" '
    dot = f'<circle cx="{x + BOX_WIDTH - 8:g}" cy="{y + BOX_HEIGHT / 2:g}" r="2.6" '
    if ancestor is None:
        box = f'{frame}fill="{PAPER}" stroke="{MUTED}" stroke-dasharray="3 2"/>\n'
        return box + (f'{dot}fill="{MUTED}"/>\n' if new else "")
    box = f'{frame}fill="{ANCESTORS[ancestor % len(ANCESTORS)]}"/>\n'
    number = _text(x + (9 if new else BOX_WIDTH / 2), y + 11.5, str(ancestor + 1), PAPER, 11, anchor="middle")
    return box + number + (f'{dot}fill="{PAPER}"/>\n' if new else "")


def _legend(x: float, y: float, explanation: Sequence[str]) -> str:
    lines = [
        (_layer(x, y + 50, 0, False), "kept layer"),
        (_layer(x, y + 76, 0, True), "new copy"),
        (_layer(x, y + 102, None, True), "new fresh layer"),
    ]
    parts = [
        box + _text(x + BOX_WIDTH + 8, y + 62 + 26 * place, text, INK, 11) for place, (box, text) in enumerate(lines)
    ]
    parts += [_text(x, y + 146 + 16 * place, line, MUTED, 11) for place, line in enumerate(explanation)]
    return "".join(parts)


def _text(x: float, y: float, text: str, fill: str, size: int, weight: str = "400", anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>\n'
    )


def main(arguments: Sequence[str]) -> None:
    """Write the picture to the one path given."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m experiments.report.policy_figure OUTPUT.svg")
    write_text(Path(arguments[0]), draw_policies())


if __name__ == "__main__":
    main(sys.argv[1:])
