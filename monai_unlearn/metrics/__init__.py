"""Figures: arrays in, numbers out, no engine."""

from monai_unlearn.metrics.attack import (
    AttackFigures,
    Sides,
    attack_auc,
    attack_figures,
    attack_roc,
    cross_fitted_scores,
    detectable_difference,
    matching_weights,
)
from monai_unlearn.metrics.auroc import auroc_influence, auroc_per_finding, known_accuracy, mean_auroc
from monai_unlearn.metrics.calibration import brier, calibration_error, reliability
from monai_unlearn.metrics.difficulty import el2n
from monai_unlearn.metrics.distance import (
    activation_distance,
    agreement,
    forgetting_epsilon,
    forgetting_quality,
    forgetting_score,
    js_divergence,
    klom,
)
from monai_unlearn.metrics.gap import average_gap, indiscernibility, retention_deviation, tug_of_war
from monai_unlearn.metrics.per_example import lira_scores, pairwise_ratio_scores, ratio_scores
from monai_unlearn.metrics.resampling import group_numbers, interval, resampled_counts, resampled_sums, two_sided_p
from monai_unlearn.metrics.scores import finding_log_odds, log_odds, modified_entropy, probabilities, sample_loss
from monai_unlearn.metrics.sensitivity import false_negatives, sensitivity_at_specificity, threshold_at_specificity
from monai_unlearn.metrics.subgroups import age_bands, groups_of, holm, largest_difference, permutation_test

__all__ = [
    "AttackFigures",
    "Sides",
    "activation_distance",
    "age_bands",
    "agreement",
    "attack_auc",
    "attack_figures",
    "attack_roc",
    "auroc_influence",
    "auroc_per_finding",
    "average_gap",
    "brier",
    "calibration_error",
    "cross_fitted_scores",
    "detectable_difference",
    "el2n",
    "false_negatives",
    "finding_log_odds",
    "forgetting_epsilon",
    "forgetting_quality",
    "forgetting_score",
    "group_numbers",
    "groups_of",
    "holm",
    "indiscernibility",
    "interval",
    "js_divergence",
    "klom",
    "known_accuracy",
    "largest_difference",
    "lira_scores",
    "log_odds",
    "matching_weights",
    "mean_auroc",
    "modified_entropy",
    "pairwise_ratio_scores",
    "permutation_test",
    "probabilities",
    "ratio_scores",
    "reliability",
    "resampled_counts",
    "resampled_sums",
    "retention_deviation",
    "sample_loss",
    "sensitivity_at_specificity",
    "threshold_at_specificity",
    "tug_of_war",
    "two_sided_p",
]
