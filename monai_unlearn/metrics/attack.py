"""A population attack: can forget samples be told from samples that were never trained on?"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata

__all__ = ["attack_auc", "attack_auc_interval", "detectable_difference", "finding_log_odds", "log_odds"]


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score of a sample: log-odds of its true class, log p_y − log Σ_{c≠y} p_c. Higher means: more likely a member.

    Computed from the logits in float64 (z_y − logsumexp_{c≠y} z_c), so that it does not saturate where a
    probability rounds to one.

    Args:
        logits: shape B × C, C ≥ 2.
        labels: shape B, integer, in [0, C − 1].

    Returns:
        Float64 tensor of shape B.

    References:
        Carlini et al., Membership Inference Attacks From First Principles, S&P 2022, arXiv:2112.03570.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits should be B × C with C ≥ 2 and labels B, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    logits = logits.double()
    column = labels.long()[:, None]
    true = logits.gather(1, column)[:, 0]
    others = logits.scatter(1, column, -torch.inf).logsumexp(1)
    return true - others


def finding_log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score of a sample with several findings: mean over its known findings of (2y − 1) · logit, in float64.

    The log-odds of the true answer to each finding's own question, so for one finding the same as ``log_odds`` with
    two classes. Soft labels weigh: one of ½ counts as 0.

    Args:
        logits: shape B × L.
        labels: shape B × L, in [0, 1]; NaN where a finding is not known.

    Returns:
        Float64 tensor of shape B; NaN for a sample without a known finding, which the attack leaves out.
    """
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(
            f"logits and labels should both be B × L, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    return ((2 * labels.double() - 1) * logits.double()).nanmean(1)


def attack_auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Probability that a member scores higher than a non-member, ties counting half.

    Samples that have no score (NaN: no known finding) are left out.

    Args:
        members: scores of the forget samples, the positive class.
        non_members: scores of samples never trained or tuned on.

    Returns:
        A value in [0, 1]; NaN if either is empty.
    """
    members, non_members = members[~np.isnan(members)], non_members[~np.isnan(non_members)]
    n, m = len(members), len(non_members)
    if not n or not m:
        return float("nan")
    ranks = rankdata(np.concatenate([members, non_members]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def attack_auc_interval(
    members: np.ndarray,
    non_members: np.ndarray,
    member_groups: np.ndarray | None = None,
    non_member_groups: np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``attack_auc``; members and non-members are resampled separately.

    Images of one patient are not independent: with groups, whole patients are resampled. Samples that have no score
    (NaN: no known finding) are left out, and with them a patient who has no other.

    Args:
        members: scores of the forget samples.
        non_members: scores of samples never trained or tuned on.
        member_groups: patient of each forget sample.
        non_member_groups: patient of each other sample.
        level: coverage, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        Lower and upper end; NaN if there are fewer than two samples or patients on either side.
    """
    known, others_known = ~np.isnan(members), ~np.isnan(non_members)
    members, non_members = members[known], non_members[others_known]
    member_groups = None if member_groups is None else np.asarray(member_groups)[known]
    non_member_groups = None if non_member_groups is None else np.asarray(non_member_groups)[others_known]
    values, place = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    generator = np.random.default_rng(seed)
    sides = []
    for scores, groups, places in (
        (members, member_groups, place[: len(members)]),
        (non_members, non_member_groups, place[len(members) :]),
    ):
        _, group = np.unique(np.arange(len(scores)) if groups is None else groups, return_inverse=True)
        if len(scores) == 0 or group.max() < 1:
            return float("nan"), float("nan")
        sides.append((group, places))
    aucs = np.empty(resamples)
    for i in range(resamples):
        counts = []
        for group, places in sides:
            size = group.max() + 1
            weight = np.bincount(generator.integers(size, size=size), minlength=size)[group]
            counts.append(np.bincount(places, weights=weight, minlength=len(values)))
        below = np.cumsum(counts[1]) - counts[1] / 2
        aucs[i] = (counts[0] * below).sum() / (counts[0].sum() * counts[1].sum())
    low, high = np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def detectable_difference(n: int, m: int) -> float:
    """Difference of a population attack's AUC from ½ that n members and m non-members can just show at 95 %.

    1.96 times the standard error of the AUC when the scores of both come from one distribution,
    √((n + m + 1) / (12 n m)). Samples have to be independent: where images belong to patients, their numbers of
    patients are the ones to take.

    Args:
        n: number of members.
        m: number of non-members.

    Returns:
        A positive number, above ½ where not even perfect separation would show; NaN if either is 0.

    References:
        Mann and Whitney, On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other,
        Ann. Math. Statist. 18 (1947).
    """
    if not n or not m:
        return float("nan")
    return 1.96 * float(np.sqrt((n + m + 1) / (12 * n * m)))
