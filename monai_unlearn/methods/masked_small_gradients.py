"""Masked small gradients: draw the convolution weights with the smallest gradient anew (MSG; arXiv:2410.01276)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn, optim
from torch.utils.data import DataLoader, Subset

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    is_iterating,
    plain_network,
    predict,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
)
from monai_unlearn.methods._weights import convolution_weights
from monai_unlearn.methods.saliency_mask import summed_gradient, summed_loss, top_fraction

__all__ = ["MaskedSmallGradients", "drawn_anew", "smallest_fraction"]

# Optimizers that divide a gradient by its own size, so that a constant factor on it has no effect.
ADAPTIVE = (
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
)


def smallest_fraction(values: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the smallest share of values; of equal ones, the last.

    Args:
        values: flat tensor of finite, non-negative numbers.
        share: share to mark, in [0, 1]; the number is rounded to the nearest, halves down.

    Returns:
        Boolean tensor of the same shape with exactly that many True.
    """
    return ~top_fraction(values, 1 - share)


def drawn_anew(weight: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A kernel with some of its weights replaced by draws from N(0, 2 / fan-out).

    That is Kaiming's initialisation (normal, ``fan_out``, for ReLU), with which MONAI's ResNets
    begin; a layer's ``reset_parameters`` draws weights of less than half that spread.

    Args:
        weight: a convolution kernel, shape out × in × ….
        mask: boolean, same shape: True where a weight is replaced.
        generator: CPU generator of the draw. All weights are drawn, so that those that are not replaced do not change
            what the others become.

    Returns:
        A new tensor of the same shape, type and device.
    """
    draw = torch.empty(weight.shape)
    nn.init.kaiming_normal_(draw, mode="fan_out", nonlinearity="relu", generator=generator)
    return torch.where(mask, draw.to(weight), weight)


class MaskedSmallGradients:
    """Draw the convolution weights with the smallest gradient anew, then train on the retain set alone.

    g = ∂/∂θ (mean loss of retain samples − mean loss of forget samples), at the original's weights, in evaluation mode,
    without augmentation; the ``share`` of convolution weights with the smallest absolute g get new random values. While
    training, the gradients of all *other* convolution weights are multiplied by ``scale``, so that the new ones do most
    of the learning.

    Runs on ``STARTED`` (gradient, new values, loader of retain samples), before each ``optimizer.step`` during the run
    (after every other handler, so after unscaling and clipping; with accumulated gradients once a step) and on
    ``COMPLETED``. Weights that require no gradient stay bit-identical.

    Args:
        forget: the forget set.
        share: share of the convolution weights to draw anew, in [0, 1].
        scale: factor on the gradients of the other convolution weights, in [0, 1]; weight decay is not scaled.
        per_layer: take the share of each layer by itself, as the public code does; False takes it of all convolutions
            together.
        seed: seed of the new values and of the retain samples for g.
        loader: retain samples only, to train on; by default made from the trainer's own loader. For g, its batches are
            taken as they come until there are as many samples as are to be forgotten; by default as many retain samples
            as that are drawn, without augmentation.
        forget_loader: forget samples only, without augmentation; by default made from the trainer's own loader.

    Attributes:
        cost: what the gradient and the new values cost.

    Raises:
        ValueError: if an argument is outside its range, forget or retain samples can't be found, or ``scale`` is not 1
            with an optimizer on which a factor has no effect (Adam and the like).
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, the gradient is not finite, the network has no
            convolution to train, or the run ends without a step.

    References:
        Cadet et al., Deep Unlearn: Benchmarking Machine Unlearning for Image Classification, 2024, arXiv:2410.01276:
        the second place of the NeurIPS 2023 unlearning challenge. Differs from the public code: gradients are means
        over samples, so that they do not depend on the batch size, in evaluation mode, and of any loss; biases of
        convolutions stay.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[MaskedSmallGradients(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        share: float = 0.3,
        scale: float = 0.1,
        per_layer: bool = True,
        seed: int = 0,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
    ) -> None:
        for name, value in (("share", share), ("scale", scale)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} should lie in [0, 1], but got {value!r}.")
        self.forget = forget
        self.share = share
        self.scale = scale
        self.per_layer = per_layer
        self.seed = seed
        self.loader = loader
        self.forget_loader = forget_loader
        self.cost = Cost()
        self._factors: dict[nn.Parameter, torch.Tensor] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._steps = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        if isinstance(engine.optimizer, ADAPTIVE) and self.scale != 1:
            raise ValueError(
                f"scale should be 1 with {type(engine.optimizer).__name__}, which divides each gradient by its own "
                f"size, so that a factor has no effect, but got {self.scale!r}. Use torch.optim.SGD, or scale=1."
            )
        weights = list(convolution_weights(plain_network(engine)).values())
        if not weights:
            raise RuntimeError(
                "MaskedSmallGradients needs a convolution whose weights require a gradient, but the network has none. "
                "Use another method for this network: WeightNoise, say."
            )
        with seconds_of(self.cost, engine.state.device):
            masks = self._choose(engine, weights)
            train_on_retain(engine, self.forget, self.loader)  # before any weight is changed, as it may raise
            self._draw(weights, masks)
        if self.scale != 1:
            self._factors = {w: torch.ones_like(w).masked_fill_(~mask, self.scale) for w, mask in zip(weights, masks)}

            def scale_gradients(*_: Any) -> None:
                if is_iterating(engine):  # not after an exception ended the run and left this hook behind
                    self._scale_gradients()

            self._hook = engine.optimizer.register_step_pre_hook(scale_gradients)

    def _choose(self, engine: SupervisedTrainer, weights: list[nn.Parameter]) -> list[torch.Tensor]:
        """Where each weight is to be drawn anew, by the gradient."""
        forget_loader = self.forget_loader
        if forget_loader is None:
            forget_loader = self.forget.forget_loader(engine.data_loader)
        with torch.enable_grad(), evaluation_mode(engine.network):
            gradient, forgotten = self._mean_gradient(engine, weights, forget_loader, "forget")
            retain_loader: Iterable = self._drawn_loader(engine, forgotten) if self.loader is None else self.loader
            retained, _ = self._mean_gradient(engine, weights, retain_loader, "retain", most=forgotten)
        gradient = (retained - gradient).abs_()
        if not bool(torch.isfinite(gradient.max())):
            raise RuntimeError(
                "The gradient over forget and retain samples should be finite, but holds NaN or infinity. "
                "Check the images and the original model's loss; labels that are not known (NaN) need "
                "monai_unlearn.loss.MaskedBCEWithLogitsLoss."
            )
        sizes = [weight.numel() for weight in weights]
        if self.per_layer:
            masks = [smallest_fraction(part, self.share) for part in gradient.split(sizes)]
        else:
            masks = list(smallest_fraction(gradient, self.share).split(sizes))
        return [mask.view(weight.shape) for mask, weight in zip(masks, weights)]

    def _mean_gradient(
        self,
        engine: SupervisedTrainer,
        weights: list[nn.Parameter],
        loader: Iterable,
        part: str,
        most: float = math.inf,
    ) -> tuple[torch.Tensor, int]:
        """Gradient of the mean loss, flat, and of how many samples; no further batch is taken after ``most``."""
        count = 0

        def losses() -> Iterator[torch.Tensor]:
            nonlocal count
            for batch in loader:
                prediction, target = predict(engine, batch)
                count += len(target)
                yield summed_loss(engine.loss_function, prediction, target)
                if count >= most:
                    break

        gradient, _ = summed_gradient(weights, losses())
        if not count:
            raise ValueError(f"The loader of {part} samples should hold at least one sample, but is empty.")
        self.cost.samples += count
        self.cost.forward += count
        self.cost.backward += count
        return gradient / count, count

    def _drawn_loader(self, engine: SupervisedTrainer, size: int) -> DataLoader:
        """As many retain samples, without augmentation; which ones depends on the seed alone."""
        loader = self.forget.retain_loader(engine.data_loader, training=False)
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        return DataLoader(
            Subset(loader.dataset, sorted(order[:size].tolist())),
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
        )

    @torch.no_grad()
    def _draw(self, weights: list[nn.Parameter], masks: list[torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for weight, mask in zip(weights, masks):
            weight.copy_(drawn_anew(weight, mask, generator))

    @torch.no_grad()
    def _scale_gradients(self) -> None:
        for weight, factor in self._factors.items():
            if weight.grad is not None:
                weight.grad.mul_(factor)
        self._steps += 1

    def _complete(self, engine: Engine) -> None:
        unscaled = self._hook is not None and not self._steps
        self._release()
        if unscaled:
            raise RuntimeError(
                "The run ended without one step of the optimizer that it began with, so no gradient was scaled. "
                "Set the optimizer before the run, and check that the loader gives batches."
            )

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._factors = {}
        self._steps = 0
