"""Networks × named splits → figures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from ignite.handlers import EpochOutputStore
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.utils import CommonKeys
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.metrics import auroc_per_finding, el2n, finding_log_odds, log_odds

__all__ = ["SplitResult", "evaluate", "probabilities_and_one_hot"]

FIGURES = ("accuracy", "auroc", "loss")


@dataclass(frozen=True)
class SplitResult:
    """A network's figures on one split.

    Args:
        accuracy: share of samples whose largest output is the true class, in [0, 1]; of a multi-label task the share
            of known findings that are right.
        auroc: mean over classes of one-against-rest AUROC, in [0, 1]; None where a class is absent. Of a multi-label
            task the mean over the findings for which it is defined.
        loss: mean loss.
        n: number of samples.
        balanced_accuracy: mean over the classes present of the share that is right, in [0, 1]; None for a multi-label
            task.
        scores: log-odds of the true class of each sample, float64, in the order of the loader; of a multi-label task
            their mean over the known findings, NaN where none is known.
        difficulty: EL2N score of each sample, float64; higher is harder.
        logits: the network's outputs, n × C, float32, and
        labels: the labels, n integers or n × L floating point, both in the order of the loader.
        auroc_per_finding: of a multi-label task, finding → AUROC, None where it is present in all samples or in none.
    """

    accuracy: float | None
    auroc: float | None
    loss: float | None
    n: int
    balanced_accuracy: float | None
    scores: np.ndarray
    difficulty: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    auroc_per_finding: dict[str, float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures that a report has of each model and split."""
        figures = {"accuracy": self.accuracy, "auroc": self.auroc, "loss": self.loss, "n": self.n}
        return figures if self.auroc_per_finding is None else {**figures, "auroc_per_finding": self.auroc_per_finding}


def probabilities_and_one_hot(output: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities and one-hot labels of an engine's output, as ``monai.handlers.ROCAUC`` takes them."""
    logits, labels = output[CommonKeys.PRED], output[CommonKeys.LABEL]
    return logits.softmax(1), nn.functional.one_hot(labels.long(), logits.shape[1])


def evaluate(
    evaluator: SupervisedEvaluator,
    network: nn.Module,
    loaders: Mapping[str, DataLoader],
    findings: Sequence[str] | None = None,
) -> dict[str, SplitResult]:
    """Run an evaluator over splits, one pass each.

    Labels of shape B × L are those of a multi-label task: findings in [0, 1], NaN where one is not known.

    Args:
        evaluator: an evaluator without decollation whose metrics are named accuracy, auroc and loss; its network
            and loader are set for each run.
        network: the network to evaluate, in evaluation mode; left as it was.
        loaders: split name → loader in a fixed order.
        findings: names of the L findings of a multi-label task; by default ``finding 1``, ``finding 2``, ….

    Returns:
        Split name → figures. What is undefined is None.

    Raises:
        ValueError: if the network's output is not finite, or does not fit the labels or the findings.
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
            if labels.ndim == 2:
                results[name] = _multi_label_result(evaluator.state.metrics, logits, labels, findings)
            else:
                results[name] = _result(evaluator.state.metrics, logits, labels)
    finally:
        resets.remove()
        updates.remove()
    return results


def _result(metrics: Mapping[str, float], logits: torch.Tensor, labels: torch.Tensor) -> SplitResult:
    right = (logits.argmax(1) == labels).double()
    recall = [float(right[labels == label].mean()) for label in labels.unique()]
    figures: dict[str, Any] = {name: _defined(metrics.get(name)) for name in FIGURES}
    return SplitResult(
        **figures,
        n=len(labels),
        balanced_accuracy=float(np.mean(recall)),
        scores=log_odds(logits, labels).cpu().numpy(),
        difficulty=el2n(logits, labels).cpu().numpy(),
        logits=logits.float().cpu().numpy(),
        labels=labels.cpu().numpy(),
    )


def _multi_label_result(
    metrics: Mapping[str, float], logits: torch.Tensor, labels: torch.Tensor, findings: Sequence[str] | None
) -> SplitResult:
    names = [f"finding {i + 1}" for i in range(labels.shape[1])] if findings is None else list(findings)
    if len(set(names)) != len(names) or len(names) != labels.shape[1]:
        raise ValueError(
            f"findings should be {labels.shape[1]} different names, one for each column of the labels, but are "
            f"{len(names)}, {len(set(names))} of them different."
        )
    figures: dict[str, Any] = {name: _defined(metrics.get(name)) for name in FIGURES}
    aurocs = auroc_per_finding(logits, labels)
    return SplitResult(
        **figures,
        n=len(labels),
        balanced_accuracy=None,
        scores=finding_log_odds(logits, labels).cpu().numpy(),
        difficulty=el2n(logits, labels).cpu().numpy(),
        logits=logits.float().cpu().numpy(),
        labels=labels.cpu().numpy(),
        auroc_per_finding={name: _defined(auroc) for name, auroc in zip(names, aurocs)},
    )


def _defined(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
