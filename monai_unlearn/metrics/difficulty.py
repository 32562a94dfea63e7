"""How hard a sample is for a model that is already trained."""

from __future__ import annotations

import torch

__all__ = ["el2n"]


def el2n(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Norm of a sample's error vector: ‖softmax(z) − one-hot(y)‖₂. Higher is harder.

    Of a multi-label task it is the root mean square of σ(z) − y over the known findings, so that samples with few known
    findings are not easier for that alone.

    Args:
        logits: shape B × C.
        labels: shape B, integer, in [0, C − 1]; or B × L in [0, 1], NaN where a finding is not known.

    Returns:
        Float64 tensor of shape B, in [0, √2] (multi-label: [0, 1]); NaN where no finding is known.

    References:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, arXiv:2107.07075. There it is averaged over several
        networks early in training; here it is that of one network as it is.
    """
    logits = logits.double()
    if labels.ndim == 2:
        if labels.shape != logits.shape:
            raise ValueError(
                f"logits and labels should have one shape, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        return (logits.sigmoid() - labels.double()).square().nanmean(1).sqrt()
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits should be B × C and labels B, but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    return (logits.softmax(1) - torch.nn.functional.one_hot(labels.long(), logits.shape[1])).norm(dim=1)
