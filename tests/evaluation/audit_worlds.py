"""Small worlds of models' outputs, and the slow figures that the audit of them is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, mean_squared_error, roc_auc_score, roc_curve

from monai_unlearn.evaluation import SPLITS, Audited, AuditOptions, Facts, SplitResult
from monai_unlearn.metrics import el2n, finding_log_odds, log_odds

SIZES = {"forget": 24, "retain": 40, "validation": 33, "test": 27}
FEW = AuditOptions(resamples=300, seed=3)
MODELS = ("original", "unlearned", "retrained")
NAN = float("nan")
NO_FIGURES = {"accuracy": None, "auroc": None}


def result(logits: np.ndarray, labels: np.ndarray) -> SplitResult:
    """What ``evaluate`` makes of these outputs."""
    z, y = torch.tensor(np.asarray(logits, dtype=np.float32)), torch.tensor(labels)
    multi_label = y.ndim == 2
    return SplitResult(
        **((_of_findings if multi_label else _of_classes)(z.numpy(), labels) if len(labels) else NO_FIGURES),
        loss=1.0,
        n=len(labels),
        balanced_accuracy=None,
        scores=(finding_log_odds if multi_label else log_odds)(z, y).numpy(),
        difficulty=el2n(z, y).numpy(),
        logits=z.numpy(),
        labels=np.asarray(labels),
    )


def _of_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    figures: dict[str, Any] = {"accuracy": float(accuracy_score(labels, logits.argmax(1))), "auroc": None}
    if len(np.unique(labels)) == logits.shape[1]:
        one_hot = np.eye(logits.shape[1])[labels]
        figures["auroc"] = float(roc_auc_score(one_hot, softmax(logits.astype(np.float64), axis=1), average="macro"))
    return figures


def _of_findings(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    known = ~np.isnan(labels) & (labels != 0.5)
    aurocs = [
        float(roc_auc_score(y[k] > 0.5, z[k])) if len(set(y[k] > 0.5)) == 2 else None
        for y, z, k in zip(labels.T, logits.T, known.T)
    ]
    defined = [auroc for auroc in aurocs if auroc is not None]
    return {
        "accuracy": float(np.mean((logits > 0)[known] == (labels > 0.5)[known])) if known.any() else None,
        "auroc": float(np.mean(defined)) if defined else None,
        "auroc_per_finding": {f"c{i}": auroc for i, auroc in enumerate(aurocs)},
    }


def world(
    seed: int = 0,
    *,
    sizes: Mapping[str, int] | None = None,
    classes: int = 3,
    multi_label: bool = False,
    patients: bool = False,
    unlearned: int = 1,
    retrained: int = 1,
    shift: tuple[float, float, float] = (2.0, 0.0, 0.0),
    noise: float = 0.5,
    own: Callable[[np.random.Generator, str, str, np.ndarray], np.ndarray] | None = None,
) -> Audited:
    """Models that agree on how hard an image is, and differ by noise of their own.

    Args:
        seed: seed of everything.
        sizes: images of the splits that should not be of the usual sizes.
        classes: number of classes, or findings.
        multi_label: whether they are findings; a few labels are soft, a fifth and some whole images are not known.
        patients: whether there are about three images a person.
        unlearned: number of unlearned models.
        retrained: number of retrained ones.
        shift: how much surer of the truth the original, the unlearned and the retrained models are on the forget set.
        noise: how far models of one kind are from each other.
        own: changes a model's outputs: of a generator, the model's kind, the split and the outputs.
    """
    random = np.random.default_rng(seed)
    sizes = {**SIZES, **(sizes or {})}
    labels = {split: _labels(random, n, classes, multi_label) for split, n in sizes.items()}
    towards = {split: _towards(y, classes) for split, y in labels.items()}
    base = {split: random.normal(size=(n, classes)) + 1.2 * towards[split] for split, n in sizes.items()}

    def model(kind: str) -> dict[str, SplitResult]:
        found = {}
        for split in SPLITS:
            logits = base[split] + noise * random.normal(size=base[split].shape)
            more = {"forget": shift[MODELS.index(kind)], "retain": 2.0}.get(split, 0.0)
            logits = logits + more * towards[split]
            found[split] = result(logits if own is None else own(random, kind, split, logits), labels[split])
        return found

    return Audited(
        original=model("original"),
        unlearned=[model("unlearned") for _ in range(unlearned)],
        retrained=[model("retrained") for _ in range(retrained)],
        facts={split: _facts(random, n, patients) for split, n in sizes.items()},
        class_names=[f"c{i}" for i in range(classes)],
        multi_label=multi_label,
    )


def _labels(random: np.random.Generator, n: int, classes: int, multi_label: bool) -> np.ndarray:
    if not multi_label:
        return random.permutation(np.arange(n) % classes)
    labels = random.integers(0, 2, (n, classes)).astype(np.float32)
    labels[random.random(labels.shape) < 0.1] = 0.8
    labels[random.random(labels.shape) < 0.05] = 0.5
    labels[random.random(labels.shape) < 0.2] = np.nan
    labels[random.permutation(n)[: n // 12]] = np.nan
    return labels


def _towards(labels: np.ndarray, classes: int) -> np.ndarray:
    """Direction of the outputs in which the truth lies."""
    return np.eye(classes)[labels] if labels.ndim == 1 else np.nan_to_num(2 * labels.astype(np.float64) - 1)


def _facts(random: np.random.Generator, n: int, patients: bool) -> Facts:
    columns = pd.DataFrame(
        {
            "sex": random.choice(["f", "m"], n),
            "age": random.integers(5, 95, n),
            "site": random.choice(["east", "north", "west"], n, p=[0.6, 0.3, 0.1]),
        }
    )
    return Facts(random.integers(0, max(n // 3, 1), n) if patients else None, columns)


def models(audited: Audited) -> dict[str, Sequence[Mapping[str, SplitResult]]]:
    """Name in the report → models of it that are averaged."""
    found = {"original": [audited.original], "unlearned": audited.unlearned[:1], "retrained": audited.retrained}
    return {name: group for name, group in found.items() if group}


def shares(outputs: SplitResult) -> np.ndarray:
    """Probabilities of the classes, or of the findings."""
    logits = outputs.logits.astype(np.float64)
    return softmax(logits, axis=1) if outputs.labels.ndim == 1 else expit(logits)


def rows_of(audited: Audited, rows: Mapping[str, np.ndarray]) -> Audited:
    """The same world with only some images of some splits, or with them in another order."""

    def taken(outputs: Mapping[str, SplitResult]) -> dict[str, SplitResult]:
        return {split: one_of(outputs[split], rows[split]) if split in rows else outputs[split] for split in SPLITS}

    def facts(split: str) -> Facts:
        own = audited.facts[split]
        if split not in rows:
            return own
        people = None if own.people is None else own.people[rows[split]]
        return Facts(people, own.columns.iloc[rows[split]].reset_index(drop=True))

    shadows = audited.shadows
    if shadows is not None:
        n, m = audited.original["forget"].n, audited.original["validation"].n
        targets = np.concatenate([rows.get("forget", np.arange(n)), n + rows.get("validation", np.arange(m))])
        shadows = (shadows[0][:, targets], shadows[1][:, targets])
    return replace(
        audited,
        original=taken(audited.original),
        unlearned=[taken(outputs) for outputs in audited.unlearned],
        retrained=[taken(outputs) for outputs in audited.retrained],
        facts={split: facts(split) for split in SPLITS},
        shadows=shadows,
    )


def one_of(outputs: SplitResult, rows: np.ndarray) -> SplitResult:
    """A split's result on some of its images."""
    return result(outputs.logits[rows], outputs.labels[rows])


# ---- slow figures


def drawn_images(people: np.ndarray | None, n: int, resamples: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Images of each bootstrap resample of whole people, numbered as they first appear."""
    names = np.arange(n) if people is None else np.asarray(people)
    first = list(dict.fromkeys(names.tolist()))
    images = [np.flatnonzero(names == person) for person in first]
    draws = generator.integers(len(first), size=(resamples, len(first)))
    return [np.concatenate([images[person] for person in draw]) for draw in draws]


def percentiles(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval: the (R + 1) p-th of R values in order, between neighbours by their distance."""
    ordered, places = np.sort(values), [(len(values) + 1) * (1 + side * level) / 2 for side in (-1, 1)]
    return tuple(float(np.interp(place, np.arange(1, len(ordered) + 1), ordered)) for place in places)


def weighted_auc(ours: np.ndarray, theirs: np.ndarray, w: np.ndarray, v: np.ndarray) -> float:
    """AUC of weighted members and non-members, pair by pair."""
    above = (ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)
    return float(w @ above @ v / (w.sum() * v.sum()))


def matched(ours: Sequence, theirs: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Weights by which non-members have the members' shares of each stratum, counted one by one."""
    ours, theirs = list(ours), list(theirs)
    there, others = {s: theirs.count(s) for s in set(theirs)}, {s: ours.count(s) for s in set(ours)}
    return (
        np.array([float(s in there) for s in ours]),
        np.array([others.get(s, 0) / there[s] for s in theirs]),
    )


# ---- figures of one model, by scikit-learn


def questions(outputs: SplitResult) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class against the rest, or each finding: images for which it is known, score, and whether it is there."""
    p, labels = shares(outputs), outputs.labels
    if labels.ndim == 1:
        return [(np.arange(len(labels)), p[:, c], labels == c) for c in range(p.shape[1])]
    found = []
    for c in range(p.shape[1]):
        known = np.flatnonzero(~np.isnan(labels[:, c]) & (labels[:, c] != 0.5))
        found.append((known, p[known, c], labels[known, c] > 0.5))
    return found


def sensitivity_of(score: np.ndarray, there: np.ndarray) -> float:
    """Highest sensitivity of a threshold at which nine in ten of the others are rightly left out."""
    if there.all() or not there.any():
        return NAN
    fpr, tpr, _ = roc_curve(there, score, drop_intermediate=False)
    return float(tpr[1 - fpr >= FEW.specificity - 1e-12].max())


def auroc_of(score: np.ndarray, there: np.ndarray) -> float:
    """AUROC, NaN where there is but one class."""
    return NAN if there.all() or not there.any() else float(roc_auc_score(there, score))


def mean_defined(values: Sequence[float]) -> float:
    """Mean of what is no NaN."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else NAN


def calibration(confidence: np.ndarray, happened: np.ndarray) -> float:
    """Expected calibration error of fifteen bins."""
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15 if k else confidence >= 0) & (confidence <= (k + 1) / 15)
        total += abs((confidence[inside] - happened[inside]).sum())
    return total / len(confidence) if len(confidence) else NAN


def pairs(outputs: SplitResult) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and what happened, of each image, or of each known pair of image and finding."""
    p, labels = shares(outputs), outputs.labels
    if labels.ndim == 1:
        return p.max(1), (p.argmax(1) == labels).astype(float)
    known = ~np.isnan(labels)
    return p[known], labels[known].astype(float)


def figures_of(outputs: SplitResult) -> dict[str, float]:
    """Accuracy, AUROC, sensitivity, Brier score and calibration error."""
    if not len(outputs.labels):
        return dict.fromkeys(("accuracy", "auroc", "sensitivity", "brier", "ece"), NAN)
    asked, labels, p = questions(outputs), outputs.labels, shares(outputs)
    aurocs = [auroc_of(score, there) for _, score, there in asked]
    if labels.ndim == 1:
        accuracy = accuracy_score(labels, outputs.logits.argmax(1))
        brier = sum(mean_squared_error(np.eye(p.shape[1])[labels][:, c], p[:, c]) for c in range(p.shape[1]))
        auroc = float(np.mean(aurocs))  # NaN where a class is absent
    else:
        rights = [(outputs.logits[rows, c] > 0) == there for c, (rows, _, there) in enumerate(asked)]
        accuracy = float(np.concatenate(rights).mean()) if sum(map(len, rights)) else NAN
        each = [np.nanmean((a - b) ** 2) for a, b in zip(p, labels.astype(float)) if not np.isnan(b).all()]
        brier = float(np.mean(each)) if each else NAN
        auroc = mean_defined(aurocs)
    return {
        "accuracy": float(accuracy),
        "auroc": auroc,
        "sensitivity": mean_defined([sensitivity_of(score, there) for _, score, there in asked]),
        "brier": float(brier),
        "ece": calibration(*pairs(outputs)),
    }
