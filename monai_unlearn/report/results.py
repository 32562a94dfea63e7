"""The report for programs: one nesting, plain numbers, null for what is undefined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_unlearn.cost import Cost
from monai_unlearn.metrics import average_gap
from monai_unlearn.report.numbers import interval, percent
from monai_unlearn.report.verdict import verdict_line

__all__ = ["MAIN_FIGURE", "SCHEMA_VERSION", "build_report", "gap_figures", "terminal_table"]

SCHEMA_VERSION = "1.2"
SPLITS = ("forget", "retain", "validation", "test")
UNLEARNING = ("mask", "tuning", "unlearn")  # the phases that unlearning needed
PHASES = (*UNLEARNING, "retrain", "evaluation", "caching")
# The figure that a task is judged by: where most findings are absent, accuracy says little.
MAIN_FIGURE = {"multi-class": "accuracy", "multi-label": "auroc"}


def gap_figures(model: Mapping[str, Mapping], task: str = "multi-class") -> list[float | None]:
    """The figures whose distance to the retrained model is averaged.

    Three accuracies, or mean AUROCs of a multi-label task, and the attack's AUC.
    """
    return [*(model[split][MAIN_FIGURE[task]] for split in ("forget", "retain", "test")), model["attack"]["auc"]]


def build_report(
    method: str,
    settings: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Mapping]],
    cost: Mapping[str, Cost],
    provenance: Mapping[str, Any],
    *,
    task: str = "multi-class",
    request: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    audit: Mapping[str, Any] | None = None,
    left: Sequence[Mapping[str, Any]] = (),
    measured_together: bool | None = None,
) -> dict[str, Any]:
    """Put results into the report's form, which report.schema.json beside this module describes.

    Args:
        method: name of the method.
        settings: setting → value.
        models: ``original``, ``unlearned`` and, if there is one, ``retrained`` → split → figures, and ``attack`` →
            ``auc``, ``low``, ``high``.
        cost: phase → cost. ``evaluation`` and ``caching`` stand beside the cost of unlearning, not in it.
        provenance: where all of it comes from.
        task: ``multi-class``, or ``multi-label``, whose splits have ``auroc_per_finding`` too.
        request: who was to be forgotten, in numbers, as ``Split.request`` has it.
        notes: sentences that a reader should know beside the figures.
        audit: the audit's figures, as docs/quickstart.md describes them.
        left: what still holds data of the forget set or weights from before: ``what``, ``path``, ``ours``, ``holds``.
        measured_together: whether unlearning and retraining were timed in one run on one machine; None if that is not
            known.

    Returns:
        The report, as docs/quickstart.md describes it. Nothing in it is shared with the arguments.

    Raises:
        ValueError: if ``task`` is none of the two.
    """
    if task not in MAIN_FIGURE:
        raise ValueError(f"task should be one of {', '.join(MAIN_FIGURE)}, but got {task!r}.")
    figures = _plain(models)
    gap = None
    if "retrained" in figures:
        gap = average_gap(gap_figures(figures["unlearned"], task), gap_figures(figures["retrained"], task))
    left_out = None
    if task == "multi-label":  # a question of the labels, which are the same for all models
        left_out = {
            split: [name for name, auroc in figures["original"][split]["auroc_per_finding"].items() if auroc is None]
            for split in SPLITS
        }
    costs: dict[str, Any] = {phase: cost[phase].as_dict() if phase in cost else None for phase in PHASES}
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task,
        "method": method,
        "settings": _plain(settings),
        "models": {name: figures.get(name) for name in ("original", "unlearned", "retrained")},
        "gap_to_retrained": gap,
        "findings_left_out": left_out,
        "audit": _plain(audit),
        "cost": {**costs, "ratio": _ratio(cost, measured_together)},
        "request": _plain(request),
        "left": _plain(left),
        "finalised": None,
        "notes": list(notes),
        "provenance": _plain(provenance),
    }


def _ratio(cost: Mapping[str, Cost], measured_together: bool | None) -> dict[str, Any] | None:
    """Everything for unlearning ÷ retraining; None where either was not measured."""
    if "retrain" not in cost or "unlearn" not in cost:
        return None
    whole = sum((cost[phase] for phase in UNLEARNING if phase in cost), Cost())
    return {
        name: getattr(whole, name) / getattr(cost["retrain"], name) if getattr(cost["retrain"], name) else None
        for name in ("seconds", "samples")
    } | {"measured_together": measured_together}


def _plain(value: Any) -> Any:
    """A copy of what JSON can hold: NumPy's numbers as Python's, and null for what is no finite number."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal_table(report: Mapping[str, Any]) -> str:
    """The report's main figures as a short table for a terminal."""
    figure = MAIN_FIGURE[report["task"]]
    heading = "AUROC in %" if figure == "auroc" else "accuracy in %"
    lines = [f"{heading:<14}" + "".join(f"{name:>12}" for name in SPLITS) + "   attack AUC (95 % interval)"]
    for name, model in report["models"].items():
        if model is None:
            continue
        cells = "".join(f"{percent(model[split][figure]):>12}" for split in SPLITS)
        lines.append(f"{name:<14}{cells}   {interval(model['attack'])}")
    counts = "".join(f"{report['models']['original'][split]['n']:>12}" for split in SPLITS)
    lines.append(f"{'images':<14}{counts}\n")
    gap = report["gap_to_retrained"]
    if gap is not None:
        lines.append(f"Mean gap to the retrained model: {gap:.1f} points (forget, retain, test, attack)")
    if report["audit"] is not None:
        lines.append(verdict_line(report))
    lines.append(cost_sentence(report["cost"]))
    warning = request_warning(report["request"])
    if warning is not None:
        lines.append(warning)
    return "\n".join(lines)


def request_warning(request: Mapping[str, Any] | None) -> str | None:
    """What a reader of the figures should know of the request, in one sentence, or None."""
    request = request or {}
    parts = []
    if unmatched := request.get("unmatched"):
        parts.append(f"{unmatched} of its {request['entries']} entries matched nothing")
    if partly := request.get("partly_forgotten"):
        parts.append(f"{partly} of {request['patients']} patients keep some of their images")
    overlap = request.get("overlap") or {}
    if overlap.get("option") == "keep" and overlap["images"]:
        parts.append(f"{overlap['images']} validation and test images of the same patients are still evaluated on")
    return f"Mind the request: {'; '.join(parts)}." if parts else None


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """What unlearning cost, against retraining."""
    parts = [part for phase in UNLEARNING if (part := cost[phase]) is not None]
    if not parts:
        return "Cost: not measured"
    whole = {name: sum(part[name] for part in parts) for name in ("seconds", "samples")}
    sentence = f"Cost: {whole['seconds']:.1f} s and {whole['samples']:,} samples"
    if cost["mask"] is not None and cost["mask"]["samples"]:
        sentence += f" (the mask {cost['mask']['seconds']:.1f} s of it)"
    if cost["retrain"] is not None:
        sentence += f"; retraining took {cost['retrain']['seconds']:.1f} s and {cost['retrain']['samples']:,} samples"
    return sentence
