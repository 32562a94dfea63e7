"""The audit: networks on named splits."""

from monai_unlearn.evaluation.evaluate import SplitResult, evaluate, probabilities_and_one_hot

__all__ = ["SplitResult", "evaluate", "probabilities_and_one_hot"]
