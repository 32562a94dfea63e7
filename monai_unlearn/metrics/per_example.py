"""Attacks that set a sample's score against that sample's own scores under reference or shadow models."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logsumexp

__all__ = ["lira_scores", "pairwise_ratio_scores", "ratio_scores"]

_MODELS_FOR_OWN_VARIANCE = 32
_SMALLEST_VARIANCE = 1e-12  # far below the spread of any two trainings, far above rounding
_SLACK = 1e-6  # log-probabilities of single precision may end up this much above 0


def ratio_scores(log_p: np.ndarray, reference_log_p: np.ndarray) -> np.ndarray:
    """Ratio attack: log p(y | x) − log mean_k p_k(y | x). Higher means: more likely a member.

    What the sample's label is under the model beyond what models that never saw it give it. This is the ratio of RMIA
    without its comparison with other samples (``pairwise_ratio_scores``). The reference models must have seen neither
    the members nor the non-members; the retrained models serve.

    Args:
        log_p: log-probability of each sample's label under the audited model, shape N, at most 0; multi-label: the mean
            over known findings.
        reference_log_p: the same under the K reference models, shape K × N.

    Returns:
        N numbers; 0 where the model does as the references do.

    Raises:
        ValueError: for other shapes, no reference model, and values that are no finite log-probabilities.

    References:
        Zarifzadeh et al., Low-Cost High-Power Membership Inference Attacks, ICML 2024, arXiv:2312.03262.
    """
    log_p, reference_log_p = _log_probabilities("log_p", log_p, "reference_log_p", reference_log_p)
    return log_p - (logsumexp(reference_log_p, axis=0) - np.log(len(reference_log_p)))


def pairwise_ratio_scores(
    log_p: np.ndarray,
    reference_log_p: np.ndarray,
    population_log_p: np.ndarray,
    population_reference_log_p: np.ndarray,
    gamma: float = 1.0,
) -> np.ndarray:
    """RMIA: share of population samples z with ratio(x) / ratio(z) ≥ γ. Higher means: more likely a member.

    The ratio is that of ``ratio_scores``, whose order the samples keep, ties aside. The comparison gives the score a
    meaning of its own: half the population is beaten at .5. The references are taken as models that saw none of the
    samples, without the paper's estimate of what models that did see them would say.

    Args:
        log_p: log-probability of each sample's label under the audited model, shape N, at most 0.
        reference_log_p: the same under the K reference models, shape K × N.
        population_log_p: as ``log_p`` for M samples that no model was trained on and that are not among the N.
        population_reference_log_p: the same under the K reference models, shape K × M.
        gamma: by how much a ratio has to exceed another, above 0; 1 or 2 in the paper.

    Returns:
        N numbers in [0, 1].

    Raises:
        ValueError: as ``ratio_scores``, and for an empty population or another number of reference models there.

    References:
        As ``ratio_scores``.
    """
    if not 0 < gamma < np.inf:
        raise ValueError(f"gamma should be a finite number above 0, but got {gamma}. The paper takes 1 or 2.")
    needed = ratio_scores(log_p, reference_log_p) - np.log(gamma)
    population_log_p, population_reference_log_p = _log_probabilities(
        "population_log_p", population_log_p, "population_reference_log_p", population_reference_log_p
    )
    if not len(population_log_p) or len(population_reference_log_p) != len(reference_log_p):
        raise ValueError(
            "population_reference_log_p should hold at least one sample under the same reference models as "
            f"reference_log_p, but got {population_reference_log_p.shape} and {np.shape(reference_log_p)}. "
            "Run each reference model on both sets."
        )
    population = np.sort(ratio_scores(population_log_p, population_reference_log_p))
    return np.searchsorted(population, needed, side="right") / len(population)


def lira_scores(scores: np.ndarray, in_scores: np.ndarray, out_scores: np.ndarray, min_models: int = 2) -> np.ndarray:
    """U-LiRA: p_u / (p_u + p_o), of a sample's score under two Gaussians. Higher means: more likely a member.

    p_u is fitted to shadow models that trained on the sample and then unlearned it, p_o to those that never saw it.
    Each sample has its own two means. It has its own variances where both sides have at least 32 models; elsewhere a
    side has one variance for all samples, since few models estimate none: their squared distances from their sample's
    mean, pooled over the samples. That is LiRA's "fixed variance", whose code, unlike this, also counts the spread
    between samples. No variance is below 10⁻¹², for shadow models that all say the same.

    Args:
        scores: scores (``log_odds``) of the audited model, shape N.
        in_scores: those of shadow models, one a row, that trained on a sample and unlearned it; NaN for other samples.
        out_scores: those of shadow models, one a row, that never saw a sample; NaN for other samples.
        min_models: shadow models that a sample needs on either side, at least 2.

    Returns:
        N numbers in [0, 1]; NaN where a sample has too few models.

    Raises:
        ValueError: for other shapes, infinite scores, and a NaN among the audited model's.

    References:
        Hayes et al., Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy, 2024,
        arXiv:2403.01218; Carlini et al., Membership Inference Attacks From First Principles, S&P 2022,
        arXiv:2112.03570.
    """
    scores = np.asarray(scores, dtype=np.float64)
    sides = [np.asarray(side, dtype=np.float64) for side in (in_scores, out_scores)]
    if scores.ndim != 1 or any(side.ndim != 2 or side.shape[1] != len(scores) for side in sides):
        raise ValueError(
            "scores should be N, in_scores and out_scores models × N, but got "
            f"{scores.shape}, {sides[0].shape} and {sides[1].shape}. Give one row for each shadow model."
        )
    if min_models < 2:
        raise ValueError(f"min_models should be at least 2, but got {min_models}. One model has no variance.")
    if not np.isfinite(scores).all():
        raise ValueError(
            f"scores should be finite, but got {scores[~np.isfinite(scores)][0]}. Leave out samples that have no score."
        )
    for name, side in zip(("in_scores", "out_scores"), sides):
        if np.isinf(side).any():
            raise ValueError(
                f"{name} should be finite or NaN, but got {side[np.isinf(side)][0]}. "
                "Leave out shadow models whose outputs are not finite."
            )
    counts = np.stack([(~np.isnan(side)).sum(0) for side in sides])
    fewest = counts.min(0)
    log_density = []
    for side, count in zip(sides, counts):
        mean = np.nansum(side, axis=0) / np.maximum(count, 1)
        squares = np.nansum((side - mean) ** 2, axis=0)
        freedom = np.maximum(count - 1, 0)
        pooled = squares.sum() / max(freedom.sum(), 1)
        variance = np.where(fewest >= _MODELS_FOR_OWN_VARIANCE, squares / np.maximum(freedom, 1), pooled)
        variance = np.maximum(variance, _SMALLEST_VARIANCE)
        log_density.append(-((scores - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return np.where(fewest >= min_models, expit(log_density[0] - log_density[1]), np.nan)


def _log_probabilities(
    name: str, log_p: np.ndarray, reference_name: str, reference_log_p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    log_p, reference_log_p = np.asarray(log_p, dtype=np.float64), np.asarray(reference_log_p, dtype=np.float64)
    if log_p.ndim != 1 or reference_log_p.ndim != 2 or reference_log_p.shape[1] != len(log_p):
        raise ValueError(
            f"{name} should be N and {reference_name} models × N, but got {log_p.shape} and {reference_log_p.shape}. "
            "Give one row for each reference model."
        )
    if not len(reference_log_p):
        raise ValueError(f"{reference_name} should have at least one model, but got none. Train one retrained model.")
    for what, values in ((name, log_p), (reference_name, reference_log_p)):
        bad = ~(np.isfinite(values) & (values <= _SLACK))
        if bad.any():
            raise ValueError(
                f"{what} should hold finite log-probabilities, at most 0, but got {values[bad][0]}. "
                "Take them from log_softmax in float64, and leave out samples that have none."
            )
    return log_p, reference_log_p
