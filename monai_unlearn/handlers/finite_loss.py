"""A loss that is no number is an error, at once."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

__all__ = ["FiniteLoss"]


class FiniteLoss:
    """Raise as soon as a training loss is NaN or infinite, before the step that would spread it.

    Runs on ``LOSS_COMPLETED``.

    Raises:
        FloatingPointError: at the first loss that is not finite.
    """

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._check)

    @staticmethod
    def _check(engine: SupervisedTrainer) -> None:
        loss = engine.state.output[CommonKeys.LOSS]
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(
                f"The loss should be finite, but is {loss.detach().mean().item()} in iteration "
                f"{engine.state.iteration} (epoch {engine.state.epoch}). Lower the learning rate, and check the "
                "images for NaN. Nothing was written."
            )
