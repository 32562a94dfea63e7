"""The report's figures by flat names, for TensorBoard, MLflow and the like."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["scalars"]

NOT_FIGURES = ("options", "forget_size", "reliability", "attacks")  # of the audit: settings, lists, and what follows
ATTACKS = ("patient", "ratio", "u_lira")


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """All single figures that are defined, by the path at which they stand in the report.

    The attacks have shorter names: ``audit/attack/log_odds/unlearned/auc``, and ``audit/attack/log_odds/difference/…``.
    Names of classes and groups keep letters, digits, spaces, ``_``, ``-`` and ``.``, which is what MLflow takes; where
    two would be the same then, a number follows.

    Args:
        report: as ``build_report`` returns it.

    Returns:
        Name → finite number.
    """
    audit = report["audit"] or {}
    parts: dict[str, Any] = {
        "models": report["models"],
        "gap_to_retrained": report["gap_to_retrained"],
        "cost": report["cost"],
        "audit": {name: part for name, part in audit.items() if name not in NOT_FIGURES},
    }
    if audit:
        attacks = audit["attacks"]
        entries = {**attacks["population"], **{name: attacks[name] for name in ATTACKS}}
        parts["audit"]["attack"] = {name: _shorter(entry) for name, entry in entries.items() if entry is not None}
        parts["audit"]["sanity"] = attacks["sanity"]
        parts["audit"]["images"] = {side: attacks[side] for side in ("forget", "unseen")}
    return dict(_flat(parts, ""))


def _shorter(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry["models"], **{name: part for name, part in entry.items() if name != "models"}}


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in zip(_names(value), value.values()):
            yield from _flat(part, f"{name}/{key}" if name else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def _names(keys: Mapping[str, Any]) -> list[str]:
    """A name of allowed characters for each key, all of them different."""
    names: list[str] = []
    for key in keys:
        name = re.sub(r"[^\w .-]", "_", key)
        if not name.strip(" ."):  # nothing, or a step in a path
            name = f"_{name.strip(' .')}"
        number = 2
        unique = name
        while unique in names or (unique != key and unique in keys):
            unique, number = f"{name}_{number}", number + 1
        names.append(unique)
    return names
