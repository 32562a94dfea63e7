"""Weight noise: disturb every kernel by noise of its own size, and train on the retain set."""

from __future__ import annotations

import math

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
from monai_unlearn.methods._weights import kernels

__all__ = ["WeightNoise", "disturb", "noisy"]


def noisy(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Weight + scale · (the weight's own standard deviation) · ε, with ε ~ N(0, 1) for each entry.

    Args:
        weight: a kernel of any shape.
        scale: size of the noise, at least 0.
        generator: CPU generator of the draw, which is made in float32 whatever the weight's type and device.

    Returns:
        A new tensor of the same shape, type and device. The standard deviation is that of the entries as they are (over
        n, not n − 1), so a kernel of one entry, or of equal ones, stays as it is.
    """
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    return noise.mul_(scale * weight.std(correction=0)).add_(weight)


@torch.no_grad()
def disturb(network: torch.nn.Module, scale: float, seed: int, who: str) -> None:
    """Add noise to every kernel of a network, see ``noisy``.

    Args:
        network: the network.
        scale: size of the noise, at least 0.
        seed: seed of the draws, which are made kernel by kernel in the order of their names.
        who: the method, for the error.

    Raises:
        RuntimeError: if the network has no kernel that requires a gradient.
    """
    found = kernels(network)
    if not found:
        raise RuntimeError(
            f"{who} needs a weight of two or more dimensions that requires a gradient, but the network has none. Let "
            "its weights require a gradient."
        )
    generator = torch.Generator().manual_seed(seed)
    for kernel in found.values():
        kernel.copy_(noisy(kernel, scale, generator))


class WeightNoise:
    """Add noise to every kernel, as large as the kernel's own spread, then train on the retain set alone.

    θ_k += scale · std(θ_k) · ε, ε ~ N(0, 1), for each kernel θ_k: a weight of two or more dimensions. Biases and
    normalisation layers stay. What the network knows of single samples is lost with it; what it knows of the task,
    training on the retain set brings back.

    Runs on ``STARTED``: the weights are changed once, and a loader of retain samples takes the place of the trainer's
    (same batch size, order and transforms). Weights that require no gradient stay bit-identical.

    Args:
        forget: the forget set.
        scale: standard deviation of the noise in units of each kernel's own, at least 0. With 0 this is fine-tuning.
        seed: seed of the noise. It is drawn on the CPU, kernel by kernel in the order of their names, so that a seed
            gives the same on every device.
        loader: retain samples only; by default made from the trainer's own loader.

    Attributes:
        cost: what the change of the weights cost.

    Raises:
        ValueError: if ``scale`` is negative or not finite, or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or the network has no kernel to train.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[WeightNoise(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self, forget: ForgetSet, *, scale: float = 1.0, seed: int = 0, loader: DataLoader | None = None
    ) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale should be a number of at least 0, but got {scale!r}.")
        self.forget = forget
        self.scale = scale
        self.seed = seed
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
            disturb(plain_network(engine), self.scale, self.seed, type(self).__name__)
