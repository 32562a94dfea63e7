"""Boundary shrink: forget samples are trained on the nearest wrong class (Chen et al., 2023; arXiv:2303.11570)."""

from __future__ import annotations

import copy
import logging

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._adversarial import input_gradients, value_range, within_range, wrong_class
from monai_unlearn.methods._trainer import (
    forget_batches,
    plain_network,
    prepare,
    require_loaded_weights,
    require_logits,
    require_supervised_trainer,
    train_on,
)
from monai_unlearn.methods.scrub import are_findings

__all__ = ["BoundaryShrink", "signed_step", "wrong_findings"]

logger = logging.getLogger("monai_unlearn")


def signed_step(images: torch.Tensor, gradients: torch.Tensor, bound: float) -> torch.Tensor:
    """Move each value of an image by an equal amount, up or down as its gradient says (FGSM).

    Args:
        images: shape B × ….
        gradients: of the images' shape.
        bound: the amount, in [0, 1], as a share of the range from the least to the largest value of the image.

    Returns:
        Images of the same shape, each within its own range of values.
    """
    low, high = value_range(images)
    return within_range(images + bound * (high - low) * gradients.sign(), images)


def wrong_findings(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The most probable vector of findings but the true one: its labels flipped (y → 1 − y) in at least one place.

    As the findings are independent given their logits, that is the vector of all answers where one of them is wrong,
    and else the true one with that answer flipped which is the least certain.

    Args:
        logits: shape B × L.
        labels: true findings, shape B × L, in [0, 1]; a finding is there where its label is above ½. One that is not
            known (NaN) stays so, and one of exactly ½ has no other label; a row without any other stays as it is.

    Returns:
        Labels of the same shape and type.
    """
    may_flip = ~labels.isnan() & (labels != 0.5)
    wrong = ((logits > 0) != (labels > 0.5)) & may_flip
    least_certain = logits.abs().masked_fill(~may_flip, float("inf")).argmin(1, keepdim=True)
    only = torch.zeros_like(may_flip).scatter(1, least_certain, True) & may_flip
    flips = torch.where(wrong.any(1, keepdim=True), wrong, only)
    return torch.where(flips, 1 - labels, labels)


class BoundaryShrink:
    """Train forget samples, and nothing else, on the wrong class whose boundary is nearest.

    minimise CE(f(x), y′) over the forget set, y′ the most probable class other than y that the frozen original sees in
    x + ε · sign(∇ₓ CE(f_o(x), y)), so that the boundary moves across the sample towards its own class, which shrinks.
    With two classes or one output the label is flipped, whatever the step. With several findings a sample, y′ is the
    most probable vector of findings other than the true one; what is not known (NaN) stays unknown.

    Runs on ``STARTED`` (the original is copied, and a loader of forget samples takes the place of the trainer's: same
    batch size and transforms, shuffled if that was), ``LOSS_COMPLETED`` (the original's passes in evaluation mode and
    full precision, and the loss by the wrong labels in the place of that by the true ones) and ``COMPLETED``.

    Args:
        forget: the forget set.
        bound: ε, in [0, 1], as a share of the range from the least to the largest value of the image, which no value
            leaves: the same for images in [0, 1], [-1, 1] or of unit variance. With 0, y′ is the wrong class that is
            the most probable in x itself.
        multi_label: whether the network's outputs are findings, each a question of its own, rather than classes; by
            default they are where the trainer's loss is a ``BCEWithLogitsLoss`` or ``MaskedBCEWithLogitsLoss``, or
            there is one output.
        loader: forget samples only; by default made from the trainer's own loader.

    Attributes:
        cost: samples and passes of the original; their time is that of the steps.

    Raises:
        ValueError: if an argument is outside its range, the forget samples can't be found, or outputs or labels are of
            another form.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, or its loss takes probabilities.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or a run ends without a forget sample whose label has
            another.

    References:
        Chen et al., Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary, CVPR
        2023, arXiv:2303.11570.

    Differs from the public code, where y′ is the most probable class, the true one too: a forget sample whose step
    crosses no boundary is trained on its true label there. It clips to [0, 1] and rounds to 255ths, which is wrong for
    images in any other range.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[BoundaryShrink(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        bound: float = 0.1,
        multi_label: bool | None = None,
        loader: DataLoader | None = None,
    ) -> None:
        if not 0 <= bound <= 1:
            raise ValueError(
                f"bound should lie in [0, 1], but got {bound!r}. It is a share of the range of an image's values."
            )
        if multi_label is not None and not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true, false or None, but got {multi_label!r}.")
        self.forget = forget
        self.bound = bound
        self.multi_label = multi_label
        self.loader = loader
        self._clear()

    def _clear(self) -> None:
        self.cost = Cost()
        self._original: nn.Module | None = None
        self._met = self._relabeled = self._crossed = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._replace_loss)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._clear()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_logits(engine, self)
        train_on(engine, forget_batches(engine, self.forget, self.loader), "forget")
        self._original = copy.deepcopy(plain_network(engine)).eval().requires_grad_(False)

    def _replace_loss(self, engine: SupervisedTrainer) -> None:
        if self._original is None:
            return
        output = engine.state.output
        prediction, target = output[CommonKeys.PRED], output[CommonKeys.LABEL]
        findings = are_findings(engine, prediction, self.multi_label)
        _check(prediction, target, findings)
        wrong = self._wrong_labels(engine, self._original, findings)
        output[CommonKeys.LOSS] = engine.loss_function(prediction, wrong.reshape(target.shape).to(target.dtype)).mean()

    def _wrong_labels(self, engine: SupervisedTrainer, original: nn.Module, findings: bool) -> torch.Tensor:
        """The labels to train on, of the batch of this step."""
        images, target, args, kwargs = prepare(engine, engine.state.batch)
        images = images.as_tensor() if isinstance(images, MetaTensor) else images
        target = target.as_tensor() if isinstance(target, MetaTensor) else target

        def classify(moved: torch.Tensor) -> torch.Tensor:
            return engine.inferer(moved, original, *args, **kwargs)

        # In half precision the gradient of a sample that the original is sure of would be 0.
        with torch.autocast(images.device.type, enabled=False):
            labels = target.reshape(len(images), -1) if findings else target.reshape(-1).long()
            gradients, _ = input_gradients(classify, images, labels, findings)
            with torch.no_grad():
                logits = classify(signed_step(images, gradients, self.bound))
        wrong = wrong_findings(logits, labels) if findings else wrong_class(logits, labels)
        self.cost.samples += len(images)
        self.cost.forward += 2 * len(images)
        self.cost.backward += len(images)
        self._met += len(images)
        if findings:
            self._relabeled += int(((wrong != labels) & ~labels.isnan()).any(1).sum())
            self._crossed += int((((logits > 0) != (labels > 0.5)) & ~labels.isnan()).any(1).sum())
        else:  # another class each
            self._relabeled += len(images)
            self._crossed += int((logits.argmax(1) != labels).sum())
        return wrong

    def _complete(self, engine: Engine) -> None:
        met, relabeled, crossed = self._met, self._relabeled, self._crossed
        self._original = None
        if not relabeled:
            raise RuntimeError(
                f"None of the {met} forget samples that BoundaryShrink met has a finding that is known and not exactly "
                "0.5, so nothing was unlearned. Check the labels."
            )
        logger.info("Boundary shrink: the step crossed a boundary for %.0f %% of the samples", 100 * crossed / met)


def _check(prediction: torch.Tensor, target: torch.Tensor, findings: bool) -> None:
    """Refuse outputs and labels that are neither classes nor findings."""
    if findings:
        fits = prediction.ndim == 2 and target.numel() == prediction.numel()
        fits = fits and not bool(((target < 0) | (target > 1)).any())
    else:
        fits = prediction.ndim == 2 and prediction.shape[1] > 1 and target.numel() == len(prediction)
        fits = fits and bool(((target >= 0) & (target < prediction.shape[1]) & (target == target.long())).all())
    if fits:
        return
    wanted = "findings in [0, 1], as many as outputs" if findings else "one class index a sample"
    raise ValueError(
        f"BoundaryShrink needs outputs of shape B × C and labels that are {wanted}, but got {tuple(prediction.shape)} "
        f"and labels of shape {tuple(target.shape)}. If these are the findings of a multi-label task, pass "
        "multi_label=True."
    )
