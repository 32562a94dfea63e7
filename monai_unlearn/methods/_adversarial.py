"""Steps of an image that raise its loss, and answers that are wrong: what methods with adversarial examples share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["input_gradients", "value_range", "within_range", "wrong_class"]

Classify = Callable[[torch.Tensor], torch.Tensor]


def input_gradients(
    classify: Classify, images: torch.Tensor, labels: torch.Tensor, findings: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of each sample's own cross entropy by its image, with no trace in ``.grad``.

    Args:
        classify: images → logits, B × C; no sample's outputs may depend on another sample.
        images: shape B × ….
        labels: class indices, shape B; with ``findings`` labels in [0, 1], shape B × C, NaN where one is not known.
        findings: whether each logit is a finding of its own, whose binary cross entropies add up.

    Returns:
        The gradient, of the images' shape, and the logits.
    """
    with torch.enable_grad():
        moved = images.detach().clone().requires_grad_()
        logits = classify(moved)
        if findings:
            known = ~labels.isnan()
            loss = functional.binary_cross_entropy_with_logits(
                logits.masked_fill(~known, 0), labels.masked_fill(~known, 0).to(logits.dtype), reduction="sum"
            )
        else:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
    return gradient, logits.detach()


def value_range(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each image, of shape B × 1 × …."""
    low, high = images.reshape(len(images), -1).aminmax(dim=1)
    shape = (-1, *[1] * (images.ndim - 1))
    return low.view(shape), high.view(shape)


def within_range(moved: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Cut what has left the range of values that each image itself has.

    Args:
        moved: shape B × ….
        images: what they came from, of the same shape.
    """
    low, high = value_range(images)
    return moved.clamp(low, high)


def wrong_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The most probable class but the true one.

    Args:
        logits: shape B × C, at least two classes.
        labels: true classes, shape B.
    """
    return logits.scatter(1, labels[:, None], float("-inf")).argmax(1)
