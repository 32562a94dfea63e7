"""The audit: one dictionary of plain numbers from models' outputs on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from monai_unlearn.evaluation.attacks import attack_section, verdict_section
from monai_unlearn.evaluation.audited import Audited, AuditOptions
from monai_unlearn.evaluation.distances import distance_section
from monai_unlearn.evaluation.subgroups import subgroup_section
from monai_unlearn.evaluation.utility import reliability_section, utility_section

__all__ = ["audit_outputs"]


def audit_outputs(audited: Audited, options: AuditOptions | None = None) -> dict[str, Any]:
    """Compare an unlearned model with the original and with retrained ones.

    Args:
        audited: outputs of the models on forget, retain, validation and test images.
        options: how to audit.

    Returns:
        The key ``audit`` of the report, as docs/audit.md explains it; what is undefined is None.

    Raises:
        ValueError: if a column to break down by is not there.
    """
    options = options or AuditOptions()
    audited = audited.in_one_order()
    attacks = attack_section(audited, options)
    section = {
        "options": {
            "resamples": options.resamples,
            "margin": options.margin,
            "specificity": options.specificity,
            "seed": options.seed,
            "unlearned_models": len(audited.unlearned),
            "retrained_models": len(audited.retrained),
        },
        "verdict": verdict_section(attacks, audited, options),
        "attacks": attacks,
        "distance": distance_section(audited, attacks.pop("aucs")),
        "utility": utility_section(audited, options),
        "reliability": reliability_section(audited),
        "subgroups": subgroup_section(audited, options),
        "forget_size": None,
    }
    return defined(section)


def defined(value: Any) -> Any:
    """The same with None in the place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: defined(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
