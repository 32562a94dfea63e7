"""How far a model is from the retrained one."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["average_gap", "indiscernibility", "retention_deviation", "tug_of_war"]


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


def tug_of_war(unlearned: Sequence[float | None], retrained: Sequence[float | None]) -> float | None:
    """Tug of war (ToW): (1 − |Δ forget|) · (1 − |Δ retain|) · (1 − |Δ test|). Higher is closer to the retrained model.

    Args:
        unlearned: forget, retain and test accuracy of one model, each in [0, 1].
        retrained: those of the retrained one.

    Returns:
        A value in [0, 1], 1 where all three are equal; None where one is missing (None or NaN).

    Raises:
        ValueError: for another number of accuracies, or one outside [0, 1].

    References:
        Zhao et al., What Makes Unlearning Hard and What to Do About It, NeurIPS 2024, arXiv:2406.01257.
    """
    if len(unlearned) != 3:
        raise ValueError(
            f"unlearned should hold 3 accuracies, but got {len(unlearned)}. Give those on forget, retain and test."
        )
    pairs = _pairs(unlearned, retrained)
    return None if pairs is None else math.prod(1 - abs(u - r) for u, r in pairs)


def retention_deviation(unlearned: Sequence[float | None], retrained: Sequence[float | None]) -> float | None:
    """Retention deviation: Σ over splits of |accuracy / accuracy of the retrained model − 1|. 0 is no deviation.

    Args:
        unlearned: accuracies of one model, each in [0, 1]; in the paper those on retain and test.
        retrained: those of the retrained one.

    Returns:
        A number, at least 0; None where an accuracy is missing (None or NaN) or that of the retrained model is 0.

    Raises:
        ValueError: for sequences of unlike length, for empty ones, and for an accuracy outside [0, 1].

    References:
        Cadet et al., Deep Unlearn: Benchmarking Machine Unlearning, 2024, arXiv:2410.01276.
    """
    pairs = _pairs(unlearned, retrained)
    if pairs is None or any(r == 0 for _, r in pairs):
        return None
    return sum(abs(u / r - 1) for u, r in pairs)


def indiscernibility(auc: float | None) -> float | None:
    """Indiscernibility: 1 − |AUC − ½| / ½. 1 is an attack that tells nothing, either way round.

    Args:
        auc: AUC of an attack, in [0, 1].

    Returns:
        A value in [0, 1]; None where the AUC is missing (None or NaN).

    Raises:
        ValueError: for an AUC outside [0, 1].

    References:
        As ``retention_deviation``.
    """
    known = _known("auc", [auc])
    return None if known is None else 1 - abs(known[0] - 0.5) / 0.5


def _pairs(unlearned: Sequence[float | None], retrained: Sequence[float | None]) -> list[tuple[float, float]] | None:
    """The accuracies in pairs, or None where one is missing."""
    if len(unlearned) != len(retrained) or not len(unlearned):
        raise ValueError(
            f"Both should have the same accuracies, but got {len(unlearned)} and {len(retrained)}. "
            "Give those on the same splits in the same order, and None where one is missing."
        )
    known, others_known = _known("unlearned", unlearned), _known("retrained", retrained)
    return None if known is None or others_known is None else list(zip(known, others_known))


def _known(name: str, values: Sequence[float | None]) -> list[float] | None:
    """The values, or None where one is missing."""
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    for value in known:
        if not 0 <= value <= 1:
            raise ValueError(f"{name} should be in [0, 1], but got {value}. Divide per cent by 100.")
    return known if len(known) == len(values) else None
