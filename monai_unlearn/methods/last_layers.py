"""CF-k and EU-k: train the last k layers alone, from their weights or anew (Goel et al., 2022; arXiv:2201.06640)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    is_iterating,
    plain_network,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
    unwrapped_handlers,
)
from monai_unlearn.methods._weights import NORMALISATION
from monai_unlearn.methods.retrain import InitialState, held, restore

__all__ = ["LastLayers", "frozen", "layers"]


def layers(network: nn.Module) -> list[dict[str, nn.Module]]:
    """The layers of a network, in the order in which its modules were registered.

    A layer begins with a module that has a kernel of its own, a parameter of two or more dimensions (convolutions,
    transposed ones, linear layers), and takes in what follows it up to the next kernel: normalisation above all. What
    stands before the first kernel belongs to the first layer.

    Args:
        network: any network. A module that is there twice counts where it is first.

    Returns:
        For each layer, the first one first, name → module.
    """
    found: list[dict[str, nn.Module]] = []
    before: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        own = module.parameters(recurse=False)
        if not isinstance(module, NORMALISATION) and any(parameter.ndim >= 2 for parameter in own):
            found.append({} if found else before)
        (found[-1] if found else before)[name] = module
    return found


@contextmanager
def frozen(parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]) -> Iterator[None]:
    """For the block, let parameters require no gradient and put modules into evaluation mode, each by itself.

    A forward pass in the block records nothing for these parameters, so that a backward pass after it ends where the
    first of the others is. All is put back whatever happens in the block.

    Args:
        parameters: those to be left out of the pass.
        modules: those that would change their buffers in a pass in training mode, such as BatchNorm.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    training = [module for module in modules if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


class LastLayers:
    """Freeze all but the last k layers, and train these on the retain set alone.

    - CF-k (*catastrophic forgetting*; no ``initial_state``): minimise CE over the retain set by the last k layers, from
      the original's weights on. With k as large as the network this is fine-tuning, to the bit.
    - EU-k (*exact unlearning* of the last k layers; with an ``initial_state``): the last k layers, buffers included, go
      back to where the recipe started, and are trained anew on top of the others. With k as large as the network this
      is retraining.

    A layer is a module with a kernel of two or more dimensions (convolution, linear) and what follows it up to the next
    one (normalisation), in the order in which modules are registered; the classifier is the first from the end. That is
    not always the order of the forward pass: a ResNet's block registers its downsampling convolution last.

    Runs on ``STARTED`` (a loader of retain samples takes the place of the trainer's, layers go back to the initial
    state and lose their optimizer state), around each forward pass of the run (frozen layers record no gradient, so the
    backward pass does not reach them, and work in evaluation mode where they have buffers), on ``BACKWARD_COMPLETED``
    (they are left without a gradient, which optimizers pass over, weight decay and momentum included) and on
    ``COMPLETED``. Frozen parameters and buffers stay bit-identical, unless another handler changes them:
    ``BatchNormPolicy("retain")`` would, so use its policy ``"plain"``, which meets retain samples alone here.

    Args:
        forget: the forget set.
        k: how many layers to train, from the end; in [1, the network's number of layers].
        initial_state: for EU-k, where the recipe started: a state dict of the whole network, a network, the path of a
            checkpoint, or a function that returns one of these. None, for CF-k, keeps the weights.
        loader: retain samples only; by default made from the trainer's own loader.

    Raises:
        ValueError: if ``k`` is no whole number in its range, the initial state is not complete, or retain samples can't
            be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or the trainer has another one; if the last k layers
            have nothing that requires a gradient, or not all of it is in the optimizer; or if the network is in
            ``DistributedDataParallel`` without ``find_unused_parameters=True``.

    References:
        Goel et al., Towards Adversarial Evaluations for Inexact Machine Unlearning, 2022, arXiv:2201.06640. Frozen
        BatchNorm keeps its running statistics and works with them; the schedule is the trainer's.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[LastLayers(forget, k=6)])  # CF-6
        trainer = SupervisedTrainer(..., train_handlers=[LastLayers(forget, k=6, initial_state=lambda: ResNet(...))])
    """

    def __init__(
        self,
        forget: ForgetSet,
        *,
        k: int,
        initial_state: InitialState | None = None,
        loader: DataLoader | None = None,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k should be a whole number of at least 1, but got {k!r}.")
        self.forget = forget
        self.k = k
        self.initial_state = None if initial_state is None else held(initial_state)
        self.loader = loader
        self._frozen: list[nn.Parameter] = []
        self._inferer: _FreezingInferer | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        if any(isinstance(handler, LastLayers) for handler in unwrapped_handlers(engine, Events.STARTED)):
            raise RuntimeError("A trainer should have one LastLayers, but has one already. Remove one of them.")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._drop_gradients)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._complete(engine)
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        _require_search_of_unused(engine.network)
        network = plain_network(engine)
        last = self._last(network)
        trained = [parameter for module in last.values() for parameter in module.parameters(recurse=False)]
        self._require_in_optimizer(engine, trained)
        train_on_retain(engine, self.forget, self.loader)  # before any weight is changed, so that an error changes none
        if self.initial_state is not None:
            restore(network, self.initial_state, _names(last))
            for parameter in trained:
                engine.optimizer.state.pop(parameter, None)
        known = set(trained)
        self._frozen = [parameter for parameter in network.parameters() if parameter not in known]
        modules = [module for module in network.modules() if module not in set(last.values())]
        buffered = [module for module in modules if next(module.buffers(recurse=False), None) is not None]
        self._inferer = _FreezingInferer(engine, self._frozen, buffered)
        engine.inferer = self._inferer

    def _last(self, network: nn.Module) -> dict[str, nn.Module]:
        """Name → module of the last k layers."""
        found = layers(network)
        if self.k > len(found):
            raise ValueError(
                f"k should be at most {len(found)}, the network's number of layers (modules with a kernel of two or "
                f"more dimensions), but got {self.k}. Use FineTune or Retrain for all of them."
            )
        return {name: module for layer in found[-self.k :] for name, module in layer.items()}

    def _require_in_optimizer(self, engine: SupervisedTrainer, parameters: list[nn.Parameter]) -> None:
        """Refuse layers that would stay as they are: those that EU-k sets back would stay untrained."""
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        if not trainable:
            raise RuntimeError(
                f"The last {self.k} layers have no parameter that requires a gradient, so nothing would be unlearned. "
                "Let them require one, or use a larger k."
            )
        known = {parameter for group in engine.optimizer.param_groups for parameter in group["params"]}
        missing = sum(parameter not in known for parameter in trainable)
        if missing:
            raise RuntimeError(
                f"The optimizer should hold all {len(trainable)} parameters of the last {self.k} layers, but "
                f"{missing} are not in it. Make it from the parameters of the network that the trainer has."
            )

    def _drop_gradients(self, engine: Engine) -> None:
        # Zeros of optimizer.zero_grad, or what a penalty on all weights or a pass of another handler has left.
        for parameter in self._frozen:
            parameter.grad = None

    def _complete(self, engine: SupervisedTrainer) -> None:
        if self._inferer is not None and engine.inferer is self._inferer:
            engine.inferer = self._inferer.inferer
        self._inferer = None
        self._frozen = []


class _FreezingInferer(Inferer):
    """The trainer's inferer, with layers frozen for its passes.

    Not hooks on the network: these are not called where Ctrl-C ends a pass, and a compiled network would trace them.
    """

    def __init__(self, engine: SupervisedTrainer, parameters: list[nn.Parameter], buffered: list[nn.Module]) -> None:
        self.inferer: Inferer = engine.inferer
        self._engine = engine
        self._parameters = parameters
        self._buffered = buffered

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        # Passes for evaluation train nothing, and one for BatchNorm's statistics has to reach all of them. After an
        # exception that left this in the trainer, it does nothing.
        if not (is_iterating(self._engine) and plain_network(self._engine).training):
            return self.inferer(inputs, network, *args, **kwargs)
        with frozen(self._parameters, self._buffered):
            return self.inferer(inputs, network, *args, **kwargs)


def _names(modules: dict[str, nn.Module]) -> set[str]:
    """The names that the own parameters and buffers of modules have in the network's state."""
    own = (
        (prefix, name)
        for prefix, module in modules.items()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, _ in named
    )
    return {f"{prefix}.{name}" if prefix else name for prefix, name in own}


def _require_search_of_unused(network: nn.Module) -> None:
    """Refuse a wrapper that waits for the gradients of frozen layers, which never come."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, nn.parallel.DistributedDataParallel) and not network.find_unused_parameters:
        raise RuntimeError(
            "LastLayers leaves frozen layers without a gradient, for which DistributedDataParallel would wait. Wrap "
            "the network with find_unused_parameters=True."
        )
