"""How each system looks in pictures: colour, marker and line, from what a row is and not from its place in a report.

The colour names the system: its growth policy, and for Full and GradStack the kind of its intermediate loss.
The fill of the marker names the schedule, and for students of others whether they have a budget of their own, the same
as all rows, or are grown. A row that differs in any other setting has that setting's marker and line,
which are the same under every policy: a frozen front end looks alike in Full and in InterleaveStack.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from experiments.report.theme import LIGHT, PAPER

Row = Mapping[str, Any]  # a row of ``study.json``; only ``name`` must be there

# Beginning of a config's or row's name -> growth policy and intermediate loss; the longest that fits counts.
RECIPES = {
    "full_l2l": ("none", "l2l"),
    "full": ("none", "none"),
    "gradstack_l2l": ("gradual", "l2l"),
    "gradstack": ("gradual", "prediction"),
    "gradual": ("gradual", "l2l"),
    "interleave": ("interleaved", "l2l"),
    **{
        policy: (policy, "l2l")
        for policy in ("midas", "lidas", "stackbert", "one_shot_stack", "one_shot_interleave", "random", "identity")
    },
}
# Beginning of the config's or row's name of a student or objective of others -> colour and marker.
PUBLISHED = {
    "distilhubert": ("wine", "v"),
    "one_3layer": ("wine", "^"),
    "half_12layer": ("petrol", "o"),
    "fithubert": ("green", "s"),
    "maskhubert": ("purple", "o"),
    "armhubert": ("purple", "s"),
    "armhubert_s": ("purple", "v"),
    "dphubert_objective": ("olive", "s"),
    "usad": ("brown", "o"),
}
# What is done with it -> fill and line.
BUDGETS = {"own": ("full", "-"), "equal": ("none", "--"), "grown": ("left", "-.")}
# The method that the paper proposes has the warmest colour, a star and the thickest line.
SYSTEMS = {
    "interleaved": ("vermilion", "*"),
    "none": ("petrol", "s"),
    "none l2l": ("blue", "o"),
    "gradual": ("green", "^"),
    "gradual l2l": ("olive", "v"),
    "midas": ("purple", "D"),
    "lidas": ("wine", ">"),
    "stackbert": ("green", "P"),
    "one_shot_stack": ("olive", "X"),
    "one_shot_interleave": ("brown", "D"),
    "identity": ("brown", "s"),
    "random": ("grey", "X"),
    "untrained": ("grey", "d"),
    "unknown": ("grey", "o"),
}
OWN_LOSS = {"none l2l": "l2l", "none": "none", "gradual l2l": "l2l", "gradual": "prediction"}  # all others: l2l
SCHEDULES = {"prop-1": ("none", "--"), "prop-2": ("left", "-."), "prop-3": ("bottom", ":")}  # fill and line
MARKS = "sD^v<>PXdH"
SPARE_MARK = "p"  # of a variant whose mark is its system's own
LINES: tuple[Any, ...] = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
# Settings -> place in MARKS and LINES; the first whose parts a row has counts. Rows of a shipped study that have one
# colour and fill differ in it. All other settings get a place from their text.
VARIANTS = {
    "match=train_seconds": 0,
    "match=flops": 1,
    "random_growth=True": 2,
    "cache=features": 3,
    "cache=targets": 4,
    "model.student.front_end=shared": 5,
    "model.student.front_end=frozen": 5,
    "model.student.front_end=trained_until_growth": 6,
    "data.crop=fixed": 7,
    "trainer.precision=bf16-mixed": 8,
    "model.student.attention_dropout=0.0": 9,
    "model.student.dropout=0.1": 8,
    "model.objective.weight=0.0": 3,
    "model.objective.weight=0.25": 4,
    "model.objective.weight=0.75": 5,
    "model.objective.weight=1.0": 6,
    "intermediate=prediction": 7,
    "intermediate=none": 8,
    "growth.optimizer_state=reset growth.lr_after_growth=rewarm": 0,
    "growth.optimizer_state=reset": 1,
    "growth.optimizer_state=zero": 2,
    "growth.lr_after_growth=rewarm": 3,
    "growth.offset=first": 4,
    "model.optimizer.schedule=wsd": 5,
    "model.objective.normalize_targets=none": 0,
    "model.objective.normalize_targets=layer": 1,
    "model.objective.normalize_targets=standardize": 2,
    "trainer.max_epochs=3": 0,
    "trainer.max_epochs=6": 1,
    "trainer.max_epochs=24": 2,
}


@dataclass(frozen=True)
class Look:
    """Colour (a light value of the theme), marker, fill of the marker, line style, and whether it stands out."""

    colour: str
    marker: str
    fill: str = "full"
    line: Any = "-"
    ours: bool = False

    def marks(self, size: float = 5.5) -> dict[str, Any]:
        """Matplotlib's options for markers of about ``size`` points."""
        hollow = self.fill == "none"  # drawn in the paper's colour, so that no line shows through it
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": size * (1.7 if self.marker == "*" else 1.0),
            "markeredgewidth": 1.2 if hollow else 0.6,
            "markerfacecolor": PAPER if hollow else self.colour,
            "fillstyle": "full" if hollow else self.fill,
            "markerfacecoloralt": PAPER,
        }

    def lines(self) -> dict[str, Any]:
        """Matplotlib's options for lines."""
        return {
            "color": self.colour,
            "linestyle": self.line,
            "linewidth": 2.2 if self.ours else 1.5,
            "zorder": 3 if self.ours else 2.5,
        }


def look_of(row: Row) -> Look:
    """Find how a row looks, from its configs and overrides, or from its name if it has no config."""
    overrides: Mapping[str, Any] = row.get("overrides") or {}
    name, *more = row.get("configs") or [row["name"]]
    if published := max((begin for begin in PUBLISHED if name.startswith(begin)), key=len, default=""):
        grown = "growth" in overrides or any(config.startswith("interleave") for config in more)
        colour, marker = PUBLISHED[published]
        return Look(LIGHT[colour], marker, *BUDGETS["grown" if grown else "equal" if "equal_budget" in more else "own"])
    system, own_loss = _system(name, overrides)
    colour, marker = SYSTEMS[system]
    named = re.search(r"prop-?\d", name)
    schedule = overrides.get("growth.schedule") or (named[0].replace("-", "").replace("prop", "prop-") if named else "")
    fill, line = SCHEDULES.get(schedule, ("full", "-"))
    look = Look(LIGHT[colour], marker, fill, line, ours=system == "interleaved")
    place = None if system == "untrained" else _variant(row, overrides, own_loss)
    if place is None:
        return look
    mark = MARKS[place % len(MARKS)]
    return replace(look, marker=SPARE_MARK if mark == marker else mark, line=LINES[place % len(LINES)])


def is_untrained(row: Row) -> bool:
    """Whether a row's student stays as it was drawn, at a learning rate of 0."""
    return (row.get("overrides") or {}).get("model.optimizer.lr") == 0


def _system(name: str, overrides: Mapping[str, Any]) -> tuple[str, str]:
    """Find the key in ``SYSTEMS`` and the intermediate loss that differs from the system's own, or an empty string."""
    recipe = max((begin for begin in RECIPES if name.startswith(begin)), key=len, default="")
    policy, loss = RECIPES.get(recipe, ("unknown", "l2l"))
    policy = overrides.get("growth.policy", policy)
    loss = overrides.get("model.objective.intermediate", loss)
    if is_untrained({"overrides": overrides}):
        return "untrained", ""
    system = f"{policy} l2l" if loss == "l2l" and policy in ("none", "gradual") else policy
    system = system if system in SYSTEMS else "unknown"
    return system, "" if loss == OWN_LOSS.get(system, "l2l") else loss


def _variant(row: Row, overrides: Mapping[str, Any], loss: str) -> int | None:
    """Find the place of what else differs in a row; None if nothing does."""
    common = ("growth.policy", "growth.schedule", "growth.stages", "model.objective.intermediate")
    kept = {key: value for key, value in overrides.items() if key not in common}
    if kept.get("model.objective.weight") == 0.5:  # the default
        del kept["model.objective.weight"]
    kept |= {"match": row["match"]["cost"]} if row.get("match") else {}
    kept |= {key: row[key] for key in ("random_growth", "cache") if row.get(key)}
    kept |= {"intermediate": loss} if loss else {}
    parts = {f"{key}={value}" for key, value in kept.items()}
    if not parts:
        return None
    text = " ".join(sorted(parts))
    return next((place for key, place in VARIANTS.items() if parts >= set(key.split())), zlib.crc32(text.encode()))


def looks_of(rows: Sequence[Row]) -> dict[str, Look]:
    """Find the looks of a study's rows by label; no two are the same.

    Of two rows that `look_of` cannot tell apart the later one gets the next free marker. The shipped studies have none.
    """
    found: dict[str, Look] = {}
    for row in rows:
        look = look_of(row)
        others = (
            replace(look, marker=mark, fill=fill)
            for fill, mark in product((look.fill, "full", "none"), MARKS + SPARE_MARK)
        )
        taken = {(each.colour, each.marker, each.fill) for each in found.values()}
        free = (each for each in (look, *others) if (each.colour, each.marker, each.fill) not in taken)
        found[row.get("label") or row["name"]] = next(free, look)
    return found
