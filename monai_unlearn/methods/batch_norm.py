"""What becomes of BatchNorm's running statistics, which carry traces of the forget set too."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    is_iterating,
    predict,
    require_before_savers,
    require_supervised_trainer,
)

__all__ = ["BatchNormPolicy"]

POLICIES = ("retain", "frozen", "plain")


class BatchNormPolicy:
    """Choose what happens to BatchNorm's running statistics during unlearning.

    - ``"retain"``: at the end they are reset and estimated again from up to ``max_batches`` batches of retain
      samples without augmentation, each batch with the same weight. No forget sample is in them then.
    - ``"frozen"``: BatchNorm works with the original statistics, which do not change.
    - ``"plain"``: they follow the training batches, forget samples included, as in the papers.

    Runs on ``STARTED``, before each forward pass of a BatchNorm layer (``"frozen"``) and on ``COMPLETED``
    (``"retain"``). Without BatchNorm in the network it does nothing.

    Args:
        forget: the forget set.
        policy: one of the three above.
        loader: retain samples only, without augmentation; by default made from the trainer's own loader.
        max_batches: most batches for the estimate, at least 1.

    Attributes:
        cost: what the estimate cost.

    Raises:
        ValueError: if an argument is outside its range, or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if it stands after a ``CheckpointSaver``.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[RandomLabeling(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self, forget: ForgetSet, *, policy: str = "retain", loader: DataLoader | None = None, max_batches: int = 50
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy should be one of {', '.join(POLICIES)}, but got {policy!r}.")
        if max_batches < 1:
            raise ValueError(f"max_batches should be at least 1, but got {max_batches!r}.")
        self.forget = forget
        self.policy = policy
        self.loader = loader
        self.max_batches = max_batches
        self.cost = Cost()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_before_savers(engine, self)
        if self.policy == "frozen":

            def use_running_statistics(module: nn.Module, inputs: tuple) -> None:
                if is_iterating(engine):  # not after an exception ended the run and left this hook behind
                    module.training = False

            self._hooks = [
                module.register_forward_pre_hook(use_running_statistics) for module in _batch_norms(engine.network)
            ]

    def _complete(self, engine: SupervisedTrainer) -> None:
        self._release()
        layers = _batch_norms(engine.network)
        if self.policy != "retain" or not layers:
            return
        with seconds_of(self.cost, engine.state.device):
            loader = self.loader
            if loader is None:
                loader = self.forget.retain_loader(engine.data_loader, training=False, max_batches=self.max_batches)
            self._estimate(engine, layers, loader)

    def _estimate(self, engine: SupervisedTrainer, layers: list[_BatchNorm], loader: DataLoader) -> None:
        momenta = [layer.momentum for layer in layers]
        batches = 0
        with torch.no_grad(), evaluation_mode(engine.network):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative mean
                layer.training = True
            try:
                for batch in loader:
                    if _rows(batch) == 1 and batches:  # one sample has no variance to speak of
                        continue
                    _, target = predict(engine, batch)
                    self.cost.samples += len(target)
                    self.cost.forward += len(target)
                    batches += 1
                    if batches == self.max_batches:
                        break
            finally:
                for layer, momentum in zip(layers, momenta):
                    layer.momentum = momentum
        if not batches:
            raise ValueError("The loader of retain samples should hold at least one sample, but is empty.")

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def _rows(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch
    return min(len(value) for value in values if isinstance(value, torch.Tensor))
