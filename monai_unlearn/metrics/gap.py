"""How far a model is from the retrained one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["average_gap"]


def average_gap(unlearned: Sequence[float | None], retrained: Sequence[float | None]) -> float | None:
    """Mean absolute difference of figures in [0, 1], in percentage points.

    The figures of the field are forget, retain and test accuracy and the attack's AUC (SalUn, arXiv:2310.12508).

    Args:
        unlearned: the figures of one model.
        retrained: the same figures of the retrained one.

    Returns:
        Percentage points, or None where a figure is missing.
    """
    if len(unlearned) != len(retrained) or not unlearned:
        raise ValueError(f"Both should have the same figures, but got {len(unlearned)} and {len(retrained)}.")
    if any(value is None for value in (*unlearned, *retrained)):
        return None
    return 100 * sum(abs(u - r) for u, r in zip(unlearned, retrained)) / len(unlearned)  # type: ignore[operator]
