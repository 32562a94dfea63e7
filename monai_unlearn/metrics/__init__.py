"""Figures: arrays in, numbers out, no engine."""

from monai_unlearn.metrics.attack import (
    attack_auc,
    attack_auc_interval,
    detectable_difference,
    finding_log_odds,
    log_odds,
)
from monai_unlearn.metrics.auroc import auroc_per_finding, known_accuracy, mean_auroc
from monai_unlearn.metrics.difficulty import el2n
from monai_unlearn.metrics.gap import average_gap

__all__ = [
    "attack_auc",
    "attack_auc_interval",
    "auroc_per_finding",
    "average_gap",
    "detectable_difference",
    "el2n",
    "finding_log_odds",
    "known_accuracy",
    "log_odds",
    "mean_auroc",
]
