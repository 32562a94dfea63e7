"""Numbers as people read them; a dash for what is undefined."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["change", "count", "counted", "interval", "number", "percent", "seconds", "signed", "size"]

DASH = "–"


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return DASH if value is None else f"{100 * value:.1f}"


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of digits after the point, or a dash."""
    return DASH if value is None else _minus(f"{value:.{digits}f}")


def count(value: float | None) -> str:
    """A whole number with its thousands apart, or a dash."""
    return DASH if value is None else f"{value:,.0f}"


def counted(value: float | None, one: str) -> str:
    """A whole number of things: 1 image, 2 images."""
    return f"{count(value)} {one}{'' if value == 1 else 's'}"


def seconds(value: float | None) -> str:
    """Seconds with one digit, or a dash."""
    return DASH if value is None else f"{value:,.1f}"


def size(value: float | None) -> str:
    """Bytes as MiB or GiB, or a dash."""
    if value is None:
        return DASH
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:,.1f} GiB"


def interval(attack: Mapping[str, float | None] | None) -> str:
    """An AUC with its interval, or a dash."""
    if attack is None or attack["auc"] is None:
        return DASH
    if attack["low"] is None or attack["high"] is None:
        return f"{attack['auc']:.2f} (too few for an interval)"
    return f"{attack['auc']:.2f} ({attack['low']:.2f} to {attack['high']:.2f})"


def change(
    difference: Mapping[str, float | None] | None, scale: float = 100, digits: int = 1, ends: str = "low high"
) -> str:
    """A signed difference with its interval, or a dash.

    Args:
        difference: ``difference`` and the ends of its interval.
        scale: what it is multiplied by; 100 makes percentage points of shares.
        digits: digits after the point.
        ends: names of the interval's two ends.
    """
    if difference is None or difference["difference"] is None:
        return DASH
    low, high = (difference[end] for end in ends.split())
    text = signed(difference["difference"], scale, digits)
    return (
        text
        if low is None or high is None
        else f"{text} ({signed(low, scale, digits)} to {signed(high, scale, digits)})"
    )


def signed(value: float, scale: float = 100, digits: int = 1) -> str:
    """A number with its sign; none where it rounds to 0."""
    text = f"{scale * value:+.{digits}f}"
    return text[1:] if not float(text) else _minus(text)


def _minus(text: str) -> str:
    return text.replace("-", "−")
