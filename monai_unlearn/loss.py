"""The loss of findings that are not all known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["MaskedBCEWithLogitsLoss"]


class MaskedBCEWithLogitsLoss(nn.Module):
    r"""Binary cross entropy with logits over the known findings of each sample.

    ℓ_i = 1 / |K_i| · Σ_{l ∈ K_i} BCE(z_il, y_il) with K_i the findings of sample i that are known, and 0 where none
    is. Each sample counts the same, however many of its findings are known; the loss of a batch is the mean, or sum,
    over *all* its samples, so that it is additive over samples whatever is masked.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the samples.
        pos_weight: weight of the positive part of each finding, L positive numbers, as in
            ``torch.nn.BCEWithLogitsLoss``.

    Raises:
        ValueError: if an argument is outside its range, shapes differ, or a label is outside [0, 1].

    Example::

        loss = MaskedBCEWithLogitsLoss()
        loss(torch.randn(2, 3), torch.tensor([[1.0, 0.0, torch.nan], [0.7, torch.nan, torch.nan]]))
    """

    pos_weight: torch.Tensor | None

    def __init__(self, reduction: str = "mean", pos_weight: Sequence[float] | torch.Tensor | None = None) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction should be mean or sum, but got {reduction!r}.")
        if pos_weight is not None:
            pos_weight = torch.as_tensor(pos_weight, dtype=torch.float32)
            if pos_weight.ndim != 1 or not bool(((pos_weight > 0) & pos_weight.isfinite()).all()):
                raise ValueError(
                    f"pos_weight should hold one positive number a finding, but got {pos_weight.tolist()!r}."
                )
        self.reduction = reduction
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch.

        Args:
            logits: shape B × L. Half precision is computed in float32.
            labels: shape B × L, in [0, 1]; NaN where a finding is not known.

        Returns:
            Scalar tensor.
        """
        if logits.ndim != 2 or labels.shape != logits.shape:
            raise ValueError(
                f"logits and labels should both be B × L, but got {tuple(logits.shape)} and {tuple(labels.shape)}. "
                "For one finding, L is 1."
            )
        if bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError("labels should lie in [0, 1], or be NaN where a finding is not known, but some do not.")
        if self.pos_weight is not None and len(self.pos_weight) != logits.shape[1]:
            raise ValueError(
                f"pos_weight should hold one number for each of the {logits.shape[1]} findings, "
                f"but holds {len(self.pos_weight)}."
            )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        known = ~labels.isnan()
        # Filled before, not after: a gradient of zero times NaN, or of a logit that overflowed, would be NaN.
        losses = functional.binary_cross_entropy_with_logits(
            logits.masked_fill(~known, 0),
            labels.masked_fill(~known, 0).to(logits.dtype),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(logits),
            reduction="none",
        )
        each = losses.masked_fill(~known, 0).sum(1) / known.sum(1).clamp(min=1)
        return each.sum() if self.reduction == "sum" else each.mean()
