"""NegGrad+: descend on the retain set, ascend on the forget set, at once (Kurmanji et al., 2023; arXiv:2302.09880)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    cycle,
    forget_batches,
    predict,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
)

__all__ = ["NegGradPlus", "weighted_difference"]


def weighted_difference(retain_loss: torch.Tensor, forget_loss: torch.Tensor, alpha: float) -> torch.Tensor:
    """α · retain loss − (1 − α) · forget loss.

    Args:
        retain_loss: mean loss of a batch of retain samples, scalar.
        forget_loss: mean loss of a batch of forget samples, scalar.
        alpha: weight of the retain set, in [0, 1].
    """
    return alpha * retain_loss - (1 - alpha) * forget_loss


class NegGradPlus:
    """Lower the loss of the retain set and raise that of the forget set, in the same step.

    minimise α · CE over the retain set − (1 − α) · CE over the forget set. A step takes a batch of either; an epoch is
    one pass over the retain set, in which the forget set comes round as often as it takes.

    Runs on ``STARTED``, where a loader of retain samples takes the place of the trainer's, on ``LOSS_COMPLETED``, where
    the forget batch goes through the network (in training mode, within the step's mixed precision) and its loss is
    taken off, and on ``COMPLETED``.

    Args:
        forget: the forget set.
        alpha: weight of the retain set, in [0, 1]. With 1 no forget sample is looked at, which is fine-tuning.
        loader: retain samples only; by default made from the trainer's own loader.
        forget_loader: forget samples only; by default made from the trainer's own loader (same batch size and
            transforms, shuffled if that was).

    Attributes:
        cost: samples and passes of the forget batches; their time is that of the steps.

    Raises:
        ValueError: if ``alpha`` is outside its range, or forget or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv:2302.09880.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[NegGradPlus(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        alpha: float = 0.95,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha should lie in [0, 1], but got {alpha!r}.")
        self.forget = forget
        self.alpha = alpha
        self.loader = loader
        self.forget_loader = forget_loader
        self.cost = Cost()
        self._batches: Iterator[Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._take_off)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._batches = None
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        train_on_retain(engine, self.forget, self.loader)
        if self.alpha < 1:
            self._batches = cycle(forget_batches(engine, self.forget, self.forget_loader))

    def _take_off(self, engine: SupervisedTrainer) -> None:
        if self._batches is None:
            return
        prediction, target = predict(engine, next(self._batches))
        forget_loss = engine.loss_function(prediction, target).mean()
        output = engine.state.output
        output[CommonKeys.LOSS] = weighted_difference(output[CommonKeys.LOSS], forget_loss, self.alpha)
        self.cost.samples += len(prediction)
        self.cost.forward += len(prediction)
        self.cost.backward += len(prediction)

    def _complete(self, engine: Engine) -> None:
        self._batches = None
