"""ℓ1-sparse unlearning: fine-tuning that also shrinks all weights towards 0 (Jia et al., 2023; arXiv:2304.04934)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch.utils.data import DataLoader

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    plain_network,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
    unwrapped_handlers,
)

__all__ = ["L1Sparse", "decayed", "l1_norm"]


def l1_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """‖θ‖₁: the sum of the absolute values of all entries.

    Args:
        parameters: tensors of any shapes, at least one. Half precision is summed up in float32.

    Returns:
        Scalar tensor. Its gradient is the sign of each entry, and 0 at 0.

    Raises:
        ValueError: if there is none.
    """
    sizes = [parameter.abs() for parameter in parameters]
    if not sizes:
        raise ValueError("parameters should hold at least one tensor, but there is none.")
    # Not a copy in float32: the sum alone needs its range and precision.
    return torch.stack([size.sum(dtype=torch.promote_types(size.dtype, torch.float32)) for size in sizes]).sum()


def decayed(alpha: float, epoch: int, epochs: int) -> float:
    """γ = α · (1 − (epoch − 1) / epochs): α in the first epoch, α / epochs in the last.

    Args:
        alpha: weight of the penalty in the first epoch.
        epoch: counted from 1, at most ``epochs``.
        epochs: how many there are.

    Raises:
        ValueError: if ``epoch`` is not in [1, ``epochs``].
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch should lie in [1, {epochs}], but got {epoch!r}.")
    return alpha * (1 - (epoch - 1) / epochs)


class L1Sparse:
    """Train on the retain set with a penalty on the absolute values of all weights, which fades out.

    minimise CE over the retain set + γ_t ‖θ‖₁, γ_t = α (1 − t / T), from the original's weights on. T is the trainer's
    number of epochs, and t counts those that are completed: 0 in the first epoch, where γ = α, and T − 1 in the last,
    where γ = α / T. θ are all parameters that require a gradient, biases and those of normalisation layers too. What
    the network knew of single samples sits in many small weights, which the penalty takes away.

    With ``retain=False`` it adds the penalty and nothing else, so that it goes with another method that takes gradient
    steps: ``RandomLabeling``, ``NegGradPlus``. By itself it then trains on forget samples too.

    Runs on ``STARTED``, where a loader of retain samples takes the place of the trainer's (``retain=True``), on
    ``LOSS_COMPLETED``, where the penalty is added to the loss, which is also the one that is logged, and on
    ``BACKWARD_COMPLETED``, where it has to have reached the weights. With gradient
    accumulation the trainer takes the mean over the steps that it puts together, so the penalty counts once.

    Args:
        forget: the forget set.
        alpha: α, at least 0. With 0 this is fine-tuning, to the bit.
        retain: whether the run goes over retain samples alone; False leaves the trainer's loader to another method.
        loader: retain samples only; by default made from the trainer's own loader. Not with ``retain=False``.

    Raises:
        ValueError: if ``alpha`` is negative or not finite, a loader is given that would not be used, or forget or
            retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` or a method that changes the loss stands after it, or the penalty does
            not reach the weights, since another handler has put another loss in its place.

    References:
        Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv:2304.04934. As in the public
        code, the penalty is on all parameters and falls by epoch; its warm-up of the rate and its epochs without
        penalty are left out.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[L1Sparse(forget), BatchNormPolicy(forget)])
        trainer = SupervisedTrainer(..., train_handlers=[RandomLabeling(forget), L1Sparse(forget, retain=False)])
    """

    def __init__(
        self, forget: ForgetSet, *, alpha: float = 1e-4, retain: bool = True, loader: DataLoader | None = None
    ) -> None:
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha should be a number of at least 0, but got {alpha!r}.")
        if not isinstance(retain, bool):
            raise ValueError(f"retain should be true or false, but got {retain!r}.")
        if loader is not None and not retain:
            raise ValueError("loader should be None with retain=False, which leaves the loader to another method.")
        self.forget = forget
        self.alpha = alpha
        self.retain = retain
        self.loader = loader
        self._missing = False  # whether the penalty of this step has not had its part in the backward pass yet

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add_penalty)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check_penalty)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._missing = False
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        self._require_final_loss(engine)
        if self.retain:
            train_on_retain(engine, self.forget, self.loader)
        else:
            self.forget.check(engine.data_loader)

    def _require_final_loss(self, engine: SupervisedTrainer) -> None:
        """Refuse a place before a method that would turn the penalty round, scale it or drop it with the loss."""
        handlers = unwrapped_handlers(engine, IterationEvents.LOSS_COMPLETED)
        for later in handlers[handlers.index(self) + 1 :]:
            if (getattr(later, "__module__", None) or "").startswith("monai_unlearn.methods."):
                name = getattr(later, "__qualname__", type(later).__name__).split(".")[0]
                raise RuntimeError(
                    f"L1Sparse stands before {name}, which would change the penalty with the loss. Put it after "
                    f"{name} in train_handlers."
                )

    def _add_penalty(self, engine: SupervisedTrainer) -> None:
        weight = decayed(self.alpha, engine.state.epoch, int(engine.state.max_epochs or 0))
        if weight:  # 0 · ‖θ‖₁ would be no part of fine-tuning: its gradients are zeros, and NaN where a weight is
            trained = (parameter for parameter in plain_network(engine).parameters() if parameter.requires_grad)
            norm = l1_norm(trained)
            self._missing = True
            norm.register_hook(self._reached)
            engine.state.output[CommonKeys.LOSS] = engine.state.output[CommonKeys.LOSS] + weight * norm

    def _reached(self, gradient: torch.Tensor) -> None:
        self._missing = False

    def _check_penalty(self, engine: SupervisedTrainer) -> None:
        if self._missing:
            raise RuntimeError(
                "The penalty of L1Sparse did not reach the weights: a handler that stands after it has put another "
                "loss in the place of the one with it. Put L1Sparse after that handler in train_handlers."
            )
