"""The report for programs: one nesting, plain numbers, null for what is undefined."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_unlearn.cost import Cost
from monai_unlearn.metrics import average_gap

__all__ = ["SCHEMA_VERSION", "build_report", "gap_figures", "terminal_table"]

SCHEMA_VERSION = "1.1"
SPLITS = ("forget", "retain", "validation", "test")
PHASES = ("mask", "tuning", "unlearn", "retrain")
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
) -> dict[str, Any]:
    """Put results into the report's form.

    Args:
        method: name of the method.
        settings: setting → value.
        models: ``original``, ``unlearned`` and, if there is one, ``retrained`` → split → figures, and ``attack`` →
            ``auc``, ``low``, ``high``.
        cost: phase → cost.
        provenance: where all of it comes from.
        task: ``multi-class``, or ``multi-label``, whose splits have ``auroc_per_finding`` too.
        request: who was to be forgotten, in numbers, as ``Split.request`` has it.
        notes: sentences that a reader should know beside the figures.

    Returns:
        The report, as docs/quickstart.md describes it.

    Raises:
        ValueError: if ``task`` is none of the two.
    """
    if task not in MAIN_FIGURE:
        raise ValueError(f"task should be one of {', '.join(MAIN_FIGURE)}, but got {task!r}.")
    plain = {
        name: {part: {key: _defined(value) for key, value in figures.items()} for part, figures in parts.items()}
        for name, parts in models.items()
    }
    gap = None
    if "retrained" in plain:
        gap = average_gap(gap_figures(plain["unlearned"], task), gap_figures(plain["retrained"], task))
    left_out = None
    if task == "multi-label":  # a question of the labels, which are the same for all models
        left_out = {
            split: [name for name, auroc in plain["original"][split]["auroc_per_finding"].items() if auroc is None]
            for split in SPLITS
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task,
        "method": method,
        "settings": dict(settings),
        "models": {name: plain.get(name) for name in ("original", "unlearned", "retrained")},
        "gap_to_retrained": gap,
        "findings_left_out": left_out,
        "cost": {phase: cost[phase].as_dict() if phase in cost else None for phase in PHASES},
        "request": None if request is None else copy.deepcopy(dict(request)),
        "notes": list(notes),
        "provenance": dict(provenance),
    }


def _defined(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _defined(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal_table(report: Mapping[str, Any]) -> str:
    """The report's main figures as a short table for a terminal."""
    columns = [*SPLITS, "attack AUC (95 % interval)"]
    figure = MAIN_FIGURE[report["task"]]
    heading = "AUROC in %" if figure == "auroc" else "accuracy in %"
    lines = [f"{heading:<14}" + "".join(f"{name:>12}" for name in SPLITS) + f"   {columns[-1]}"]
    for name, model in report["models"].items():
        if model is None:
            continue
        cells = "".join(f"{percent(model[split][figure]):>12}" for split in SPLITS)
        lines.append(f"{name:<14}{cells}   {interval(model['attack'])}")
    counts = "".join(f"{report['models']['original'][split]['n']:>12}" for split in SPLITS)
    lines.append(f"{'images':<14}{counts}")
    gap = report["gap_to_retrained"]
    if gap is not None:
        lines.append(f"\nMean gap to the retrained model: {gap:.1f} points (forget, retain, test, attack)")
    lines.append(("" if gap is not None else "\n") + cost_sentence(report["cost"]))
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
        parts.append(f"{overlap['images']} validation and test images of forgotten patients are still evaluated on")
    return f"Mind the request: {'; '.join(parts)}." if parts else None


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(attack: Mapping[str, float | None]) -> str:
    """An AUC with its interval, or a dash."""
    if attack["auc"] is None:
        return "–"
    if attack["low"] is None:
        return f"{attack['auc']:.2f} (too few for an interval)"
    return f"{attack['auc']:.2f} ({attack['low']:.2f} to {attack['high']:.2f})"


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """What unlearning cost, against retraining."""
    parts = [cost[phase] for phase in ("mask", "tuning", "unlearn")]
    seconds = sum(part["seconds"] for part in parts)
    samples = sum(part["samples"] for part in parts)
    sentence = f"Cost: {seconds:.1f} s and {samples:,} samples"
    if cost["mask"]["samples"]:
        sentence += f" (the mask {cost['mask']['seconds']:.1f} s of it)"
    if cost["retrain"] is not None:
        sentence += f"; retraining took {cost['retrain']['seconds']:.1f} s and {cost['retrain']['samples']:,} samples"
    return sentence
