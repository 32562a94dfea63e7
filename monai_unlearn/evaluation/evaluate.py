"""Networks × named splits → figures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from ignite.engine import Events
from ignite.handlers import EpochOutputStore
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.utils import CommonKeys
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.metrics import log_odds

__all__ = ["SplitResult", "evaluate", "probabilities_and_one_hot"]

FIGURES = ("accuracy", "auroc", "loss")


@dataclass(frozen=True)
class SplitResult:
    """A network's figures on one split.

    Args:
        accuracy: share of samples whose largest output is the true class, in [0, 1].
        auroc: mean over classes of one-against-rest AUROC, in [0, 1]; None where a class is absent.
        loss: mean loss.
        n: number of samples.
        balanced_accuracy: mean over the classes present of the share that is right, in [0, 1].
        scores: log-odds of the true class of each sample, float64, in the order of the loader.
    """

    accuracy: float | None
    auroc: float | None
    loss: float | None
    n: int
    balanced_accuracy: float
    scores: np.ndarray

    def as_dict(self) -> dict[str, float | int | None]:
        """The figures of the report."""
        return {"accuracy": self.accuracy, "auroc": self.auroc, "loss": self.loss, "n": self.n}


def probabilities_and_one_hot(output: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities and one-hot labels of an engine's output, as ``monai.handlers.ROCAUC`` takes them."""
    logits, labels = output[CommonKeys.PRED], output[CommonKeys.LABEL]
    return logits.softmax(1), nn.functional.one_hot(labels.long(), logits.shape[1])


def evaluate(
    evaluator: SupervisedEvaluator, network: nn.Module, loaders: Mapping[str, DataLoader]
) -> dict[str, SplitResult]:
    """Run an evaluator over splits, one pass each.

    Args:
        evaluator: an evaluator without decollation whose metrics are named accuracy, auroc and loss; its network
            and loader are set for each run.
        network: the network to evaluate, in evaluation mode; left as it was.
        loaders: split name → loader in a fixed order.

    Returns:
        Split name → figures. What is undefined is None.

    Raises:
        ValueError: if the network's output is not finite.
    """
    store = EpochOutputStore(output_transform=from_engine([CommonKeys.PRED, CommonKeys.LABEL]))
    resets = evaluator.add_event_handler(Events.EPOCH_STARTED, store.reset)
    updates = evaluator.add_event_handler(Events.ITERATION_COMPLETED, store.update)
    results = {}
    try:
        for name, loader in loaders.items():
            evaluator.network = network
            evaluator.data_loader = loader
            evaluator.state.epoch_length = len(loader)
            with warnings.catch_warnings():  # an absent class makes AUROC None here, which says it
                warnings.filterwarnings("ignore", message="y values can not be all")
                evaluator.run()
            logits = torch.cat([prediction for prediction, _ in store.data])
            labels = torch.cat([label for _, label in store.data])
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"The network's outputs on the {name} set should be finite, but hold NaN or infinity. "
                    "The training diverged: lower the learning rate."
                )
            results[name] = _result(evaluator.state.metrics, logits, labels)
    finally:
        resets.remove()
        updates.remove()
    return results


def _result(metrics: Mapping[str, float], logits: torch.Tensor, labels: torch.Tensor) -> SplitResult:
    right = (logits.argmax(1) == labels).double()
    recall = [float(right[labels == label].mean()) for label in labels.unique()]
    figures = {name: _defined(metrics.get(name)) for name in FIGURES}
    return SplitResult(
        **figures,
        n=len(labels),
        balanced_accuracy=float(np.mean(recall)),
        scores=log_odds(logits, labels).cpu().numpy(),
    )


def _defined(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
