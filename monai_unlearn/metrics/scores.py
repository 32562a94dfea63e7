"""What a model's output says of one sample: the scores that membership attacks go by."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["finding_log_odds", "log_odds", "modified_entropy", "probabilities", "sample_loss"]


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
    _check_classes(logits, labels)
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
    _check_findings(logits, labels)
    return ((2 * labels.double() - 1) * logits.double()).nanmean(1)


def modified_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mentr = −(1 − p_y) · log p_y − Σ_{i≠y} p_i · log(1 − p_i). Lower means: more likely a member.

    Entropy that counts certainty of a wrong class as uncertainty. Of a sample with several findings it is the mean
    over the known ones of each finding's own, as of two classes; a soft label of ½ is left out as not known.

    Args:
        logits: shape B × C, C ≥ 2; or B × L.
        labels: shape B, integer, in [0, C − 1]; or B × L in [0, 1], NaN where a finding is not known.

    Returns:
        Float64 tensor of shape B, at least 0; NaN where no finding is known.

    References:
        Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021,
        arXiv:2003.10595.
    """
    logits = logits.double()
    if labels.ndim == 2:
        _check_findings(logits, labels)
        truth = labels.double()
        sign = torch.where(truth > 0.5, 1.0, -1.0)
        right = functional.logsigmoid(sign * logits)  # log p of the true answer
        wrong = torch.sigmoid(-sign * logits)
        entropy = -2 * wrong * right
        return entropy.masked_fill(truth.isnan() | (truth == 0.5), torch.nan).nanmean(1)
    _check_classes(logits, labels)
    logits = logits - logits.amax(1, keepdim=True)
    log_p = logits.log_softmax(1)
    log_rest = torch.log1p(-log_p.exp().clamp(max=0.5))
    # log(1 − p_i) = logsumexp_{c≠i} z_c − logsumexp z. Summed over the others where p_i is the largest: 1 − p_i and
    # log p_i would round to 0 there.
    top = logits.argmax(1, keepdim=True)
    rest_of_top = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
    log_rest = log_rest.scatter(1, top, rest_of_top)
    log_p = log_p.scatter(1, top, torch.log1p(-rest_of_top.exp()))
    column = labels.long()[:, None]
    true = log_rest.gather(1, column).exp() * log_p.gather(1, column)
    others = (log_p.exp() * log_rest).scatter(1, column, 0).sum(1)
    return -true[:, 0] - others


def sample_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each sample in nats, −log p_y. Lower means: more likely a member.

    Computed from the log-odds, so that it does not round to 0 where p_y rounds to 1. Of a sample with several findings
    it is the mean binary cross entropy over the known ones.

    Args:
        logits: shape B × C, C ≥ 2; or B × L.
        labels: shape B, integer, in [0, C − 1]; or B × L in [0, 1], NaN where a finding is not known.

    Returns:
        Float64 tensor of shape B; NaN where no finding is known.

    References:
        Yeom et al., Privacy Risk in Machine Learning, CSF 2018, arXiv:1709.01604.
    """
    if labels.ndim == 2:
        _check_findings(logits, labels)
        logits, truth = logits.double(), labels.double()
        # PyTorch's own rounds to 0 where a finding is absent and its logit far below 0.
        losses = -truth * functional.logsigmoid(logits) - (1 - truth) * functional.logsigmoid(-logits)
        return losses.nanmean(1)
    return -functional.logsigmoid(log_odds(logits, labels))


def probabilities(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """Probability of each class, or of each finding, in float64.

    Args:
        logits: shape B × C, or B × L.
        multi_label: whether the columns are findings.
    """
    return logits.double().sigmoid() if multi_label else logits.double().softmax(1)


def _check_classes(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits should be B × C with C ≥ 2 and labels B, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )


def _check_findings(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(
            f"logits and labels should both be B × L, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
