"""Random labeling: forget samples are trained on wrong labels (Golatkar et al., 2020; arXiv:1911.04933)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys
from torch import nn

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods._trainer import evaluation_mode, predict, require_loaded_weights, require_supervised_trainer

__all__ = ["RandomLabeling", "other_findings", "other_labels"]

# Losses for which each output is a question of its own, so that labels of shape B × L are no one-hot vectors.
BINARY = (nn.BCEWithLogitsLoss, nn.BCELoss, MaskedBCEWithLogitsLoss)


def other_labels(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """Draw for each label another one, uniformly among the ``num_classes - 1`` others.

    Args:
        labels: true classes of any shape, integer-valued, in [0, num_classes - 1].
        num_classes: number of classes, at least 2. With two, the draw is a flip.
        generator: CPU generator of the draw.

    Returns:
        Labels of the same shape, type and device, none equal to the true one.

    Raises:
        ValueError: if there are fewer than two classes, or a label is not one of them.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes should be at least 2, but got {num_classes!r}.")
    if labels.numel():
        low, high = labels.aminmax()
        whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
        if not whole or low < 0 or high >= num_classes:
            raise ValueError(
                f"labels should be whole numbers in [0, {num_classes - 1}], but got [{low}, {high}]. "
                "One-hot and soft labels can't be redrawn."
            )
    step = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels)
    return (labels + step) % num_classes


def other_findings(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw for each vector of findings another one, by flipping (y → 1 − y) at least one of its findings.

    Each known finding is flipped with probability ½, independently, given that at least one is: for labels of 0 and 1
    the uniform distribution over the 2^k − 1 other vectors of the k known findings; with k = 1 a flip.

    Args:
        labels: true findings, shape N × L, in [0, 1]. A finding that is not known (NaN) stays so, and one of exactly
            ½ has no other label; a row without any other finding stays as it is.
        generator: CPU generator of the draw.

    Returns:
        Labels of the same shape, type and device.

    Raises:
        ValueError: if the labels have another shape, or one lies outside [0, 1].
    """
    if labels.ndim != 2:
        raise ValueError(f"labels should be N × L, one column a finding, but got {tuple(labels.shape)}.")
    if bool(((labels < 0) | (labels > 1)).any()):
        raise ValueError("labels should lie in [0, 1], or be NaN where a finding is not known, but some do not.")
    may_flip = (~labels.isnan() & (labels != 0.5)).cpu()
    flips = torch.randint(2, labels.shape, generator=generator).bool() & may_flip
    # A row in which no coin fell, which happens once in 2^k, takes the bits of a number in [1, 2^k − 1] instead. Of
    # more than 62 findings, for which it never happens, the first 62.
    rank = (may_flip.cumsum(1) - 1).clamp(0, 62)
    numbers = torch.tensor(2) ** may_flip.sum(1, keepdim=True).clamp(1, 62) - 1
    number = 1 + torch.randint(2**63 - 1, (len(labels), 1), generator=generator) % numbers
    flips = torch.where(flips.any(1, keepdim=True), flips, (number >> rank & 1).bool() & may_flip)
    return torch.where(flips.to(labels.device), (1 - labels.double()).to(labels.dtype), labels)


class RandomLabeling:
    r"""Train on a random wrong label for each forget sample, and on the true label for all others.

    minimise CE(f(x), y) over the retain set + CE(f(x), y′) over the forget set, y′ ~ U({1…C} \\ {y}), redrawn
    each time a sample is met, that is, each epoch. With two classes the label is flipped, the same in every epoch.

    With several findings a sample (multi-label), y′ is another vector of findings: each known finding is flipped with
    probability ½, given that at least one is. What is not known (NaN) stays unknown.

    Runs on ``STARTED``, ``ITERATION_STARTED`` (the batch is replaced, never changed in place, so caches stay as
    they are) and ``COMPLETED``.

    Args:
        forget: the forget set.
        num_classes: number of classes, at least 2; by default as many as the network has outputs (2 if it has
            one), found with one forward pass of the first batch's first sample. Not used for multi-label labels.
        label_key: key of the label in a batch: class indices of shape B or B × 1, or findings in [0, 1] of shape
            B × L (B or B × 1 for one finding).
        seed: seed of the draws.
        multi_label: whether labels are findings rather than class indices; by default they are where the trainer's
            loss is a ``BCEWithLogitsLoss``, ``BCELoss`` or ``MaskedBCEWithLogitsLoss``.

    Raises:
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        ValueError: if labels are neither class indices nor findings, or a part of the request is not in the training
            data.
        RuntimeError: if a run ends without having met a forget sample, or one whose label has another.

    References:
        Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020, arXiv:1911.04933.

    Example::

        forget = ForgetSet(["patient 7"], key="patient_id")
        trainer = SupervisedTrainer(..., train_handlers=[RandomLabeling(forget)])
    """

    def __init__(
        self,
        forget: ForgetSet,
        *,
        num_classes: int | None = None,
        label_key: str = CommonKeys.LABEL,
        seed: int = 0,
        multi_label: bool | None = None,
    ) -> None:
        if multi_label is not None and not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true, false or None, but got {multi_label!r}.")
        if num_classes is not None and num_classes < 2 and not multi_label:
            raise ValueError(f"num_classes should be at least 2, but got {num_classes!r}.")
        self.forget = forget
        self.num_classes = num_classes
        self.label_key = label_key
        self.seed = seed
        self.multi_label = multi_label
        self._generator = torch.Generator()
        self._classes: int | None = num_classes
        self._met = 0
        self._relabeled = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._relabel)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        self.forget.check(engine.data_loader)
        self._generator.manual_seed(self.seed)
        self._classes = self.num_classes
        self._met = 0
        self._relabeled = 0

    def _relabel(self, engine: SupervisedTrainer) -> None:
        batch = engine.state.batch
        is_forget = self.forget.mask(batch)
        if not is_forget.any():
            return
        labels = batch[self.label_key]
        findings = isinstance(engine.loss_function, BINARY) if self.multi_label is None else self.multi_label
        self._check(labels, len(is_forget), findings)
        rows = is_forget.to(labels.device)
        true = labels[rows]
        if findings:
            drawn = other_findings(true.reshape(len(true), -1), self._generator).reshape(true.shape)
        else:
            if self._classes is None:
                self._classes = self._count_classes(engine, batch)
            drawn = other_labels(true, self._classes, self._generator)
        relabeled = labels.clone()
        relabeled[rows] = drawn
        engine.state.batch = {**batch, self.label_key: relabeled}
        self._met += len(true)
        if findings:
            differs = (drawn != true) & ~drawn.isnan()
            self._relabeled += int(differs.reshape(len(true), -1).any(1).sum())
        else:  # another class each
            self._relabeled += len(true)

    def _check(self, labels: Any, size: int, findings: bool) -> None:
        """Refuse labels that are neither a class index nor a vector of findings for each sample."""
        shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
        one_a_row = isinstance(labels, torch.Tensor) and shape[:1] == (size,)
        if one_a_row and (labels.numel() == size or (findings and labels.ndim == 2)):
            return
        wanted = "findings, shape B × L" if findings else "one class index a sample, shape B or B × 1"
        raise ValueError(
            f"batch[{self.label_key!r}] should hold {wanted}, but got {shape} for {size} samples. If these are the "
            "findings of a multi-label task, pass multi_label=True to RandomLabeling and let labels be B × L; turn "
            "one-hot vectors into class indices."
        )

    def _complete(self, engine: Engine) -> None:
        if not self._met:
            raise RuntimeError(
                f"RandomLabeling met no forget sample in {engine.state.iteration} iterations, so nothing was "
                "unlearned. Check the forget set's key and that the loader holds its samples."
            )
        if not self._relabeled:
            raise RuntimeError(
                f"None of the {self._met} forget samples that RandomLabeling met has a finding that is known and not "
                "exactly 0.5, so nothing was unlearned. Check the labels."
            )

    @staticmethod
    def _count_classes(engine: SupervisedTrainer, batch: Mapping) -> int:
        first = {
            key: value[:1] if isinstance(value, (torch.Tensor, list, tuple)) else value for key, value in batch.items()
        }
        with torch.no_grad(), evaluation_mode(engine.network):
            return max(predict(engine, first)[0].shape[1], 2)
