"""How well findings are told from their absence, where not all of them are known."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

__all__ = ["auroc_per_finding", "known_accuracy", "mean_auroc"]


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
