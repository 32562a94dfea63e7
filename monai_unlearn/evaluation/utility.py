"""The audit's second question: whom did the change hurt? Figures of use on each split, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from monai_unlearn.evaluation.audited import Audited, AuditOptions
from monai_unlearn.evaluation.evaluate import SplitResult
from monai_unlearn.metrics import (
    auroc_influence,
    brier,
    calibration_error,
    false_negatives,
    group_numbers,
    interval,
    probabilities,
    reliability,
    resampled_sums,
    sensitivity_at_specificity,
    threshold_at_specificity,
)

__all__ = ["Predictions", "reliability_section", "utility_section"]

UTILITY_SPLITS = ("retain", "validation", "test")
FIGURES = ("accuracy", "auroc", "sensitivity", "brier", "ece")
BINS = 15
NAN = float("nan")


@dataclass(frozen=True)
class Predictions:
    """One model's probabilities on one split, and what is asked of them.

    Args:
        result: the model's result.
        multi_label: whether the columns are findings.
        people: number of the person on each image, or None.
    """

    result: SplitResult
    multi_label: bool
    people: np.ndarray | None = None

    @cached_property
    def shares(self) -> np.ndarray:
        """Probability of each class or finding, n × C."""
        return probabilities(torch.from_numpy(self.result.logits), self.multi_label).numpy()

    @cached_property
    def present(self) -> np.ndarray:
        """Whether each class or finding is there, n × C: 1, 0 or, where that is not known, NaN."""
        if not self.multi_label:
            return np.eye(self.result.logits.shape[1])[self.result.labels]
        labels = self.result.labels.astype(np.float64)
        return np.where(np.isnan(labels) | (labels == 0.5), np.nan, labels > 0.5)

    @cached_property
    def right(self) -> np.ndarray:
        """Number of questions of each image that are answered rightly, n; of a class there is one."""
        if not self.multi_label:
            return (self.result.logits.argmax(1) == self.result.labels).astype(np.float64)
        return ((self.result.logits > 0) == self.present).sum(1).astype(np.float64)

    @cached_property
    def asked(self) -> np.ndarray:
        """Number of questions of each image whose answer is known, n."""
        return (~np.isnan(self.present)).sum(1).astype(np.float64) if self.multi_label else np.ones(self.result.n)

    @cached_property
    def brier(self) -> np.ndarray:
        """Brier score of each image, n; NaN where nothing is known."""
        return brier(self.shares, self.result.labels)

    @cached_property
    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Confidence minus what happened, summed in each bin, n × bins; and the number of pairs of each image, n."""
        sums = np.zeros((self.result.n, BINS))
        if self.multi_label:
            rows, columns = np.nonzero(~np.isnan(self.result.labels))
            confidence, happened = self.shares[rows, columns], self.result.labels[rows, columns].astype(np.float64)
        else:
            rows, confidence, happened = np.arange(self.result.n), self.shares.max(1), self.right
        place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
        np.add.at(sums, (rows, place), confidence - happened)
        return sums, np.bincount(rows, minlength=self.result.n).astype(np.float64)

    @cached_property
    def influences(self) -> tuple[np.ndarray, np.ndarray]:
        """AUROC of each class or finding, C; and each image's contribution to their errors, n × C."""
        found = []
        for scores, present in zip(self.shares.T, self.present.T):
            known = ~np.isnan(present)
            contributions = np.zeros(len(scores))
            people = None if self.people is None else self.people[known]
            auroc, contributions[known] = auroc_influence(scores[known], present[known] == 1, people)
            found.append((auroc, contributions))
        return np.array([auroc for auroc, _ in found]), np.stack([part for _, part in found], axis=1)

    def missed(self) -> np.ndarray:
        """Whether each class or finding is there and not predicted, n × C."""
        if self.multi_label:
            return (self.result.logits <= 0) & (self.present == 1)
        predicted = np.eye(self.result.logits.shape[1])[self.result.logits.argmax(1)]
        return (predicted == 0) & (self.present == 1)

    def found(self, specificity: float) -> np.ndarray:
        """Whether each class or finding is there and found at a specificity, n × C; NaN where that is undefined."""
        columns = []
        for scores, present in zip(self.shares.T, self.present.T):
            threshold = threshold_at_specificity(scores, present, specificity)
            if np.isnan(threshold):
                columns.append(np.full(len(scores), np.nan))
            else:
                columns.append(((present == 1) & ~false_negatives(scores, present, threshold)).astype(np.float64))
        return np.stack(columns, axis=1)

    def figures(self, rows: np.ndarray | slice, specificity: float) -> dict[str, float]:
        """Accuracy, AUROC, sensitivity, Brier score and calibration error of rows."""
        labels, shares, present = self.result.labels[rows], self.shares[rows], self.present[rows]
        asked = self.asked[rows].sum()
        known = ~np.isnan(self.brier[rows])
        aurocs = [_auroc(s, p) for s, p in zip(shares.T, present.T)]
        # The AUROC of several classes is undefined where one is absent; of findings those that are defined count.
        defined = [auroc for auroc in aurocs if not np.isnan(auroc)]
        complete = len(defined) == len(aurocs) or self.multi_label
        figures = {
            "accuracy": float(self.right[rows].sum() / asked) if asked else NAN,
            "auroc": float(np.mean(defined)) if defined and complete else NAN,
        }
        each = [sensitivity_at_specificity(s, p, specificity) for s, p in zip(shares.T, present.T)]
        figures["sensitivity"] = _mean_defined(each)
        figures["brier"] = float(self.brier[rows][known].mean()) if known.any() else NAN
        figures["ece"] = calibration_error(shares, labels, BINS) if len(labels) else NAN
        return figures


def predictions(audited: Audited, split: str) -> dict[str, list[Predictions]]:
    """Model → predictions of each of its models on a split."""
    return {
        name: [Predictions(outputs[split], audited.multi_label, audited.facts[split].people) for outputs in group]
        for name, group in audited.models.items()
    }


def utility_section(audited: Audited, options: AuditOptions) -> dict[str, Any]:
    """Figures of use of each model on retain, validation and test images, and how they changed.

    Intervals are of paired bootstrap resamples of images or, where the data has patients, of patients; of AUROCs they
    are DeLong's. The thresholds of sensitivities stay those of the whole split in the resamples.

    Args:
        audited: outputs of the models.
        options: how to audit.

    Returns:
        The section ``utility`` of the report.
    """
    return {split: _split(audited, split, options) for split in UTILITY_SPLITS}


def reliability_section(audited: Audited) -> dict[str, Any]:
    """How sure each model is against how often it is right, on the test set; of retrained models that of the first."""
    section: dict[str, Any] = {"original": None, "unlearned": None, "retrained": None}
    for name, group in predictions(audited, "test").items():
        found = reliability(group[0].shares, group[0].result.labels, BINS)
        section[name] = {key: values.tolist() for key, values in found.items()}
    return {"test": section}


def _split(audited: Audited, split: str, options: AuditOptions) -> dict[str, Any]:
    models, people = predictions(audited, split), audited.facts[split].people
    figures = {
        name: _averaged([one.figures(slice(None), options.specificity) for one in group])
        for name, group in models.items()
    }
    resampled = _resampled(models, people, options)
    others = [name for name in ("original", "retrained") if name in models]
    changes: dict[str, Any] = {"original": None, "retrained": None}
    for other in others:
        changes[other] = {
            figure: _change(
                figures["unlearned"][figure] - figures[other][figure],
                resampled["unlearned"][figure] - resampled[other][figure],
            )
            for figure in FIGURES
            if figure != "auroc"
        }
        changes[other]["auroc"] = auroc_change(models["unlearned"], models[other], people)
    return {
        "models": {name: figures.get(name) for name in ("original", "unlearned", "retrained")},
        "changes": changes,
        "classes": _classes(audited.class_names, models, resampled, options.specificity),
    }


def _resampled(
    models: Mapping[str, Sequence[Predictions]], people: np.ndarray | None, options: AuditOptions
) -> dict[str, dict[str, np.ndarray]]:
    """Model → figure → its value in each resample, R (``missed``: R × C); averaged over models of one name."""
    first = models["original"][0]
    columns: list[np.ndarray] = [first.asked[:, None], (first.present == 1).astype(np.float64)]
    for group in models.values():
        for one in group:
            sums, pairs = one.calibration
            known = ~np.isnan(one.brier)
            columns += [
                *(one.right[:, None], known[:, None], np.nan_to_num(one.brier)[:, None]),
                *(sums, pairs[:, None], np.nan_to_num(one.found(options.specificity)), one.missed()),
            ]
    sizes = np.cumsum([column.shape[1] for column in columns])
    drawn = resampled_sums(np.concatenate(columns, axis=1, dtype=np.float64), people, options.resamples, options.seed)
    parts = iter(np.split(drawn, sizes[:-1], axis=1))
    asked, positives = next(parts)[:, 0], next(parts)
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, group in models.items():
            each = []
            for one in group:
                right, known, score, sums, pairs, detected, missed = (next(parts) for _ in range(7))
                defined = ~np.isnan(one.found(options.specificity)).any(axis=0)
                shares = np.where(defined & (positives > 0), detected / positives, np.nan)
                each.append(
                    {
                        "accuracy": right[:, 0] / asked,
                        "sensitivity": _row_mean(shares),
                        "brier": score[:, 0] / known[:, 0],
                        "ece": np.abs(sums).sum(1) / pairs[:, 0],
                        "missed": missed / positives,
                    }
                )
            found[name] = {figure: np.mean([one[figure] for one in each], axis=0) for figure in each[0]}
    return found


def _classes(
    names: Sequence[str],
    models: Mapping[str, Sequence[Predictions]],
    resampled: Mapping[str, Mapping[str, np.ndarray]],
    specificity: float,
) -> dict[str, Any]:
    """Figures of each class or finding, and how many more of those who have it are missed."""
    present = models["original"][0].present
    missed = {name: np.mean([one.missed().sum(0) for one in group], axis=0) for name, group in models.items()}
    section: dict[str, Any] = {}
    for c, class_name in enumerate(names):
        positives = int((present[:, c] == 1).sum())
        figures: dict[str, Any] = {"original": None, "unlearned": None, "retrained": None}
        for name, group in models.items():
            sensitivities = [
                sensitivity_at_specificity(one.shares[:, c], one.present[:, c], specificity) for one in group
            ]
            figures[name] = {
                "auroc": float(np.mean([one.influences[0][c] for one in group])),
                "sensitivity": float(np.mean(sensitivities)),
                "false_negatives": float(missed[name][c]),
            }
        section[class_name] = {"positives": positives, "models": figures, "false_negatives": {}}
        for other in ("original", "retrained"):
            change = None
            if other in models and positives:
                change = _change(  # in percentage points of those who have it
                    100 * (missed["unlearned"][c] - missed[other][c]) / positives,
                    100 * (resampled["unlearned"]["missed"][:, c] - resampled[other]["missed"][:, c]),
                )
            section[class_name]["false_negatives"][other] = change
    return section


def auroc_change(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], people: np.ndarray | None
) -> dict[str, float]:
    """Difference of mean AUROCs with DeLong's interval, paired over models and classes, by patient.

    Args:
        ours: the models of one name on a split.
        theirs: those of another, on the same images.
        people: number of the person on each image, or None.
    """
    aurocs, contributions = zip(*(_mean_auroc(group) for group in (ours, theirs)))
    difference = aurocs[0] - aurocs[1]
    if np.isnan(difference):
        return {"difference": NAN, "low": NAN, "high": NAN}
    each = contributions[0] - contributions[1]
    error = 1.96 * float(np.sqrt(np.square(np.bincount(group_numbers(people, len(each)), weights=each)).sum()))
    return {"difference": difference, "low": difference - error, "high": difference + error}


def _mean_auroc(group: Sequence[Predictions]) -> tuple[float, np.ndarray]:
    """Mean AUROC over classes and models, and each image's contribution to its error."""
    aurocs, contributions = [], []
    for one in group:
        each, parts = one.influences
        defined = ~np.isnan(each)
        if not defined.any() or not (one.multi_label or defined.all()):
            return NAN, np.zeros(one.result.n)
        aurocs.append(each[defined].mean())
        contributions.append(parts[:, defined].mean(axis=1))
    return float(np.mean(aurocs)), np.mean(contributions, axis=0)


def _auroc(scores: np.ndarray, present: np.ndarray) -> float:
    known = ~np.isnan(present)
    return auroc_influence(scores[known], present[known] == 1)[0]


def _averaged(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}


def _change(difference: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = interval(resampled)
    return {"difference": float(difference), "low": low, "high": high}


def _mean_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else NAN


def _row_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each row over what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    n = defined.sum(1)
    return np.divide(np.where(defined, values, 0).sum(1), n, out=np.full(len(values), np.nan), where=n > 0)
