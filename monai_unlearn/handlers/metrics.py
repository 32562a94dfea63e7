"""Ignite metrics of clinical use, which a user attaches to an evaluator of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from ignite.metrics import EpochMetric

from monai_unlearn.metrics import brier, calibration_error, log_odds, probabilities, sensitivity_at_specificity

__all__ = ["BrierScore", "ExpectedCalibrationError", "SensitivityAtSpecificity"]


class _OfAllOutputs(EpochMetric):
    """A figure of all logits and labels of an epoch, which are kept until it ends.

    It takes plain batches and decollated ones. Labels are classes, of shape B or B × 1 beside logits B × C; or
    findings, B × L in [0, 1] beside logits B × L, NaN where one is not known.
    """

    def __init__(self, output_transform: Callable, device: str | torch.device) -> None:
        super().__init__(self._of, output_transform=output_transform, check_compute_fn=False, device=device)

    def _of(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        if logits.ndim == 1:  # Ignite takes away the axis of a single finding
            logits, labels = logits[:, None], labels[:, None]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "The network's outputs should be finite, but hold NaN or infinity. Lower the learning rate."
            )
        if labels.shape not in (logits.shape[:1], logits.shape):
            raise ValueError(
                "logits should be B × C and labels B, or both B × L, but got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        if labels.ndim == 1 and not bool(torch.isin(labels, torch.arange(logits.shape[1], device=labels.device)).all()):
            raise ValueError(f"labels should be whole numbers from 0 to {logits.shape[1] - 1}, but some are not.")
        return self._figure(logits.cpu().double(), labels.cpu().double())

    def _figure(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        raise NotImplementedError


class BrierScore(_OfAllOutputs):
    """Mean Brier score over the samples, by ``monai_unlearn.metrics.brier``. Lower is better.

    Runs on the events of any Ignite metric, on logits: an evaluator whose postprocessing makes them probabilities or
    classes gives other figures. Labels are classes, of shape B or B × 1 beside logits B × C (not one-hot); or findings,
    B × L in [0, 1] beside logits B × L, NaN where one is not known. Batches may be plain or decollated. Among the
    ``additional_metrics`` of MONAI's evaluator it works too, which are used only beside a ``key_val_metric``.

    Args:
        output_transform: makes logits and labels of an engine's output; of MONAI's engines
            ``from_engine(["pred", "label"])``.
        device: where outputs are kept until the epoch ends.

    Raises:
        ValueError: at the end of an epoch, if logits are not finite or labels do not fit them.

    Example::

        evaluator = SupervisedEvaluator(device=device, val_data_loader=loader, network=network)
        BrierScore(output_transform=from_engine(["pred", "label"])).attach(evaluator, "brier")
        evaluator.run()
        print(evaluator.state.metrics["brier"])
    """

    def __init__(self, output_transform: Callable = lambda output: output, device: str | torch.device = "cpu") -> None:
        super().__init__(output_transform, device)

    def _figure(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        scores = brier(probabilities(logits, labels.ndim == 2).numpy(), labels.numpy())
        return float("nan") if np.isnan(scores).all() else float(np.nanmean(scores))


class ExpectedCalibrationError(_OfAllOutputs):
    """Expected calibration error of an epoch, by ``monai_unlearn.metrics.calibration_error``. Lower is better.

    Runs as ``BrierScore`` does, on the same outputs. MONAI's ``CalibrationError`` is for segmentation: it takes
    probabilities and one-hot labels, and averages over images and channels.

    Args:
        bins: number of bins of equal width, at least 1.
        output_transform: as of ``BrierScore``.
        device: as there.

    Raises:
        ValueError: if ``bins`` is below 1; and as ``BrierScore``.

    Example::

        evaluator = SupervisedEvaluator(device=device, val_data_loader=loader, network=network)
        ExpectedCalibrationError(output_transform=from_engine(["pred", "label"])).attach(evaluator, "ece")
        evaluator.run()
        print(evaluator.state.metrics["ece"])
    """

    def __init__(
        self,
        bins: int = 15,
        output_transform: Callable = lambda output: output,
        device: str | torch.device = "cpu",
    ) -> None:
        if bins < 1:
            raise ValueError(f"bins should be at least 1, but got {bins!r}.")
        self.bins = bins
        super().__init__(output_transform, device)

    def _figure(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        return calibration_error(probabilities(logits, labels.ndim == 2).numpy(), labels.numpy(), self.bins)


class SensitivityAtSpecificity(_OfAllOutputs):
    """Mean over the classes or findings of ``monai_unlearn.metrics.sensitivity_at_specificity``. Higher is better.

    Each class is told from all others by its log-odds, each finding from its absence by its logit. Those that are
    present in all samples of the epoch or in none are left out.

    Runs as ``BrierScore`` does, on the same outputs.

    Args:
        specificity: in (0, 1].
        output_transform: as of ``BrierScore``.
        device: as there.

    Raises:
        ValueError: if ``specificity`` is not in (0, 1]; and as ``BrierScore``.

    Example::

        evaluator = SupervisedEvaluator(device=device, val_data_loader=loader, network=network)
        SensitivityAtSpecificity(0.95, output_transform=from_engine(["pred", "label"])).attach(evaluator, "sensitivity")
        evaluator.run()
        print(evaluator.state.metrics["sensitivity"])
    """

    def __init__(
        self,
        specificity: float = 0.9,
        output_transform: Callable = lambda output: output,
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 < specificity <= 1:
            raise ValueError(f"specificity should be in (0, 1], but got {specificity!r}.")
        self.specificity = specificity
        super().__init__(output_transform, device)

    def _figure(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        columns = range(logits.shape[1])
        if labels.ndim == 2:
            questions = [(logits[:, c], labels[:, c]) for c in columns]
        else:
            questions = [(log_odds(logits, torch.full_like(labels, c)), labels == c) for c in columns]
        found = [
            sensitivity_at_specificity(scores.numpy(), present.numpy(), self.specificity)
            for scores, present in questions
        ]
        return float("nan") if np.isnan(found).all() else float(np.nanmean(found))
