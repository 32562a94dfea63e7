"""Fine-tuning: go on training on the retain set alone, and let the network drift away from the forget set."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import require_loaded_weights, require_supervised_trainer, train_on_retain

__all__ = ["FineTune"]


class FineTune:
    """Go on training the original model on the retain set alone.

    minimise CE(f(x), y) over the retain set, from the original's weights on. Nothing works against what the network
    knows of the forget set but forgetting by itself.

    Runs on ``STARTED``: a loader of retain samples takes the place of the trainer's (same batch size, order and
    transforms). Everything else is the trainer's own.

    Args:
        forget: the forget set.
        loader: retain samples only; by default made from the trainer's own loader.

    Raises:
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        ValueError: if there is no retain sample, or they can't be found.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        A baseline of most papers, among them Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020,
        arXiv:1911.04933.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[FineTune(forget), BatchNormPolicy(forget)])
    """

    def __init__(self, forget: ForgetSet, *, loader: DataLoader | None = None) -> None:
        self.forget = forget
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        train_on_retain(engine, self.forget, self.loader)
