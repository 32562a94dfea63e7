"""DELETE: the original without the true class teaches the forget set (Zhou et al., 2025; arXiv:2503.23751)."""

from __future__ import annotations

import copy

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    forget_batches,
    plain_network,
    predict,
    require_loaded_weights,
    require_supervised_trainer,
    train_on,
)
from monai_unlearn.methods.random_labeling import BINARY

__all__ = ["DELETE", "erasing_loss", "without_true_class"]

ONLY_CLASSES = (
    "It takes out the true one of at least two classes, and findings or a single output have no such class. Use a "
    "method that takes them, RandomLabeling or PerturbAndRecover, say."
)


def without_true_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Set the logit of each sample's true class to −∞: the softmax spreads its mass over the others in proportion.

    Args:
        logits: shape B × C, of at least two classes. Half precision is returned as float32.
        labels: true classes, whole numbers in [0, C − 1], shape B or B × 1.

    Returns:
        Logits of the same shape; those given stay as they are.

    Raises:
        ValueError: if the logits or labels are of another form.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.numel() != len(logits) or labels.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"DELETE needs outputs of shape B × C with at least two classes and one class index a sample, but got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. Turn one-hot vectors into class indices; findings and "
            "single outputs have no other class."
        )
    if labels.numel():
        low, high = labels.aminmax()
        whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
        if not whole or low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"labels should be whole numbers in [0, {logits.shape[1] - 1}], but got [{low}, {high}]. "
                "DELETE needs to know the true class of each forget sample."
            )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits.scatter(1, labels.reshape(-1, 1).long(), float("-inf"))


def erasing_loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of KL(softmax of the teacher's logits without the true class ‖ softmax of the student's).

    Args:
        student: logits, shape B × C. Half precision is computed in float32.
        teacher: logits, shape B × C.
        labels: true classes, as in ``without_true_class``.

    Returns:
        Scalar tensor, at least 0 but for rounding.

    Raises:
        ValueError: if shapes differ, or logits or labels are of another form.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher should both be B × C, but got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    target = without_true_class(teacher, labels).softmax(1)
    # With the target's logarithm, −∞ for the true class, it would be NaN.
    return functional.kl_div(student.to(target.dtype).log_softmax(1), target, reduction="batchmean")


class DELETE:
    """Teach the forget set by the original's own outputs, from which the true class has been taken out.

    Of the frozen original t with logits z, and the network f:

    minimise KL(softmax(z(x) with −∞ for the class y) ‖ f(x)) over the forget set.

    So the true class loses all its mass, and the others keep the proportions in which the original saw them. No retain
    sample is looked at. With two classes the target is the other class: then it is relabelling.

    Runs on ``STARTED`` (the teacher is copied, a loader of forget samples takes the place of the trainer's: same batch
    size and transforms, shuffled if that was), ``LOSS_COMPLETED`` (the teacher's pass, within the step's mixed
    precision) and ``COMPLETED``.

    Args:
        forget: the forget set, whose labels are class indices of shape B or B × 1.
        multi_label: whether the outputs are findings, or a single one. They are refused here, which tells a bundle so
            before anything is trained; where the loss or the outputs show it, they are refused later.
        loader: forget samples only; by default made from the trainer's own loader.

    Attributes:
        cost: samples and passes of the teacher; their time is that of the steps.

    Raises:
        ValueError: if outputs are findings or a single one, labels are no class indices, or the forget samples can't be
            found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        Zhou et al., Decoupled Distillation to Erase: A General Unlearning Method for Any Class-centric Tasks, CVPR
        2025, arXiv:2503.23751.

    Differs from the public code, which writes −1e10 for −∞, with the same effect in float32.

    Example::

        trainer = SupervisedTrainer(..., max_epochs=20, train_handlers=[DELETE(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(self, forget: ForgetSet, *, multi_label: bool = False, loader: DataLoader | None = None) -> None:
        if not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true or false, but got {multi_label!r}.")
        if multi_label:
            raise ValueError(f"multi_label should be false with DELETE, but got True. {ONLY_CLASSES}")
        self.forget = forget
        self.loader = loader
        self.cost = Cost()
        self._teacher: nn.Module | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._replace_loss)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._teacher = None
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        if isinstance(engine.loss_function, BINARY):
            raise ValueError(
                f"The loss should be one of classes with DELETE, but is {type(engine.loss_function).__name__}. "
                f"{ONLY_CLASSES}"
            )
        train_on(engine, forget_batches(engine, self.forget, self.loader), "forget")
        self._teacher = copy.deepcopy(plain_network(engine)).eval().requires_grad_(False)

    def _replace_loss(self, engine: SupervisedTrainer) -> None:
        with torch.no_grad():
            teacher, labels = predict(engine, engine.state.batch, self._teacher)
        output = engine.state.output
        output[CommonKeys.LOSS] = erasing_loss(output[CommonKeys.PRED], teacher, labels)
        self.cost.samples += len(teacher)
        self.cost.forward += len(teacher)

    def _complete(self, engine: Engine) -> None:
        self._teacher = None
