"""Weight saliency: only the weights that matter to the forget set may change (SalUn, arXiv:2310.12508)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    is_iterating,
    parameter_name,
    predict,
    require_loaded_weights,
    require_supervised_trainer,
    unwrapped_handlers,
)

__all__ = ["SaliencyMask", "summed_gradient", "summed_loss", "top_fraction"]

# Losses whose "sum" is the sum of what each sample has alone, or that many times more.
SAMPLEWISE = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.HuberLoss,
    MaskedBCEWithLogitsLoss,
)

# Weights that are handled at once where this saves memory or time.
PIECE = 2**18


def summed_loss(loss_function: Any, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over a batch of the loss that each sample has alone, whatever the loss's own reduction.

    Args:
        loss_function: the trainer's loss. A loss of PyTorch, or ``MaskedBCEWithLogitsLoss``, is switched to
            ``reduction="sum"`` in a copy (so class weights count); any other is applied to one sample at a time,
            which is right for every loss.
        prediction: shape B × ….
        target: shape B × ….

    Returns:
        Scalar tensor.
    """
    if type(loss_function) in SAMPLEWISE:
        # Not copy.copy: modules share their buffers either way, and a fresh dict is all that is needed.
        summed = object.__new__(type(loss_function))
        summed.__dict__.update(loss_function.__dict__, reduction="sum")
        total = summed(prediction, target)
        per_class = isinstance(loss_function, (nn.CrossEntropyLoss, nn.NLLLoss)) and prediction.ndim == 2
        per_sample = per_class or isinstance(loss_function, MaskedBCEWithLogitsLoss)
        entries = 1 if per_sample or loss_function.reduction == "sum" else target.numel() // len(target)
        return total if entries == 1 else total / entries
    return torch.stack(
        [loss_function(prediction[i : i + 1], target[i : i + 1]).mean() for i in range(len(target))]
    ).sum()


def summed_gradient(parameters: list[nn.Parameter], losses: Iterable[torch.Tensor]) -> tuple[torch.Tensor, list[bool]]:
    """Gradient of a sum of losses, with one backward pass for each and no trace in ``.grad``.

    Args:
        parameters: the parameters to differentiate by.
        losses: one scalar a batch.

    Returns:
        The gradient as one flat tensor in the order of the parameters, and for each parameter whether any loss
        depends on it.
    """
    # Sums keep each parameter's memory layout (channels-last, say), in which adding takes a fraction of the time.
    sums: list[torch.Tensor | None] = [None] * len(parameters)
    for loss in losses:
        for i, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
            if gradient is not None:
                total = sums[i]
                # A copy, as autograd may give two parameters one tensor, or an expanded one.
                sums[i] = gradient.clone() if total is None else total.add_(gradient)
    reached = [total is not None for total in sums]
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for piece, parameter in zip(flat.split([p.numel() for p in parameters]), parameters):
        total = sums.pop(0)  # dropped one by one, so that no second copy of all of them is ever there
        if total is not None:
            piece.view(parameter.shape).copy_(total)
    return flat, reached


def top_fraction(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Mark the largest share of values; of equal ones, the first.

    Args:
        values: flat tensor of finite, non-negative numbers.
        ratio: share to mark, in [0, 1]; the number is rounded to the nearest, halves up.

    Returns:
        Boolean tensor of the same shape with exactly that many True.
    """
    count = math.floor(ratio * values.numel() + 0.5)
    if count in (0, values.numel()):
        return torch.full_like(values, bool(count), dtype=torch.bool)
    threshold = _nth_largest(values.detach(), count)
    mask = values > threshold
    missing = count - int(mask.count_nonzero())
    # Piece by piece: where half of the gradient is zero, the places of all ties take more memory than the weights.
    for some, marks in zip(values.split(PIECE), mask.split(PIECE)):
        if not missing:
            break
        ties = torch.nonzero(some == threshold).view(-1)[:missing]
        marks[ties] = True
        missing -= len(ties)
    return mask


def _nth_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of many values.

    A sample tells between which two values it lies, so that only the few of these are left to sort: a fifth of the
    time of a selection over all, and no copy of them.
    """
    size = values.numel()
    if size > 100_000:
        sample = (
            values[torch.linspace(0, size - 1, 10_000, device=values.device, dtype=torch.float64).long()].sort().values
        )
        place = round((1 - n / size) * (len(sample) - 1))
        low, high = sample[max(place - 200, 0)], sample[min(place + 200, len(sample) - 1)]
        above = int((values > high).count_nonzero())
        within = (values > low) & (values <= high)
        below = n - above - int(within.count_nonzero())  # ranks below those within
        if 0 < below <= int((values == low).count_nonzero()):  # often zero, which half of a gradient may be
            return low
        if n > above and below <= 0:
            values = values[within]
            n, size = n - above, values.numel()
    return values.kthvalue(size - n + 1).values


class SaliencyMask:
    """Let only the most salient weights change; all others stay bit-identical.

    mask = the ``ratio`` of all weights with the largest |∂/∂θ Σ_{x ∈ forget set} ℓ(f_θ(x), y)| at the weights that
    the run starts from: global over the network, in evaluation mode, without augmentation, with true labels.

    Composes with every method that takes gradient steps: SalUn is ``RandomLabeling`` and this.

    Runs on ``STARTED`` (computes the mask), before and after each ``optimizer.step`` during the run, and on
    ``COMPLETED``. In a step, the gradients of frozen weights are zeroed after every other handler (clipping,
    unscaling), and weight decay is kept from them: for SGD, Adam and AdamW by applying it to the others here
    instead of in the optimizer; for any other or fused optimizer by putting frozen weights back after the step.

    Args:
        forget: the forget set.
        ratio: share of weights that may change, in [0, 1].
        loader: forget samples only, without augmentation; by default made from the trainer's own loader, whose
            other samples are not decoded and whose random transforms are left out.
        path: file for the mask (safetensors; True = may change). The mask is a function of the forgotten data:
            keep it as private as these.

    Attributes:
        mask: parameter name → boolean tensor, True where the weight may change. Parameters that do not require a
            gradient or that the loss does not depend on are all False.
        cost: what computing the mask cost.

    Raises:
        ValueError: if ``ratio`` is outside [0, 1], or forget samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if it stands before a ``CheckpointLoader`` or beside another mask, the gradient is not finite, or
            nothing can change.

    References:
        Fan et al., SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency, ICLR 2024,
        arXiv:2310.12508. Differs from the public code: frozen weights do not drift with weight decay and momentum,
        the pass is made in evaluation mode, and batch size and order do not matter.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[RandomLabeling(forget), SaliencyMask(forget, ratio=0.5)])
    """

    cost_phase = "mask"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        ratio: float = 0.5,
        loader: DataLoader | None = None,
        path: str | os.PathLike | None = None,
    ) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ValueError(f"ratio should lie in [0, 1], but got {ratio!r}. It is the share of weights to change.")
        self.forget = forget
        self.ratio = ratio
        self.loader = loader
        self.path = None if path is None else Path(path)
        self.cost = Cost()
        self._names: dict[nn.Parameter, str] = {}
        self._may_change: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._step: _MaskedStep | None = None

    @property
    def mask(self) -> dict[str, torch.Tensor]:
        """Parameter name → True where the weight may change; empty before a run."""
        return {self._names[parameter]: mask for parameter, mask in self._may_change.items()}

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        if any(isinstance(handler, SaliencyMask) for handler in unwrapped_handlers(engine, Events.STARTED)):
            raise RuntimeError("A trainer should have one SaliencyMask, but has one already. Remove one of them.")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check_optimizer)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        self.cost = Cost()
        with seconds_of(self.cost, engine.state.device):
            self._compute(engine)
        if self.path is not None:
            self._save(self.path)
        self._step = _MaskedStep(engine, self._may_change)
        self._hooks = [
            engine.optimizer.register_step_pre_hook(self._step.before),
            engine.optimizer.register_step_post_hook(self._step.after),
        ]

    def _compute(self, engine: SupervisedTrainer) -> None:
        network = engine.network
        trainable = [(parameter_name(n), p) for n, p in network.named_parameters() if p.requires_grad]
        if not trainable:
            raise RuntimeError("The network has no parameter that requires a gradient, so nothing can change.")
        loader = self.forget.forget_loader(engine.data_loader) if self.loader is None else self.loader
        parameters = [parameter for _, parameter in trainable]
        with torch.enable_grad(), evaluation_mode(network):
            gradient, reached = summed_gradient(parameters, self._losses(engine, loader))
        if not self.cost.samples:
            raise ValueError("The loader of forget samples should hold at least one sample, but is empty.")
        gradient.abs_()
        if not bool(torch.isfinite(gradient.max())):
            raise RuntimeError(
                "The gradient over the forget samples should be finite, but holds NaN or infinity. "
                "Check the images and the original model's loss; labels that are not known (NaN) need "
                "monai_unlearn.loss.MaskedBCEWithLogitsLoss."
            )
        if not all(reached):
            sizes = [p.numel() if hit else 0 for p, hit in zip(parameters, reached)]
            gradient = torch.cat([g for g, hit in zip(gradient.split([p.numel() for p in parameters]), reached) if hit])
        else:
            sizes = [p.numel() for p in parameters]
        mask = top_fraction(gradient, self.ratio)
        self._names = {parameter: parameter_name(n) for n, parameter in network.named_parameters()}
        # In each parameter's own memory layout, so that masking its gradient is one run through memory. What is
        # outside the choice (not trainable, or reached by no gradient) may not change.
        self._may_change = {p: torch.zeros_like(p, dtype=torch.bool) for p in network.parameters()}
        for (_, parameter), piece in zip(trainable, mask.split(sizes)):
            if len(piece):
                self._may_change[parameter].copy_(piece.view(parameter.shape))

    def _losses(self, engine: SupervisedTrainer, loader: DataLoader) -> Iterable[torch.Tensor]:
        for batch in loader:
            prediction, target = predict(engine, batch)
            self.cost.samples += len(target)
            self.cost.forward += len(target)
            self.cost.backward += len(target)
            yield summed_loss(engine.loss_function, prediction, target)

    def _save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file({name: mask.cpu().contiguous() for name, mask in self.mask.items()}, unfinished)
        os.replace(unfinished, path)

    def _check_optimizer(self, engine: SupervisedTrainer) -> None:
        if self._step is None or self._step.optimizer is not engine.optimizer:
            raise RuntimeError(
                "The trainer's optimizer was exchanged during the run, so the saliency mask no longer holds. "
                "Set the optimizer before the run."
            )

    def _complete(self, engine: Engine) -> None:
        steps = self._step.steps if self._step else 0
        self._release()
        if not steps:
            raise RuntimeError("The run ended without one optimizer step, so nothing was unlearned.")

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._step is not None:
            self._step.put_back_decay()
        self._step = None


class _MaskedStep:
    """What happens right before and right after an optimizer's step, so that frozen weights stay as they are."""

    def __init__(self, engine: SupervisedTrainer, may_change: dict[nn.Parameter, torch.Tensor]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.steps = 0
        self._may_change = may_change
        self._decay: list[tuple[dict, float]] = []
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        # A first moment that is zero stays zero under zero gradients: only an earlier run's has to be cleared.
        for parameter, state in self.optimizer.state.items():
            if isinstance(parameter, nn.Parameter) and parameter in may_change:
                for moment in ("momentum_buffer", "exp_avg"):
                    if isinstance(state.get(moment), torch.Tensor):
                        keep_(state[moment], may_change[parameter])

    def _is_exact(self, group: dict) -> bool:
        """Whether zero gradients and moments leave a weight bit-identical in this optimizer, without its decay."""
        known = type(self.optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        # Fused steps may unscale gradients themselves: what is added to these here would be unscaled too.
        # Maximizing turns a gradient of 0.0 into -0.0, which turns a weight of -0.0 into 0.0; without eps, 0 / 0.
        options = ("fused", "capturable", "differentiable", "maximize")
        return known and not any(group.get(option) for option in options) and group.get("eps") != 0

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Zero the gradients of frozen weights and take weight decay off the optimizer's hands."""
        if not is_iterating(self.engine):  # an exception ended the run; the optimizer is the user's again
            return
        for group in optimizer.param_groups:
            exact = self._is_exact(group)
            decay = group.get("weight_decay", 0)
            apart = type(optimizer) is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
            for parameter in group["params"]:
                mask = self._may_change.get(parameter)  # None: the optimizer's, but not the network's
                if parameter.grad is None:
                    continue
                if not exact:
                    self._kept.append((parameter, parameter.detach().clone()))
                elif decay and apart:
                    decayed = parameter * (1 - group["lr"] * decay)
                    parameter.copy_(decayed if mask is None else torch.where(mask, decayed, parameter))
                elif decay:
                    parameter.grad.add_(parameter, alpha=decay)
                if mask is not None:
                    keep_(parameter.grad, mask)
            if exact and decay:
                self._decay.append((group, decay))
                group["weight_decay"] = 0 * decay

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Put frozen weights back where the optimizer may have moved them, and weight decay where it was."""
        if not is_iterating(self.engine):
            return
        for parameter, value in self._kept:
            if parameter in self._may_change:
                parameter.copy_(torch.where(self._may_change[parameter], parameter, value))
        self._kept = []
        self.put_back_decay()
        self.steps += 1

    def put_back_decay(self) -> None:
        """Give the parameter groups their weight decay back."""
        for group, decay in self._decay:
            group["weight_decay"] = decay
        self._decay = []


def keep_(values: torch.Tensor, mask: torch.Tensor) -> None:
    """Zero the values where the mask is False, in place.

    The bit patterns are multiplied by 0 or 1 as integers: NaN and infinity become zero too, as with
    ``masked_fill_``, in a fifth of its time on a CPU.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits, keep = values.view(integers), mask.view(torch.uint8)
    if bits.ndim == 0:
        bits.mul_(keep)
        return
    # By rows of the first axis, which any memory layout keeps together: the integers that the mask is turned into on
    # the way then stay in the processor's cache.
    rows = max(1, PIECE * len(bits) // max(1, bits.numel()))
    for some, kept in zip(bits.split(rows), keep.split(rows)):
        some.mul_(kept)
