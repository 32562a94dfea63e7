"""Exact unlearning: train again from the recipe's own start, on the retain set alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.checkpoint import load_checkpoint
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    parameter_name,
    require_loaded_weights,
    require_supervised_trainer,
    train_on_retain,
    unwrapped_handlers,
)

__all__ = ["Retrain", "held", "restore"]

State = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike
InitialState = State | Callable[[], State]
# Schedules whose constructor's first step depends on nothing but the epoch, so that it can be taken again.
RESTARTABLE = (
    torch.optim.lr_scheduler.LambdaLR,
    torch.optim.lr_scheduler.StepLR,
    torch.optim.lr_scheduler.MultiStepLR,
    torch.optim.lr_scheduler.ConstantLR,
    torch.optim.lr_scheduler.LinearLR,
    torch.optim.lr_scheduler.ExponentialLR,
    torch.optim.lr_scheduler.PolynomialLR,
    torch.optim.lr_scheduler.CosineAnnealingLR,
    torch.optim.lr_scheduler.OneCycleLR,
)


def held(initial_state: InitialState) -> InitialState:
    """An initial state that stays what it is now: a copy, where it is a live view of weights that are about to change.

    Args:
        initial_state: a state dict, a network, a checkpoint's path, or a function that returns one of these.
    """
    if isinstance(initial_state, nn.Module):
        initial_state = initial_state.state_dict()
    if isinstance(initial_state, Mapping):
        initial_state = {name: value.detach().clone() for name, value in initial_state.items()}
    return initial_state


def restore(network: nn.Module, initial_state: InitialState, names: Collection[str] | None = None) -> None:
    """Set a network's parameters and buffers back to an initial state.

    Args:
        network: the network.
        initial_state: a state of the whole network, see ``held``.
        names: the parameters and buffers to set back, with or without wrappers' prefixes; by default all.

    Raises:
        ValueError: if the state does not hold exactly the network's parameters and buffers, or a name is none of them.
            Nothing is changed then.
    """
    state: Any = initial_state
    if callable(state) and not isinstance(state, nn.Module):
        state = state()
    if isinstance(state, nn.Module):
        state = state.state_dict()
    elif isinstance(state, (str, os.PathLike)):
        state = load_checkpoint(state).state_dict
    start = {parameter_name(name): value for name, value in state.items()}
    own = network.state_dict()
    missing = [name for name in own if parameter_name(name) not in start]
    surplus = len(start) - (len(own) - len(missing))
    wrong = [name for name, v in own.items() if name not in missing and v.shape != start[parameter_name(name)].shape]
    if missing or surplus or wrong:
        raise ValueError(
            f"initial_state should hold exactly the network's {len(own)} parameters and buffers, but "
            f"{len(missing)} are missing, {len(wrong)} have another shape and {surplus} are unknown "
            f"(first: {(missing + wrong + ['-'])[0]}). Old weights must not survive a retraining."
        )
    wanted = start.keys() if names is None else {parameter_name(name) for name in names}
    unknown = sorted(wanted - start.keys())
    if unknown:
        raise ValueError(
            f"names should be those of the network's parameters and buffers, but {len(unknown)} are not "
            f"(first: {unknown[0]})."
        )
    # What is not named is its own start, so that the state is a whole one, which is loaded strictly.
    chosen = {name: start[parameter_name(name)] for name in own if parameter_name(name) in wanted}
    network.load_state_dict({**own, **chosen}, strict=True)


class Retrain:
    """Train from the recipe's own start on the retain set alone: the yardstick of every other method.

    Runs on ``STARTED``: all parameters and buffers are set to the initial state, the optimizer's state is cleared,
    learning-rate schedules of ``LrScheduleHandler`` start again, and a loader of retain samples takes the place of
    the trainer's (same batch size, order and transforms). Everything else is the trainer's own recipe.

    Args:
        forget: the forget set.
        initial_state: where the recipe started: a state dict, a network, the path of a checkpoint (pretrained
            weights, if the original began with them), or a function that returns one of these.
        loader: retain samples only; by default made from the trainer's own loader.

    Raises:
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        ValueError: if the initial state is not complete, or retain samples can't be found.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or a schedule can't be started again.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[Retrain(forget, initial_state=lambda: ResNet(...))])
    """

    def __init__(
        self,
        forget: ForgetSet,
        *,
        initial_state: InitialState,
        loader: DataLoader | None = None,
    ) -> None:
        self.forget = forget
        self.initial_state = held(initial_state)
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        restore(engine.network, self.initial_state)
        self._restore_optimizer(engine)
        train_on_retain(engine, self.forget, self.loader)

    @staticmethod
    def _restore_optimizer(engine: SupervisedTrainer) -> None:
        engine.optimizer.state.clear()
        handlers = {
            id(handler): handler
            for event in list(engine._event_handlers)
            for handler in unwrapped_handlers(engine, event)
            if isinstance(handler, LrScheduleHandler)
        }
        for handler in handlers.values():
            scheduler: Any = handler.lr_scheduler
            if getattr(scheduler, "last_epoch", None) == 0:
                continue  # as it was made
            if not isinstance(scheduler, RESTARTABLE):
                raise RuntimeError(
                    f"A {type(scheduler).__name__} that has already taken steps can't be started again. "
                    "Make the optimizer and its schedule anew for retraining."
                )
            for group in scheduler.optimizer.param_groups:
                group["lr"] = copy.deepcopy(group["initial_lr"])  # may be a tensor, which schedules change in place
            scheduler.last_epoch = -1
            scheduler._initial_step()  # as in the constructor: a plain step would decay the rate once too often
