"""Whether a model is as sure as it is right."""

from __future__ import annotations

import numpy as np

__all__ = ["brier", "calibration_error", "reliability"]

SUM_TOLERANCE = 0.01  # a softmax in half precision is this far from a sum of one


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Brier score of each sample, Σ_c (p_c − 1[y = c])². Lower is better.

    Of a multi-label task it is the mean of (p − y)² over the known findings, so for one finding half of that of two
    classes.

    Args:
        probabilities: shape N × C, rows that sum to 1; or N × L, in [0, 1].
        labels: shape N, integer, in [0, C − 1]; or N × L in [0, 1], NaN where a finding is not known.

    Returns:
        Float64 array of shape N, in [0, 2] (multi-label: [0, 1]); NaN where no finding is known.

    Raises:
        ValueError: if shapes do not fit, or probabilities or labels are outside their range or no numbers.

    References:
        Brier, Verification of Forecasts Expressed in Terms of Probability, Monthly Weather Review 78 (1950).
    """
    probabilities, labels = _checked(probabilities, labels)
    if labels.ndim == 1:
        errors = probabilities.copy()
        errors[np.arange(len(labels)), labels] -= 1
        return np.square(errors).sum(1)
    known = ~np.isnan(labels)
    errors = np.square(probabilities - np.where(known, labels, 0)) * known
    n = known.sum(1)
    return np.divide(errors.sum(1), n, out=np.full(len(labels), np.nan), where=n > 0)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean over the samples of |share right − mean confidence| of their bin.

    It is that of the bins of ``reliability``. Even of a model that is calibrated it is above 0, the more so the fewer
    samples there are: compare models on the same samples.

    Args:
        probabilities: as in ``reliability``.
        labels: as there.
        bins: number of bins of equal width, at least 1.

    Returns:
        A value in [0, 1]; NaN if there is no sample, or no known finding.

    Raises:
        ValueError: as there.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.
    """
    found = reliability(probabilities, labels, bins)
    n = found["n"]
    gaps = np.abs(found["accuracy"] - found["confidence"])
    return float((n * gaps).sum() / n.sum()) if len(n) else float("nan")


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """What a reliability diagram shows: how sure a model is against how often it is right, by bins of confidence.

    Confidence is the probability of the predicted class. Of a multi-label task it is that of a finding's presence, in
    all known pairs of image and finding together, and right means that the finding is there; a soft label counts as
    that share of a presence.

    Args:
        probabilities: shape N × C, rows that sum to 1; or N × L, in [0, 1].
        labels: shape N, integer, in [0, C − 1]; or N × L in [0, 1], NaN where a finding is not known.
        bins: number of bins of equal width, at least 1; each holds its upper end, the first one 0 as well.

    Returns:
        Of each bin that is not empty, in order: ``confidence``, its mean; ``accuracy``, the share that is right; and
        ``n``, the number of samples or pairs.

    Raises:
        ValueError: if shapes do not fit, probabilities or labels are outside their range or no numbers, or ``bins`` is
            below 1.
    """
    if bins < 1:
        raise ValueError(f"bins should be at least 1, but got {bins!r}.")
    probabilities, labels = _checked(probabilities, labels)
    if labels.ndim == 1:
        confidence, right = probabilities.max(1), (probabilities.argmax(1) == labels).astype(float)
    else:
        known = ~np.isnan(labels)
        confidence, right = probabilities[known], labels[known]
    place = np.searchsorted(np.arange(1, bins) / bins, confidence)
    n = np.bincount(place, minlength=bins)
    filled = n > 0
    return {
        "confidence": np.bincount(place, confidence, bins)[filled] / n[filled],
        "accuracy": np.bincount(place, right, bins)[filled] / n[filled],
        "n": n[filled],
    }


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as numbers of which the functions above can be sure; labels of classes as whole ones."""
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape not in (probabilities.shape[:1], probabilities.shape):
        raise ValueError(
            "probabilities should be N × C and labels N, or both N × L, but got "
            f"{probabilities.shape} and {labels.shape}."
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"probabilities should be in [0, 1], but are in [{probabilities.min()}, {probabilities.max()}]. "
            "Put the network's outputs through softmax, or sigmoid for findings."
        )
    if labels.ndim == 2:
        labels = labels.astype(float)
        if not (np.isnan(labels) | ((labels >= 0) & (labels <= 1))).all():
            raise ValueError(
                "labels should be in [0, 1], or NaN where a finding is not known, but are in "
                f"[{np.nanmin(labels)}, {np.nanmax(labels)}]."
            )
        return probabilities, labels
    classes = probabilities.shape[1]
    if not np.isin(labels, np.arange(classes)).all():
        raise ValueError(f"labels should be whole numbers from 0 to {classes - 1}, but some are not.")
    if not np.allclose(probabilities.sum(1), 1, rtol=0, atol=SUM_TOLERANCE):
        raise ValueError(
            "probabilities of the classes should sum to 1 for each sample, but do not. "
            "Put the network's outputs through softmax."
        )
    return probabilities, labels.astype(np.int64)
