"""How well findings are told from their absence, where not all of them are known."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

__all__ = ["auroc_influence", "auroc_per_finding", "known_accuracy", "mean_auroc"]


def auroc_influence(
    scores: np.ndarray, present: np.ndarray, groups: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """AUROC and what each sample contributes to its error: DeLong's method, for sets too large to resample.

    The variance of the AUROC is the sum of squared contributions, over groups (patients) of their sums where images
    are not independent (Obuchowski). Contributions of two models, or of several findings, to a difference or a mean
    add up sample by sample, so their errors are paired.

    Args:
        scores: N scores, finite.
        present: whether the finding is present, N booleans.
        groups: group (patient) of each sample, whose numbers are then the sample sizes; None: each its own.

    Returns:
        The AUROC, and N contributions; NaN and zeros where all or none have the finding. The contributions of a side
        with one sample (group) are NaN: its error can't be known.

    References:
        DeLong et al., Comparing the Areas under Two or More Correlated ROC Curves, Biometrics 44 (1988);
        Obuchowski, Nonparametric Analysis of Clustered ROC Curve Data, Biometrics 53 (1997).
    """
    present = np.asarray(present, dtype=bool)
    n, m = int(present.sum()), int((~present).sum())
    contributions = np.zeros(len(scores))
    if not n or not m:
        return float("nan"), contributions
    ranks = rankdata(scores)
    below = (ranks[present] - rankdata(scores[present])) / m  # share of the absent that score lower
    above = 1 - (ranks[~present] - rankdata(scores[~present])) / n
    auroc = float(below.mean())
    for side, placements in ((present, below), (~present, above)):
        size = len(placements) if groups is None else len(np.unique(groups[side]))
        factor = np.sqrt(size / (size - 1)) if size > 1 else float("nan")
        contributions[side] = factor * (placements - auroc) / len(placements)
    return auroc, contributions


def auroc_per_finding(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """AUROC of each finding over the samples in which it is known.

    Soft labels count as present above ½ and as absent below; those of exactly ½ are left out, as are unknown ones.

    Args:
        logits: shape B × L, or B for one finding; finite.
        labels: of the same shape, in [0, 1]; NaN where a finding is not known.

    Returns:
        L numbers in [0, 1]; NaN for a finding that is present in all samples, or in none.
    """
    scores, present, known = _questions(logits, labels)
    aurocs = np.full(scores.shape[1], np.nan)
    for finding in range(scores.shape[1]):
        rows = known[:, finding]
        if len(np.unique(present[rows, finding])) == 2:
            aurocs[finding] = roc_auc_score(present[rows, finding], scores[rows, finding])
    return aurocs


def mean_auroc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of ``auroc_per_finding`` over the findings for which it is defined; NaN if there is none.

    Args:
        logits: as there.
        labels: as there.
    """
    aurocs = auroc_per_finding(logits, labels)
    return float("nan") if np.isnan(aurocs).all() else float(np.nanmean(aurocs))


def known_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the known findings, over all samples together, that are on the right side of a probability of ½.

    Args:
        logits: as in ``auroc_per_finding``; a finding is predicted present where the logit is above 0.
        labels: as there.

    Returns:
        A value in [0, 1]; NaN if no finding is known.
    """
    scores, present, known = _questions(logits, labels)
    return float(np.mean((scores > 0)[known] == present[known])) if known.any() else float("nan")


def _questions(logits: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, whether the finding is present and whether that is known, each B × L."""
    if logits.ndim not in (1, 2) or labels.shape != logits.shape:
        raise ValueError(
            "logits and labels should both be B × L, or B for one finding, but got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if logits.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    scores, truth = logits.detach().cpu().double().numpy(), labels.detach().cpu().double().numpy()
    return scores, truth > 0.5, ~np.isnan(truth) & (truth != 0.5)
