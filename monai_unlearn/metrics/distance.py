"""How far a model's outputs are from those of the retrained one, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import rel_entr
from scipy.stats import entropy

__all__ = [
    "activation_distance",
    "agreement",
    "forgetting_epsilon",
    "forgetting_quality",
    "forgetting_score",
    "js_divergence",
    "klom",
]

_BLOCK = 2**17  # numbers that are worked on at once, 1 MiB of them
_SUM_TOLERANCE = 1e-2  # rows of half-precision probabilities add up to 1 no more exactly than this
_MARGIN_LIMIT = 100.0
_EMPTY_BIN = 1e-5
_EPSILON_LIMIT = 50.0
_COLLAPSED = 0.01


def js_divergence(p: np.ndarray, q: np.ndarray, multi_label: bool = False) -> np.ndarray:
    """Jensen-Shannon divergence of each sample's outputs: ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in nats.

    Args:
        p: probabilities of one model, shape N × C, rows that add up to 1; multi-label: N × L, each a finding's own.
        q: those of the other model for the same samples.
        multi_label: whether columns are findings; the divergence is then the mean over theirs.

    Returns:
        N numbers in [0, ln 2], exactly 0 for equal rows.

    Raises:
        ValueError: for other shapes, for values that are no probabilities, and for rows that do not add up to 1.

    References:
        Lin, Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf. Theory 37 (1991).
    """
    p, q = _probabilities(p, q, sums=not multi_label)
    return np.clip(_by_rows(_js_findings if multi_label else _js_classes, p, q), 0, np.log(2))


def activation_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Distance of each sample's outputs: ‖p − q‖₂.

    Args:
        p: probabilities of one model, shape N × C or N × L.
        q: those of the other model for the same samples.

    Returns:
        N numbers in [0, √2]; multi-label: [0, √L].

    Raises:
        ValueError: for other shapes, and for values that are no probabilities.

    References:
        Golatkar et al., Mixed-Privacy Forgetting in Deep Networks, CVPR 2021, arXiv:2012.13431.
    """
    p, q = _probabilities(p, q, sums=False)
    return _by_rows(lambda one, other: np.linalg.norm(one - other, axis=1), p, q)


def agreement(p: np.ndarray, q: np.ndarray, multi_label: bool = False) -> np.ndarray:
    """Whether two models answer alike: 1 where they name the same class, else 0.

    Of equally probable classes the first one counts, of a probability of exactly ½ the answer "absent".

    Args:
        p: probabilities of one model, shape N × C; multi-label: N × L.
        q: those of the other model for the same samples.
        multi_label: whether columns are findings; it is then the share of findings on the same side of ½.

    Returns:
        N numbers in [0, 1].

    Raises:
        ValueError: as ``js_divergence``.
    """
    p, q = _probabilities(p, q, sums=not multi_label)
    if multi_label:
        return _by_rows(lambda one, other: ((one > 0.5) == (other > 0.5)).mean(1), p, q)
    return _by_rows(lambda one, other: (one.argmax(1) == other.argmax(1)).astype(np.float64), p, q)


def klom(unlearned: np.ndarray, retrained: np.ndarray, bins: int = 20) -> np.ndarray:
    """KL divergence of margins (KLoM): KL(unlearned ‖ retrained) between histograms of each sample's margins.

    The histograms are over models, in equal bins over the range of both sets together. As in the authors' code, margins
    are clipped to ±100, a bin that the unlearned models reach and the retrained ones do not counts as holding 10⁻⁵ of
    the latter, and the shares are then scaled to add up to 1. So the largest possible value is near ln 10⁵ = 11.5.

    A histogram needs many models: with a few, two sets of one distribution are far apart too, so the same figure
    between two sets of retrained models belongs beside it.

    Args:
        unlearned: margins z_y − logsumexp_{c≠y} z (``log_odds``), shape U × N: one row for each unlearned model.
        retrained: those of the retrained models for the same samples, shape R × N.
        bins: number of bins, at least 1.

    Returns:
        N numbers, at least 0; exactly 0 for equal sets.

    Raises:
        ValueError: for other shapes, fewer than 2 models on either side, or a margin that is not finite.

    References:
        Georgiev et al., Attribute-to-Delete: Machine Unlearning via Datamodel Matching, ICLR 2025, arXiv:2410.23232.
    """
    unlearned, retrained = _models(unlearned, retrained)
    if bins < 1:
        raise ValueError(f"bins should be at least 1, but got {bins}. The paper's number is 20.")
    return _by_columns(lambda one, other: _klom(one, other, bins), unlearned, retrained)


def forgetting_epsilon(unlearned: np.ndarray, retrained: np.ndarray, delta: float = 1e-5) -> np.ndarray:
    """How well each sample's score tells unlearned from retrained models: the ε of forgetting. 0 is not at all.

    An adversary says "unlearned" from a threshold on, or up to it. Over all thresholds and both ways round,
    ε = max{ln(1 − δ − FPR) − ln FNR, ln(1 − δ − FNR) − ln FPR}, clipped to [0, 50]. A threshold where exactly one of
    the rates is 0 is left out, as a sign of too few models; where both are 0 the sets are told apart for sure, and ε is
    50. It also is 50 where one set spreads over less than 1 % of the other's range: such a model gives itself away by
    always saying the same, which no single threshold need show.

    With n models a side, ε is either below ln n or 50, and between two sets of one distribution it is 50 by chance for
    at least one sample in ½ (2n choose n): in 3 with 2 models a side, in 126 with 5.

    Differs from the reference code: every threshold is tried, not a grid of them; both ways round, not only the one
    that the medians suggest; and no pairs of thresholds, whose luck with few models is greater still.

    Args:
        unlearned: scores (``log_odds``), shape U × N: one row for each unlearned model.
        retrained: those of the retrained models for the same samples, shape R × N.
        delta: probability with which the bound may fail, in [0, 1).

    Returns:
        N numbers in [0, 50].

    Raises:
        ValueError: for other shapes, fewer than 2 models on either side, or a score that is not finite.

    References:
        Triantafillou et al., Are We Making Progress in Unlearning? Findings from the First NeurIPS Unlearning
        Competition, 2024, arXiv:2406.09073; google-deepmind/unlearning_evaluation.
    """
    unlearned, retrained = _models(unlearned, retrained)
    if not 0 <= delta < 1:
        raise ValueError(f"delta should be in [0, 1), but got {delta}. The reference's is 1e-5.")
    return _by_columns(lambda one, other: _epsilon(one, other, delta), unlearned, retrained)


def forgetting_quality(epsilon: np.ndarray) -> float:
    """Forgetting quality F: mean over samples of 2^−⌊ε / ½⌋.

    Args:
        epsilon: N numbers from ``forgetting_epsilon``.

    Returns:
        A value in (0, 1], 1 where no sample tells unlearned from retrained models; NaN without samples.

    Raises:
        ValueError: for a value outside [0, 50].

    References:
        As ``forgetting_epsilon``. The reference gives no points at all beyond what its number of models can measure.
    """
    epsilon = np.asarray(epsilon, dtype=np.float64)
    if not ((epsilon >= 0) & (epsilon <= _EPSILON_LIMIT)).all():
        raise ValueError(
            f"epsilon should be in [0, 50], but got {_bad_value(epsilon, 0, _EPSILON_LIMIT)}. "
            "Take it from forgetting_epsilon."
        )
    return float(np.exp2(-np.floor(epsilon / 0.5)).mean()) if epsilon.size else float("nan")


def forgetting_score(
    epsilon: np.ndarray, retain: tuple[float | None, float | None], test: tuple[float | None, float | None]
) -> float:
    """Final score of the NeurIPS 2023 competition: F · (RA_u / RA_r) · (TA_u / TA_r).

    Args:
        epsilon: N numbers from ``forgetting_epsilon``.
        retain: retain accuracy of the unlearned and of the retrained models, each in [0, 1].
        test: their test accuracies.

    Returns:
        A number, at least 0, above 1 only if the unlearned models are better than the retrained ones; NaN where an
        accuracy is missing (None or NaN), that of the retrained ones is 0, or there are no samples.

    Raises:
        ValueError: for an accuracy outside [0, 1] and as ``forgetting_quality``.

    References:
        As ``forgetting_epsilon``.
    """
    score = forgetting_quality(epsilon)
    for name, (unlearned, retrained) in (("retain", retain), ("test", test)):
        unlearned, retrained = (float("nan") if value is None else float(value) for value in (unlearned, retrained))
        for value in (unlearned, retrained):
            if value < 0 or value > 1:
                raise ValueError(f"{name} should hold accuracies in [0, 1], but got {value}. Divide per cent by 100.")
        score *= unlearned / retrained if retrained else float("nan")
    return score


def _by_rows(figure: Callable[[np.ndarray, np.ndarray], np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Apply to a block of rows after the other: what is made on the way then fits into a processor's cache."""
    found = np.empty(len(p))
    rows = max(1, _BLOCK // p.shape[1])
    for start in range(0, len(p), rows):
        block = slice(start, start + rows)
        found[block] = figure(p[block], q[block])
    return found


def _by_columns(
    figure: Callable[[np.ndarray, np.ndarray], np.ndarray], unlearned: np.ndarray, retrained: np.ndarray
) -> np.ndarray:
    """The same for scores of models × samples."""
    found = np.empty(unlearned.shape[1])
    columns = max(1, _BLOCK // (len(unlearned) + len(retrained)))
    for start in range(0, len(found), columns):
        block = slice(start, start + columns)
        found[block] = figure(unlearned[:, block], retrained[:, block])
    return found


def _js_classes(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    # p ln(p / ½(p + q)), doubled so that halving the sum of the smallest numbers can't give 0.
    total = p + q
    return (rel_entr(2 * p, total) + rel_entr(2 * q, total)).sum(1) / 4


def _js_findings(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (_js_classes(p, q) + _js_classes(1 - p, 1 - q)) / p.shape[1]


def _klom(unlearned: np.ndarray, retrained: np.ndarray, bins: int) -> np.ndarray:
    """``klom`` of a block of samples."""
    unlearned, retrained = (margins.clip(-_MARGIN_LIMIT, _MARGIN_LIMIT) for margins in (unlearned, retrained))
    low = np.minimum(unlearned.min(0), retrained.min(0))
    step = (np.maximum(unlearned.max(0), retrained.max(0)) - low) / bins
    p, q = (_shares(margins, low, step, bins) for margins in (unlearned, retrained))
    q = np.where(p > 0, np.maximum(q, _EMPTY_BIN), q)
    return np.maximum(entropy(p, q, axis=0), 0)


def _shares(margins: np.ndarray, low: np.ndarray, step: np.ndarray, bins: int) -> np.ndarray:
    """Share of the models whose margin is in each bin, bins × N; the last bin holds its upper end, as in NumPy."""
    at_least = np.zeros((bins + 1, margins.shape[1]), dtype=np.int64)
    at_least[0] = len(margins)
    for edge in range(1, bins):
        at_least[edge] = (margins >= low + edge * step).sum(0)
    return -np.diff(at_least, axis=0) / len(margins)


def _epsilon(unlearned: np.ndarray, retrained: np.ndarray, delta: float) -> np.ndarray:
    """``forgetting_epsilon`` of a block of samples."""
    u, r = len(unlearned), len(retrained)
    scores = np.concatenate([unlearned, retrained])
    order = scores.argsort(axis=0)
    scores = np.take_along_axis(scores, order, axis=0)
    is_unlearned = order < u
    # Models strictly below the threshold at each score; of equal scores only the first is a threshold.
    below_u = is_unlearned.cumsum(0) - is_unlearned
    below_r = np.arange(u + r)[:, None] - below_u
    threshold = np.ones(scores.shape, dtype=bool)
    threshold[1:] = scores[1:] > scores[:-1]
    epsilon = np.zeros(scores.shape[1])
    for fpr, fnr in (((u - below_u) / u, below_r / r), ((r - below_r) / r, below_u / u)):
        with np.errstate(divide="ignore", invalid="ignore"):
            both = np.fmax(
                np.log(np.maximum(1 - delta - fpr, 0)) - np.log(fnr),
                np.log(np.maximum(1 - delta - fnr, 0)) - np.log(fpr),
            )
        both[(fpr == 0) != (fnr == 0)] = 0  # where both are 0 it is infinite, and clipped below
        epsilon = np.maximum(epsilon, np.where(threshold, both, 0).max(0))
    ranges = np.sort([np.ptp(unlearned, axis=0), np.ptp(retrained, axis=0)], axis=0)
    epsilon[ranges[0] < _COLLAPSED * ranges[1]] = _EPSILON_LIMIT
    return np.minimum(epsilon, _EPSILON_LIMIT)


def _probabilities(p: np.ndarray, q: np.ndarray, sums: bool) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if p.ndim != 2 or p.shape != q.shape or not p.shape[1]:
        raise ValueError(
            f"p and q should both be N × C (or N × L), but got {p.shape} and {q.shape}. "
            "Give one row of probabilities for each sample, of the same samples in the same order."
        )
    for name, values in (("p", p), ("q", q)):
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"{name} should hold probabilities in [0, 1], but got {_bad_value(values, 0, 1)}. "
                "Apply the softmax (multi-label: the sigmoid) to the network's outputs first."
            )
        off = np.abs(values.sum(1) - 1).max(initial=0) if sums else 0
        if off > _SUM_TOLERANCE:
            raise ValueError(
                f"{name} should have rows that add up to 1, but got one that is {off:.3g} off. "
                "Apply the softmax to the network's outputs first, or say multi_label=True if columns are findings."
            )
    return p, q


def _models(unlearned: np.ndarray, retrained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unlearned, retrained = np.asarray(unlearned, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    if unlearned.ndim != 2 or retrained.ndim != 2 or unlearned.shape[1] != retrained.shape[1]:
        raise ValueError(
            "unlearned should be models × samples and retrained too, with the same samples, but got "
            f"{unlearned.shape} and {retrained.shape}. Give one row for each model."
        )
    for name, scores in (("unlearned", unlearned), ("retrained", retrained)):
        if len(scores) < 2:
            raise ValueError(
                f"{name} should hold the scores of at least 2 models, but got {len(scores)}. "
                "Train more with other seeds, or leave this figure out."
            )
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{name} should hold finite scores, but got {scores[~np.isfinite(scores)][0]}. "
                "Leave out samples that have no score, and models whose outputs are not finite."
            )
    return unlearned, retrained


def _bad_value(values: np.ndarray, low: float, high: float) -> float:
    return float(values[~((values >= low) & (values <= high))][0])
