"""Convolution transpose: swap the axes of every convolution kernel, and train on the retain set (arXiv:2410.01276)."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    plain_network,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
)
from monai_unlearn.methods._weights import convolution_weights

__all__ = ["ConvTranspose", "transposed"]


def transposed(kernel: torch.Tensor) -> torch.Tensor:
    """A convolution kernel with its last two spatial axes swapped; twice that is the kernel itself.

    Args:
        kernel: shape out × in × … × K × K, with two or more spatial axes. In 3-D (out × in × D × K × K) the first
            spatial axis stays.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: if there are fewer than two spatial axes, or the last two differ in size.
    """
    _check(kernel)
    return kernel.transpose(-1, -2).clone()


def _check(kernel: torch.Tensor) -> None:
    """Refuse a kernel whose last two axes can't be swapped."""
    if kernel.ndim < 4 or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"A kernel should have two or more spatial axes, the last two of one size, but got {tuple(kernel.shape)}. "
            "Use another method for this network: WeightNoise, say."
        )


class ConvTranspose:
    """Swap the last two spatial axes of every convolution kernel, then train on the retain set alone.

    w[…, i, j] ← w[…, j, i]. Each layer's weights are the same numbers in another place: features of single samples are
    lost, and training on the retain set brings back what the task needs. There is nothing to set but the training.

    Runs on ``STARTED``: the weights are changed once, and a loader of retain samples takes the place of the trainer's
    (same batch size, order and transforms). Weights that require no gradient stay bit-identical.

    Args:
        forget: the forget set.
        loader: retain samples only; by default made from the trainer's own loader.

    Attributes:
        cost: what the change of the weights cost.

    Raises:
        ValueError: if a kernel has fewer than two spatial axes or is not square in the last two, or retain samples
            can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or the network has no convolution to train that is
            larger than 1 × 1.

    References:
        Cadet et al., Deep Unlearn: Benchmarking Machine Unlearning for Image Classification, 2024, arXiv:2410.01276:
        the fifth place of the NeurIPS 2023 unlearning challenge. Differs from the public code: parameters stay the
        same objects, so that an optimizer that is there already trains them.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[ConvTranspose(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(self, forget: ForgetSet, *, loader: DataLoader | None = None) -> None:
        self.forget = forget
        self.loader = loader
        self.cost = Cost()

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        self.cost = Cost()
        train_on_retain(engine, self.forget, self.loader)  # before any weight is changed, so that an error changes none
        with seconds_of(self.cost, engine.state.device):
            self._swap(plain_network(engine))

    @torch.no_grad()
    def _swap(self, network: torch.nn.Module) -> None:
        found = convolution_weights(network)
        for name, kernel in found.items():  # all of them before any is changed, so that an error changes none
            try:
                _check(kernel)
            except ValueError as error:
                raise ValueError(f"ConvTranspose can't change {name}. {error}") from None
        if all(kernel.shape[-1] == 1 for kernel in found.values()):
            raise RuntimeError(
                "ConvTranspose needs a convolution kernel larger than 1 × 1 that requires a gradient, but the network "
                "has none, so nothing would change. Use another method for this network: WeightNoise, say."
            )
        for kernel in found.values():
            kernel.copy_(transposed(kernel))
