"""How many of those who have a finding are found, at a fixed share of false alarms."""

from __future__ import annotations

import numpy as np

__all__ = ["false_negatives", "sensitivity_at_specificity", "threshold_at_specificity"]


def sensitivity_at_specificity(scores: np.ndarray, present: np.ndarray, specificity: float = 0.9) -> float:
    """Highest sensitivity among all thresholds whose specificity is at least the given one.

    Args:
        scores: shape N, finite; higher means: more likely present. Of a class, its score against the rest.
        present: shape N, whether the class or finding is there; soft labels count as present above ½ and as absent
            below, and are left out at exactly ½; NaN where it is not known.
        specificity: in (0, 1].

    Returns:
        A value in [0, 1]; NaN if the class or finding is present in all samples, or in none.

    Raises:
        ValueError: as ``threshold_at_specificity``.
    """
    threshold = threshold_at_specificity(scores, present, specificity)
    positives = np.asarray(scores, dtype=float)[_sides(present)[0]]
    if np.isnan(threshold) or not len(positives):
        return float("nan")
    return float(np.mean(positives >= threshold))


def threshold_at_specificity(scores: np.ndarray, present: np.ndarray, specificity: float = 0.9) -> float:
    """Lowest threshold that reaches a specificity, where scores of at least the threshold mean: present.

    It is just above the score of one of the absent samples, and knows nothing of the present ones, so one that is set
    on one model or one part of the data can be applied to another.

    Args:
        scores: as in ``sensitivity_at_specificity``.
        present: as there.
        specificity: as there.

    Returns:
        A finite number; NaN if no sample is known to be absent.

    Raises:
        ValueError: if shapes do not fit, a score is not finite or a label not in [0, 1], or ``specificity`` is not in
            (0, 1].
    """
    if not 0 < specificity <= 1:
        raise ValueError(f"specificity should be in (0, 1], but got {specificity!r}.")
    negatives = _checked(scores, present)[_sides(present)[1]]
    n = len(negatives)
    if not n:
        return float("nan")
    # The fewest samples that have to lie below; not ⌈specificity · n⌉, which rounding lifts above 55 for .55 · 100.
    below = int(np.searchsorted(np.arange(n + 1) / n, specificity))
    return float(np.nextafter(np.partition(negatives, below - 1)[below - 1], np.inf))


def false_negatives(scores: np.ndarray, present: np.ndarray, threshold: float) -> np.ndarray:
    """Which samples have a finding that is missed: present, and a score below the threshold.

    Args:
        scores: as in ``sensitivity_at_specificity``.
        present: as there; what is not known is not missed.
        threshold: as ``threshold_at_specificity`` gives it.

    Returns:
        Boolean array of shape N.

    Raises:
        ValueError: if shapes do not fit, a score is not finite or a label not in [0, 1], or ``threshold`` is NaN.
    """
    if np.isnan(threshold):
        raise ValueError(
            "threshold should be a number, but got nan. There is none where no sample is known to be absent: "
            "leave out this class or finding."
        )
    return (_checked(scores, present) < threshold) & _sides(present)[0]


def _sides(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where it is known to be present, and where it is known to be absent."""
    present = np.asarray(present, dtype=float)
    return present > 0.5, present < 0.5


def _checked(scores: np.ndarray, present: np.ndarray) -> np.ndarray:
    scores, present = np.asarray(scores, dtype=float), np.asarray(present, dtype=float)
    if scores.ndim != 1 or present.shape != scores.shape:
        raise ValueError(f"scores and present should both have shape N, but got {scores.shape} and {present.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError(
            f"scores should be finite, but {int((~np.isfinite(scores)).sum())} of {len(scores)} are not. "
            "The training may have diverged."
        )
    if not (np.isnan(present) | ((present >= 0) & (present <= 1))).all():
        raise ValueError("present should be in [0, 1], or NaN where it is not known, but some values are outside.")
    return scores
