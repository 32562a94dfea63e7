"""The report for programs: one nesting, plain numbers, null for what is undefined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from monai_unlearn.cost import Cost
from monai_unlearn.metrics import average_gap

__all__ = ["SCHEMA_VERSION", "build_report", "gap_figures", "terminal_table"]

SCHEMA_VERSION = "1.0"
SPLITS = ("forget", "retain", "validation", "test")
PHASES = ("mask", "tuning", "unlearn", "retrain")


def gap_figures(model: Mapping[str, Mapping]) -> list[float | None]:
    """The figures whose distance to the retrained model is averaged: three accuracies and the attack's AUC."""
    return [*(model[split]["accuracy"] for split in ("forget", "retain", "test")), model["attack"]["auc"]]


def build_report(
    method: str,
    settings: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Mapping]],
    cost: Mapping[str, Cost],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Put results into the report's form.

    Args:
        method: name of the method.
        settings: setting → value.
        models: ``original``, ``unlearned`` and, if there is one, ``retrained`` → split → figures, and ``attack`` →
            ``auc``, ``low``, ``high``.
        cost: phase → cost.
        provenance: where all of it comes from.

    Returns:
        ``models``, ``gap_to_retrained``, ``cost``, ``method``, ``settings``, ``provenance`` and ``schema_version``.
    """
    plain = {
        name: {part: {key: _defined(value) for key, value in figures.items()} for part, figures in parts.items()}
        for name, parts in models.items()
    }
    gap = None
    if "retrained" in plain:
        gap = average_gap(gap_figures(plain["unlearned"]), gap_figures(plain["retrained"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "settings": dict(settings),
        "models": {name: plain.get(name) for name in ("original", "unlearned", "retrained")},
        "gap_to_retrained": gap,
        "cost": {phase: cost[phase].as_dict() if phase in cost else None for phase in PHASES},
        "provenance": dict(provenance),
    }


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal_table(report: Mapping[str, Any]) -> str:
    """The report's main figures as a short table for a terminal."""
    columns = [*SPLITS, "attack AUC (95 % interval)"]
    lines = [f"{'accuracy in %':<14}" + "".join(f"{name:>12}" for name in SPLITS) + f"   {columns[-1]}"]
    for name, model in report["models"].items():
        if model is None:
            continue
        cells = "".join(f"{percent(model[split]['accuracy']):>12}" for split in SPLITS)
        lines.append(f"{name:<14}{cells}   {interval(model['attack'])}")
    counts = "".join(f"{report['models']['original'][split]['n']:>12}" for split in SPLITS)
    lines.append(f"{'images':<14}{counts}")
    gap = report["gap_to_retrained"]
    if gap is not None:
        lines.append(f"\nMean gap to the retrained model: {gap:.1f} points (forget, retain, test, attack)")
    lines.append(("" if gap is not None else "\n") + cost_sentence(report["cost"]))
    return "\n".join(lines)


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
