"""Selective synaptic dampening: shrink the weights that matter to the forget set above all (SSD; arXiv:2308.07707)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader
from tqdm import tqdm

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    plain_network,
    prepare,
    require_loaded_weights,
    require_supervised_trainer,
    unwrapped_handlers,
)
from monai_unlearn.methods.batch_norm import BatchNormPolicy
from monai_unlearn.methods.saliency_mask import summed_loss

__all__ = [
    "SelectiveSynapticDampening",
    "add_squared_gradients",
    "dampening_factor",
    "sample_gradients",
    "squared_gradients",
]

logger = logging.getLogger("monai_unlearn")

# Most samples whose gradients are computed at once on a GPU, and most memory that these gradients take.
MOST_AT_ONCE = 32
MOST_BYTES = 2**30


def add_squared_gradients(
    sums: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], losses: Iterable[torch.Tensor]
) -> None:
    """Add the squares of several losses' gradients, with one backward pass for each and no trace in ``.grad``.

    Args:
        sums: a tensor for each parameter, of its shape, to which is added in place.
        parameters: the parameters to differentiate by.
        losses: one scalar a sample.
    """
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        totals = [total for total, gradient in zip(sums, found) if gradient is not None]
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients:
            # As the optimizers do it: one call a sample instead of one a weight, which small networks feel.
            torch._foreach_addcmul_(totals, gradients, gradients)


def sample_gradients(
    network: nn.Module, parameters: Sequence[nn.Parameter], inputs: torch.Tensor, targets: torch.Tensor, loss: Any
) -> list[torch.Tensor]:
    """Gradient of each sample's own loss, all samples of a batch at once by ``torch.func``.

    The loss is outside of what is vectorised, since many losses can't be: a sample's gradient is that of its output
    times its loss's slope there.

    Args:
        network: in evaluation mode; its output is a tensor, B × ….
        parameters: parameters of the network to differentiate by.
        inputs: shape B × ….
        targets: shape B × ….
        loss: the loss; each sample counts as if it were alone.

    Returns:
        A tensor for each parameter, B × its shape; zero where no output depends on it.

    Raises:
        RuntimeError: or another error, if ``torch.vmap`` can't take the network. No weight may be shared in it.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    weights = {names[parameter]: parameter.detach() for parameter in parameters}

    def output(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(network, weights, (sample[None],))[0]

    def projected(weights: dict[str, torch.Tensor], sample: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return (output(weights, sample) * slope).sum()

    with torch.no_grad():
        outputs = vmap(output, in_dims=(None, 0))(weights, inputs)
    (slopes,) = torch.autograd.grad(summed_loss(loss, outputs.requires_grad_(), targets), outputs)
    gradients = vmap(grad(projected), in_dims=(None, 0, 0))(weights, inputs, slopes)
    return [gradients[names[parameter]] for parameter in parameters]


def squared_gradients(
    network: nn.Module, parameters: Sequence[nn.Parameter], inputs: torch.Tensor, targets: torch.Tensor, loss: Any
) -> list[torch.Tensor]:
    """Sum over a batch of the squares of each sample's gradient; arguments and errors as ``sample_gradients``.

    Returns:
        A tensor for each parameter, of its shape; zero where no output depends on it.
    """
    return [g.square().sum(0) for g in sample_gradients(network, parameters, inputs, targets, loss)]


def dampening_factor(
    forget_importance: torch.Tensor, data_importance: torch.Tensor, alpha: float, dampening: float
) -> torch.Tensor:
    """What each weight is multiplied by: min(dampening · I_D / I_f, 1) where I_f > alpha · I_D, and 1 elsewhere.

    Args:
        forget_importance: I_f, mean of squared gradients over the forget set, at least 0.
        data_importance: I_D, the same over the whole training data.
        alpha: how many times more than to all data a weight has to matter to the forget set.
        dampening: the paper's λ; the smaller, the more is taken away.

    Returns:
        Tensor of the same shape, in [0, 1].
    """
    chosen = forget_importance > alpha * data_importance
    ratio = (dampening * data_importance).div_(forget_importance).clamp_(max=1)
    return torch.where(chosen, ratio, 1)


def require_alone(engine: Engine, handler: object) -> None:
    """Refuse another method in the trainer of one that ends the run before its first step.

    Raises:
        RuntimeError: if there is one, other than a ``BatchNormPolicy``.
    """
    room = __name__.rpartition(".")[0]
    for other in unwrapped_handlers(engine, Events.STARTED):
        if other is not handler and type(other).__module__.startswith(room) and not isinstance(other, BatchNormPolicy):
            raise RuntimeError(
                f"{type(handler).__name__} ends the run before its first step, in which {type(other).__name__} would "
                "do nothing. Give each a trainer of its own."
            )


class SelectiveSynapticDampening:
    """Shrink, once and without training, the weights that matter far more to the forget set than to all data.

    θ ← θ · min(λ · I_D / I_f, 1) where I_f > α · I_D, with I the mean over samples of the squared gradient of each
    sample's own loss (the diagonal of the Fisher information), over the forget set (I_f) and the whole training data
    (I_D): in evaluation mode, without augmentation, with true labels. Independent of batch size and order.

    As the forget set is a part p of the data, I_f / I_D is at most 1 / p: with ``alpha`` at or above that, no weight
    can be chosen, which raises before any work is done.

    Runs on ``STARTED``, where it ends the run, so that no training step follows. Weights that are not chosen, and those
    that require no gradient, stay bit-identical.

    Args:
        forget: the forget set.
        alpha: the threshold α, above 0 and below the number of training samples over that of forget samples.
        dampening: the paper's λ, at least 0. With 0, chosen weights become 0.
        loader: retain samples only, without augmentation; by default made from the trainer's own loader.
        forget_loader: forget samples only, without augmentation; by default made from the trainer's own loader.
        chunk_size: samples whose gradients are computed at once, at least 1 (one at a time); by default as many as fit
            on a GPU, and one at a time on a CPU, where more at once is often the slower way. A network that
            ``torch.vmap`` can't take, one with shared weights, and one with an inferer other than ``SimpleInferer`` go
            one at a time whatever is asked.

    Attributes:
        cost: what it cost.
        dampened: how many weights were multiplied by less than 1.

    Raises:
        ValueError: if an argument is outside its range, or forget or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, another method is in the same trainer, the gradients
            are not finite, or no weight was chosen.

    References:
        Foster et al., Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, AAAI 2024,
        arXiv:2308.07707. Differs from the public code, which squares the gradients of batch means, so that its result
        depends on the batch size.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[SelectiveSynapticDampening(forget, alpha=5)])
    """

    cost_phase = "unlearn"
    takes_no_step = True  # run_trainer's complaint about a run without a step is not for this one

    def __init__(
        self,
        forget: ForgetSet,
        *,
        alpha: float = 10.0,
        dampening: float = 1.0,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha should be a number above 0, but got {alpha!r}.")
        if not (math.isfinite(dampening) and dampening >= 0):
            raise ValueError(f"dampening should be a number of at least 0, but got {dampening!r}.")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size should be an integer of at least 1, but got {chunk_size!r}.")
        self.forget = forget
        self.alpha = alpha
        self.dampening = dampening
        self.loader = loader
        self.forget_loader = forget_loader
        self.chunk_size = chunk_size
        self.cost = Cost()
        self.dampened = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        self.cost = Cost()
        self.dampened = 0
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_alone(engine, self)
        with seconds_of(self.cost, engine.state.device):
            self._dampen(engine)
        engine.terminate()

    def _dampen(self, engine: SupervisedTrainer) -> None:
        network = plain_network(engine)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not parameters:
            raise RuntimeError("The network has no parameter that requires a gradient, so nothing can change.")
        forget_loader, loader = self.forget_loader, self.loader
        if forget_loader is None:
            forget_loader = self.forget.forget_loader(engine.data_loader)
        if loader is None:
            loader = self.forget.retain_loader(engine.data_loader, training=False)
        if hasattr(forget_loader.dataset, "__len__") and hasattr(loader.dataset, "__len__"):
            self._check_alpha(len(forget_loader.dataset), len(loader.dataset))
        with torch.enable_grad(), evaluation_mode(network):
            passes = _Passes(engine, parameters, self.chunk_size, self.cost)
            forget_sums, forgotten = passes.over(forget_loader, "forget")
            retain_sums, retained = passes.over(loader, "retain")
        with torch.no_grad():
            factors = []
            for of_forget, of_retain in zip(forget_sums, retain_sums):
                of_all = of_retain.add_(of_forget).div_(forgotten + retained)
                factors.append(dampening_factor(of_forget.div_(forgotten), of_all, self.alpha, self.dampening))
                if of_all.numel() and not bool(of_all.max().isfinite()):  # at least 0, and max keeps a NaN
                    raise RuntimeError(
                        "The gradients of all samples should be finite, but some hold NaN or infinity. Check the "
                        "images and the original model's loss; labels that are not known (NaN) need "
                        "monai_unlearn.loss.MaskedBCEWithLogitsLoss."
                    )
            self.dampened = sum(int((factor < 1).count_nonzero()) for factor in factors)
            if not self.dampened:
                raise RuntimeError(
                    f"No weight matters more than alpha = {self.alpha} times as much to the forget set as to all data, "
                    "or dampening left those that do as they are, so nothing was unlearned. Lower alpha (or dampening)."
                )
            for parameter, factor in zip(parameters, factors):
                parameter.mul_(factor)

    def _check_alpha(self, forgotten: int, retained: int) -> None:
        if forgotten and retained and self.alpha >= (forgotten + retained) / forgotten:
            raise ValueError(
                f"alpha should be below {(forgotten + retained) / forgotten:.4g}, the number of training samples over "
                f"that of forget samples, but got {self.alpha!r}: no weight can matter that much more to a part of the "
                "data than to all of it, so nothing would be unlearned. Lower alpha."
            )


class _Passes:
    """Passes over loaders that sum up the squared gradients of single samples."""

    def __init__(
        self,
        engine: SupervisedTrainer,
        parameters: list[nn.Parameter],
        chunk_size: int | None,
        cost: Cost,
    ) -> None:
        self.engine = engine
        self.network = plain_network(engine)
        self.parameters = parameters
        self.cost = cost
        if chunk_size is None:
            chunk_size = 1
            if parameters[0].device.type != "cpu":
                size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
                chunk_size = min(max(MOST_BYTES // size, 1), MOST_AT_ONCE)
        # functional_call leaves its own tensors in a network in which a module has two names (torch 2.13).
        names = dict(self.network.named_parameters(remove_duplicate=False))
        shared = len(names) > len(list(self.network.parameters()))
        self.chunk_size = 1 if shared or type(engine.inferer) is not SimpleInferer else chunk_size

    def over(self, loader: Iterable, part: str) -> tuple[list[torch.Tensor], int]:
        """The sums over a loader, and over how many samples.

        Raises:
            ValueError: if there is none.
        """
        sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        count = 0
        for batch in tqdm(loader, desc=f"importance to the {part} set", unit="batch", disable=None, leave=False):
            inputs, targets, args, kwargs = prepare(self.engine, batch)
            if isinstance(inputs, MetaTensor):
                inputs = inputs.as_tensor()
            count += len(targets)
            self.cost.backward += len(targets)
            step = 1 if args or kwargs else self.chunk_size
            for start in range(0, len(targets), step):
                rows = range(start, min(start + step, len(targets)))
                squares = self._together(inputs, targets, rows)
                if squares is None:
                    add_squared_gradients(sums, self.parameters, self._losses(inputs, targets, args, kwargs, rows))
                else:
                    for total, more in zip(sums, squares):
                        total.add_(more)
        if not count:
            raise ValueError(f"The loader of {part} samples should hold at least one sample, but is empty.")
        self.cost.samples += count
        logger.info("Importance of the weights to the %s set: the gradients of %d samples", part, count)
        return sums, count

    def _losses(
        self, inputs: Any, targets: torch.Tensor, args: tuple, kwargs: dict, rows: range
    ) -> Iterator[torch.Tensor]:
        for i in rows:
            more = [row_of(value, i, len(targets)) for value in args]
            named = {key: row_of(value, i, len(targets)) for key, value in kwargs.items()}
            prediction = self.engine.inferer(inputs[i : i + 1], self.network, *more, **named)
            self.cost.forward += 1
            yield summed_loss(self.engine.loss_function, prediction, targets[i : i + 1])

    def _together(self, inputs: torch.Tensor, targets: torch.Tensor, rows: range) -> list[torch.Tensor] | None:
        """The rows' squared gradients, vectorised; None where that can't be done."""
        if self.chunk_size == 1 or len(rows) == 1:
            return None
        some = slice(rows.start, rows.stop)
        try:
            squares = squared_gradients(
                self.network, self.parameters, inputs[some], targets[some], self.engine.loss_function
            )
        except (RuntimeError, TypeError, ValueError) as error:
            # A network that decides by values, say. If something else is wrong, one sample at a time will tell.
            logger.info("torch.vmap can't take the network (%s): one sample at a time, then", type(error).__name__)
            self.chunk_size = 1
            return None
        self.cost.forward += 2 * len(rows)
        return squares


def row_of(value: Any, i: int, rows: int) -> Any:
    """A sample's own part of an argument of the network's."""
    return value[i : i + 1] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value
