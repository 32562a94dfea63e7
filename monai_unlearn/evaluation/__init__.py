"""Networks × named splits → figures, and the audit that compares them."""

from monai_unlearn.evaluation.attacks import matching_strata
from monai_unlearn.evaluation.audit import audit_outputs
from monai_unlearn.evaluation.audited import SPLITS, Audited, AuditOptions, Facts
from monai_unlearn.evaluation.evaluate import SplitResult, evaluate, probabilities_and_one_hot

__all__ = [
    "SPLITS",
    "AuditOptions",
    "Audited",
    "Facts",
    "SplitResult",
    "audit_outputs",
    "evaluate",
    "matching_strata",
    "probabilities_and_one_hot",
]
