"""How far the unlearned model is from retrained ones, beside how far these are from each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch

from monai_unlearn.evaluation.audited import SPLITS, Audited, Outputs
from monai_unlearn.metrics import (
    activation_distance,
    agreement,
    average_gap,
    forgetting_epsilon,
    forgetting_quality,
    forgetting_score,
    indiscernibility,
    js_divergence,
    klom,
    probabilities,
    retention_deviation,
    tug_of_war,
)

__all__ = ["distance_section"]

Figures = list[float | None]
# Histograms and thresholds over fewer models than this say nothing of a sample.
SEVERAL = 5


def distance_section(audited: Audited, attack_aucs: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Distances to the retrained models; the noise floor is the mean distance between two of them.

    Args:
        audited: outputs of the models.
        attack_aucs: model → AUC of the population attack on each of its models.

    Returns:
        The section ``distance`` of the report; None without a retrained model.
    """
    if not audited.retrained:
        return None
    aucs = {name: [None if np.isnan(auc) else float(auc) for auc in values] for name, values in attack_aucs.items()}
    figures = {
        name: [_figures(outputs, auc, audited.figure) for outputs, auc in zip(group, aucs[name])]
        for name, group in audited.models.items()
    }
    retrained = figures["retrained"]
    mean = [_mean([model[i] for model in retrained]) for i in range(len(retrained[0]))]

    def beside(distance: Callable[[Figures, Figures], float | None], part: slice) -> dict[str, float | None]:
        # Both ways round: a deviation in per cent is not symmetric.
        pairs = [distance(a[part], b[part]) for a, b in permutations(retrained, 2)]
        own = {name: distance(figures[name][0][part], mean[part]) for name in ("original", "unlearned")}
        return {**own, "floor": _mean(pairs)}

    gap = beside(average_gap, slice(None))
    accuracies = slice(0, 3)  # forget, retain, test
    harm = {}
    for split, i in (("retain", 1), ("test", 2)):
        reference, own = mean[i], figures["unlearned"][0][i]
        harm[split] = None if reference is None or own is None else 100 * max(0.0, reference - own)
    floor, original, unlearned = gap["floor"], gap["original"], gap["unlearned"]
    return {
        "splits": {split: _outputs(audited, split) for split in SPLITS},
        "average_gap": gap,
        "excess": None if floor is None or unlearned is None else max(0.0, unlearned - floor),
        "power": None if floor is None or original is None else bool(original >= 3 * floor),
        "tug_of_war": beside(tug_of_war, accuracies),
        "retention_deviation": beside(retention_deviation, accuracies),
        "indiscernibility": {
            name: _mean([None if auc is None else indiscernibility(auc) for auc in values])
            for name, values in aucs.items()
        },
        "harm": harm,
        "klom": _klom(audited),
        "epsilon": _epsilon(audited),
        "relearn": None,
    }


def _figures(outputs: Outputs, auc: float | None, figure: str) -> Figures:
    return [*(getattr(outputs[split], figure) for split in ("forget", "retain", "test")), auc]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined and len(defined) == len(values) else None


def _outputs(audited: Audited, split: str) -> dict[str, dict[str, float | None]]:
    """Distances between the outputs on one split."""
    multi_label = audited.multi_label
    shares = {
        name: [probabilities(torch.from_numpy(outputs[split].logits), multi_label).numpy() for outputs in group]
        for name, group in audited.models.items()
    }
    distances: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "js_divergence": lambda p, q: js_divergence(p, q, multi_label),
        "activation_distance": activation_distance,
        "agreement": lambda p, q: agreement(p, q, multi_label),
    }
    retrained = shares["retrained"]
    found: dict[str, dict[str, float | None]] = {}
    for figure, distance in distances.items():
        found[figure] = {
            name: _mean([float(distance(shares[name][0], other).mean()) for other in retrained])
            for name in ("original", "unlearned")
        }
        found[figure]["floor"] = _mean([float(distance(p, q).mean()) for p, q in combinations(retrained, 2)])
    return found


def _klom(audited: Audited) -> dict[str, Any] | None:
    """KLoM between all unlearned and all retrained models; its floor between two halves of the retrained ones."""
    if min(len(audited.unlearned), len(audited.retrained)) < SEVERAL:
        return None

    def mean(split: str, ours: Sequence[Outputs], theirs: Sequence[Outputs]) -> float | None:
        margins = [np.stack([outputs[split].scores for outputs in group]) for group in (ours, theirs)]
        known = ~np.isnan(margins[0]).any(axis=0) & ~np.isnan(margins[1]).any(axis=0)
        return float(klom(margins[0][:, known], margins[1][:, known]).mean()) if known.any() else None

    found: dict[str, Any] = {split: mean(split, audited.unlearned, audited.retrained) for split in SPLITS}
    half = len(audited.retrained) // 2
    first, second = audited.retrained[:half], audited.retrained[half : 2 * half]
    found["floor"] = {split: mean(split, first, second) for split in SPLITS} if half >= SEVERAL else None
    return found


def _epsilon(audited: Audited) -> dict[str, float | None] | None:
    """ε of forgetting over all unlearned and all retrained models."""
    if min(len(audited.unlearned), len(audited.retrained)) < SEVERAL:
        return None
    scores = [np.stack([outputs["forget"].scores for outputs in g]) for g in (audited.unlearned, audited.retrained)]
    known = ~np.isnan(scores[0]).any(axis=0)
    if not known.any():
        return None
    epsilon = forgetting_epsilon(scores[0][:, known], scores[1][:, known])
    pairs = []
    for split in ("retain", "test"):
        ours, theirs = (
            _mean([getattr(outputs[split], audited.figure) for outputs in group])
            for group in (audited.unlearned, audited.retrained)
        )
        pairs.append((ours, theirs))
    score = None
    if all(None not in pair and pair[1] for pair in pairs):
        score = forgetting_score(epsilon, *pairs)
    return {"mean": float(epsilon.mean()), "quality": forgetting_quality(epsilon), "score": score}
