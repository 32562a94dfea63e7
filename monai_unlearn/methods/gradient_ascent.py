"""Gradient ascent: raise the loss of the forget set, and look at nothing else."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch.utils.data import DataLoader

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import forget_batches, require_loaded_weights, require_supervised_trainer, train_on

__all__ = ["GradientAscent"]


class GradientAscent:
    """Raise the loss of the forget set by gradient steps.

    minimise −CE(f(x), y) over the forget set. The loss has no lower end: rate and number of epochs alone decide where
    it stops, and no retain sample is looked at.

    Runs on ``STARTED``, where a loader of forget samples takes the place of the trainer's (same batch size and
    transforms, shuffled if that was), and on ``LOSS_COMPLETED``, where the loss is negated.

    Args:
        forget: the forget set.
        loader: forget samples only; by default made from the trainer's own loader.

    Raises:
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        ValueError: if the forget samples can't be found.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        Graves et al., Amnesiac Machine Learning, AAAI 2021, arXiv:2010.10981; Thudi et al., Unrolling SGD, EuroS&P
        2022, arXiv:2109.13398.

    Example::

        trainer = SupervisedTrainer(..., max_epochs=5, train_handlers=[GradientAscent(forget), BatchNormPolicy(forget)])
    """

    def __init__(self, forget: ForgetSet, *, loader: DataLoader | None = None) -> None:
        self.forget = forget
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._negate)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        train_on(engine, forget_batches(engine, self.forget, self.loader), "forget")

    @staticmethod
    def _negate(engine: SupervisedTrainer) -> None:
        engine.state.output[CommonKeys.LOSS] = -engine.state.output[CommonKeys.LOSS]
