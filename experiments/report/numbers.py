"""Numbers as tables show them."""

from collections.abc import Callable

DASH = "-"


def show_count(number: int) -> str:
    """Format a number of parameters: ``2.62M``, ``412k``."""
    if number >= 999_500:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.0f}k" if number >= 1000 else str(number)


def show_seconds(seconds: float) -> str:
    """Format seconds with one decimal below ten and none above: ``4.2``, ``1,204``."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"


def show_loss(loss: float) -> str:
    """Format a loss with three significant digits, without an exponent in the usual range: ``0.0413``, ``1.27``."""
    return f"{loss:#.3g}" if 1e-3 <= abs(loss) < 1000 else f"{loss:.2e}"


def fixed(decimals: int) -> Callable[[float], str]:
    """Make a function that formats a number with so many decimals."""
    return lambda number: f"{number:.{decimals}f}"
