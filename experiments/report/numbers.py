"""Numbers as tables show them."""

from collections.abc import Callable, Sequence

DASH = "-"
PREFIXES = tuple((1000.0**place, prefix) for place, prefix in enumerate(("", "k", "M", "G", "T", "P", "E", "Z")))
"""Size and SI prefix, smallest first."""


def show_count(number: int) -> str:
    """Format a number of parameters: ``2.62M``, ``412k``."""
    if number >= 999_500:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.0f}k" if number >= 1000 else str(number)


def show_seconds(seconds: float) -> str:
    """Format seconds with one decimal below a hundred and none above: ``14.2``, ``1,204``."""
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:,.0f}"


def show_loss(loss: float) -> str:
    """Format a loss with three significant digits, without an exponent in the usual range: ``0.0413``, ``1.27``."""
    return f"{loss:#.3g}" if 1e-3 <= abs(loss) < 1000 else f"{loss:.2e}"


def show_si(number: float) -> str:
    """Format a large number with three digits and an SI prefix: ``69.1T``."""
    size, prefix = max((unit for unit in PREFIXES if unit[0] <= number), default=PREFIXES[0])
    return f"{number / size:.3g}{prefix}"


def fixed(decimals: int) -> Callable[[float], str]:
    """Make a function that formats a number with so many decimals."""
    return lambda number: f"{number:.{decimals}f}"


def unit_for(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Choose the size and name of the unit in which ``largest`` is 5 or more; ``units`` ascend from the smallest."""
    return next((unit for unit in reversed(units) if largest >= 5 * unit[0]), units[0])
