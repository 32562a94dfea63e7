"""Figures: arrays in, numbers out, no engine."""

from monai_unlearn.metrics.attack import attack_auc, attack_auc_interval, log_odds
from monai_unlearn.metrics.gap import average_gap

__all__ = ["attack_auc", "attack_auc_interval", "average_gap", "log_odds"]
