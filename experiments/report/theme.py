"""Colours of the report for light and dark themes.

Figures are drawn once, in the light colours. Inside the HTML page each light colour is replaced by a CSS
variable of the same name, so that one figure follows the reader's theme; light values must therefore be
unique. `experiments.report.looks` gives them to systems. They have the hues of Okabe and Ito's palette, which people
with the usual forms of colour blindness can tell apart, darkened or lightened until text in them is legible on the
background.
"""

import re

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#dde2e7",
    "blue": "#0067a8",
    "vermilion": "#c24e00",
    "green": "#007d5a",
    "purple": "#9b3f8f",
    "olive": "#8a6a00",
    "sky": "#2f8fb3",
    "grey": "#767676",
    "crimson": "#b3123f",
    "brown": "#7a4b2a",
}
DARK = {
    "paper": "#0f1318",
    "ink": "#e6e9ed",
    "muted": "#9aa4af",
    "grid": "#2b323a",
    "blue": "#5cb3ee",
    "vermilion": "#ff9257",
    "green": "#35c99f",
    "purple": "#e597d8",
    "olive": "#e3bd45",
    "sky": "#8fdcf7",
    "grey": "#b0b0b0",
    "crimson": "#ff7d9c",
    "brown": "#cf9c78",
}
INK, MUTED, GRID, PAPER = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"], LIGHT["paper"]

# Fills of the first-stage ancestors in ancestry pictures; white text is legible on the first three in both
# themes.
ANCESTORS = ("#0067a8", "#c24e00", "#007d5a", "#9b3f8f", "#8a6a00", "#5b6570")


def css_variables(colours: dict[str, str]) -> str:
    """``--ink: #1f2328; ...`` for a CSS rule."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def follow_theme(svg: str) -> str:
    """Replace every light colour in a drawing by its CSS variable."""
    names = {value: name for name, value in LIGHT.items()}
    return re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", svg)
