"""What every method asks of the trainer that it is attached to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch.utils.data import DataLoader

from monai_unlearn.forget_set import ForgetSet

__all__ = [
    "cycle",
    "evaluation_mode",
    "forget_batches",
    "is_iterating",
    "parameter_name",
    "plain_network",
    "predict",
    "prepare",
    "require_batches",
    "require_before_savers",
    "require_loaded_weights",
    "require_logits",
    "require_supervised_trainer",
    "train_on",
    "train_on_retain",
    "unwrapped_handlers",
]


def require_supervised_trainer(engine: Engine, handler: object) -> None:
    """Refuse an engine whose loop does not fire the events that the methods live on.

    Raises:
        TypeError: if ``engine`` is no ``SupervisedTrainer``, or has an ``iteration_update`` of its own.
    """
    name = type(handler).__name__
    if not isinstance(engine, SupervisedTrainer):
        raise TypeError(
            f"{name} should be attached to a monai.engines.SupervisedTrainer, but got {type(engine).__name__}, "
            "which does not fire the events of a supervised step."
        )
    step = engine._process_function
    if getattr(step, "__func__", None) is not SupervisedTrainer._iteration:
        raise TypeError(
            f"{name} can't work in a trainer with an iteration_update of its own, which does not fire the events "
            "of a supervised step. Use the trainer's own iteration."
        )


def unwrapped_handlers(engine: Engine, event: Any) -> list[object]:
    """The handlers of an event in the order in which they run: objects rather than their bound methods."""
    handlers = []
    for function, *_ in engine._event_handlers[event]:
        function = getattr(function, "__wrapped__", function)
        handlers.append(getattr(function, "__self__", function))
    return handlers


def require_loaded_weights(engine: Engine, handler: object) -> None:
    """Refuse a place in the handlers' list at which the trained weights are not there yet.

    Raises:
        RuntimeError: if a ``CheckpointLoader`` stands after ``handler``.
    """
    started = unwrapped_handlers(engine, Events.STARTED)
    if any(isinstance(later, CheckpointLoader) for later in started[started.index(handler) + 1 :]):
        raise RuntimeError(
            f"{type(handler).__name__} stands before a CheckpointLoader, at a time when the weights are not loaded "
            "yet. Put it after the CheckpointLoader in train_handlers."
        )


def require_before_savers(engine: Engine, handler: object) -> None:
    """Refuse a place after a saver, for a handler that still changes the network when the run is completed.

    Raises:
        RuntimeError: if a ``CheckpointSaver`` of the final weights stands before ``handler``.
    """
    completed = unwrapped_handlers(engine, Events.COMPLETED)
    if any(isinstance(earlier, CheckpointSaver) for earlier in completed[: completed.index(handler)]):
        raise RuntimeError(
            f"{type(handler).__name__} stands after a CheckpointSaver, which would save weights that are not final "
            "yet. Put it before the CheckpointSaver in train_handlers."
        )


def require_logits(engine: SupervisedTrainer, handler: object) -> None:
    """Refuse a network of which the loss says that its outputs are probabilities.

    Raises:
        TypeError: if the trainer's loss is a ``BCELoss``.
    """
    if isinstance(engine.loss_function, torch.nn.BCELoss):
        raise TypeError(
            f"{type(handler).__name__} should be given a network whose outputs are logits, but BCELoss takes "
            "probabilities. Use BCEWithLogitsLoss, and leave the sigmoid out of the network."
        )


def train_on_retain(engine: SupervisedTrainer, forget: ForgetSet, loader: DataLoader | None = None) -> None:
    """Let the run go over retain samples alone, as many epochs as it has.

    Args:
        engine: the trainer, at ``STARTED``.
        forget: the forget set.
        loader: retain samples only; by default made from the trainer's own loader (same batch size, order and
            transforms).

    Raises:
        ValueError: if there is no retain sample, or they can't be found.
    """
    if loader is None:
        loader = forget.retain_loader(engine.data_loader, training=True)
    train_on(engine, loader, "retain")


def forget_batches(engine: SupervisedTrainer, forget: ForgetSet, loader: DataLoader | None = None) -> DataLoader:
    """Forget samples to train on.

    Args:
        engine: the trainer, at ``STARTED``.
        forget: the forget set.
        loader: forget samples only; by default made from the trainer's own loader (same batch size, order and
            transforms).

    Raises:
        ValueError: if there is no forget sample, or they can't be found.
    """
    if loader is None:
        loader = forget.forget_loader(engine.data_loader, training=True)
    require_batches(loader, "forget")
    return loader


def cycle(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader without end, in its next order each time round (itertools.cycle would keep the first)."""
    while True:
        yield from loader


def train_on(engine: SupervisedTrainer, loader: DataLoader, part: str) -> None:
    """Let the run go over a loader, as many epochs as it has.

    Args:
        engine: the trainer, at ``STARTED``.
        loader: where its batches come from.
        part: what samples these are, for the error: ``"retain"`` or ``"forget"``, say.

    Raises:
        ValueError: if the loader gives no batch.
    """
    require_batches(loader, part)
    engine.set_data(loader)
    engine.state.epoch_length = len(loader)


def require_batches(loader: DataLoader, part: str) -> None:
    """Refuse a loader that gives no batch, with which nothing would be unlearned.

    Raises:
        ValueError: if its length is 0.
    """
    if len(loader) == 0:
        raise ValueError(
            f"The loader of {part} samples should give at least one batch, but gives none. "
            "Use a smaller batch size, or drop_last=False."
        )


def is_iterating(engine: Engine) -> bool:
    """Whether the engine is inside a run's loop: False again as soon as the run ended, also by an exception.

    A hook that an exception left on the user's network or optimizer asks this before it does anything. Ignite has
    no public state for it: its loader iterator is dropped on every way out of a run.
    """
    return getattr(engine, "_dataloader_iter", None) is not None


def parameter_name(name: str) -> str:
    """A parameter's name without what DataParallel, DistributedDataParallel and torch.compile put before it."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name


def plain_network(engine: SupervisedTrainer) -> torch.nn.Module:
    """The trainer's network without what compilation and distributed training wrap around it."""
    # The hooks of distributed training would expect a training step.
    network: torch.nn.Module = getattr(engine.network, "_orig_mod", engine.network)
    if isinstance(network, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        network = network.module
    return network


def predict(
    engine: SupervisedTrainer, batch: Any, network: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and target of a batch, as the trainer's own step makes them.

    Within a step that is with the step's automatic mixed precision, elsewhere without.

    Args:
        engine: the trainer.
        batch: a batch of its loader, or of one like it.
        network: another network than the trainer's.
    """
    inputs, targets, args, kwargs = prepare(engine, batch)
    return engine.inferer(inputs, plain_network(engine) if network is None else network, *args, **kwargs), targets


def prepare(engine: SupervisedTrainer, batch: Any) -> tuple[torch.Tensor, torch.Tensor, tuple, dict]:
    """Inputs and targets of a batch on the trainer's device, and further arguments of the network."""
    prepared: Any = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    return (*prepared, (), {}) if len(prepared) == 2 else tuple(prepared)


@contextmanager
def evaluation_mode(network: torch.nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode for the block, and each back into its own mode afterwards.

    The global random state is put back too: a loader draws from it, and the run must not depend on that.
    """
    modes = [(module, module.training) for module in network.modules()]
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    network.eval()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, training in modes:
            module.training = training
