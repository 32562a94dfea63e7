"""Everything that only observes an engine."""

from monai_unlearn.handlers.cost_clock import CostClock
from monai_unlearn.handlers.finite_loss import FiniteLoss
from monai_unlearn.handlers.metrics import BrierScore, ExpectedCalibrationError, SensitivityAtSpecificity
from monai_unlearn.handlers.progress import Progress, on_terminal
from monai_unlearn.handlers.sample_history import SCORES, SampleHistory, read_history

__all__ = [
    "SCORES",
    "BrierScore",
    "CostClock",
    "ExpectedCalibrationError",
    "FiniteLoss",
    "Progress",
    "SampleHistory",
    "SensitivityAtSpecificity",
    "on_terminal",
    "read_history",
]
