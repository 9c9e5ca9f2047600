"""Colours of the report for light and dark themes.

Figures are drawn once, in the light colours. Inside the HTML page each light colour is replaced by a CSS
variable of the same name, so that one figure follows the reader's theme; light values must therefore be
unique. `experiments.report.looks` gives the named ones to systems. They were chosen by a search among the hues of Okabe
and Ito's palette for colours that people with the usual forms of colour blindness can tell apart, in lightness where
not in hue, at a contrast to the background of at least 3.5.
"""

import re

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#dde2e7",
    "blue": "#1a4fd6",
    "vermilion": "#d45500",
    "green": "#0b9468",
    "purple": "#b044b0",
    "olive": "#453306",
    "petrol": "#0a3a55",
    "grey": "#616161",
    "wine": "#5a0a2c",
    "brown": "#88592e",
    "ancestor-0": "#0067a8",
    "ancestor-1": "#c24e00",
    "ancestor-2": "#007d5a",
    "ancestor-3": "#9b3f8f",
    "ancestor-4": "#8a6a00",
    "ancestor-5": "#5b6570",
}
DARK = {
    "paper": "#0f1318",
    "ink": "#e6e9ed",
    "muted": "#9aa4af",
    "grid": "#2b323a",
    "blue": "#56a0d0",
    "vermilion": "#ff8a45",
    "green": "#38f5aa",
    "purple": "#e83cff",
    "olive": "#ffe711",
    "petrol": "#ccf8ff",
    "grey": "#b0b0b0",
    "wine": "#fc3a85",
    "brown": "#bb784c",
    "ancestor-0": "#5cb3ee",
    "ancestor-1": "#ff9257",
    "ancestor-2": "#35c99f",
    "ancestor-3": "#e597d8",
    "ancestor-4": "#e3bd45",
    "ancestor-5": "#aab4bf",
}
INK, MUTED, GRID, PAPER = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"], LIGHT["paper"]

# Fills of the first-stage ancestors in ancestry pictures; white text is legible on the first three in both
# themes.
ANCESTORS = tuple(value for name, value in LIGHT.items() if name.startswith("ancestor"))


def css_variables(colours: dict[str, str]) -> str:
    """``--ink: #1f2328; ...`` for a CSS rule."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def follow_theme(svg: str) -> str:
    """Replace every light colour in a drawing by its CSS variable."""
    names = {value: name for name, value in LIGHT.items()}
    return re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", svg)
