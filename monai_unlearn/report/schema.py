"""Reading reports that were written before, and holding a report against the published schema."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from monai_unlearn.report.results import SCHEMA_VERSION

__all__ = ["read_report", "validate_report"]

# What later minor versions added, as it is where an earlier one knew nothing of it.
ADDED: dict[str, Any] = {
    "task": "multi-class",
    "findings_left_out": None,
    "audit": None,
    "request": None,
    "left": [],
    "finalised": None,
    "notes": [],
}
# MONAI Label needs jsonschema 3; the schema has nothing that the two drafts take for different things.
Validator: Any = getattr(jsonschema, "Draft202012Validator", jsonschema.Draft7Validator)
ADDED_TO_COST = ("evaluation", "caching", "ratio")


def validate_report(report: Mapping[str, Any]) -> None:
    """Hold a report against report.schema.json beside this module.

    Args:
        report: as ``build_report`` returns it, or as ``json.load`` reads it.

    Raises:
        ValueError: if it does not follow the schema; the message names the place.
    """
    error = next(_validator().iter_errors(report), None)
    if error is not None:
        # Of alternatives, the one that went deepest tells what is wrong.
        while error.context:
            error = max(error.context, key=lambda inner: len(inner.absolute_path))
        place = "/".join(str(step) for step in error.absolute_path) or "the report"
        raise ValueError(f"{place} should be as report.schema.json says, but is not: {error.message}")


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """Read a report.json, also of an earlier minor version, whose missing parts become null.

    Args:
        path: the file.

    Returns:
        The report in today's form.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no report, or one of another major or a later minor version.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise ValueError(
            f"{path.name} should be a report.json of this package, but is no JSON. Check the path."
        ) from None
    version = report.get("schema_version") if isinstance(report, dict) else None
    if not isinstance(version, str) or "models" not in report:
        raise ValueError(f"{path.name} should be a report.json of this package, but is none. Check the path.")
    major, _, minor = version.partition(".")
    own_major, _, own_minor = SCHEMA_VERSION.partition(".")
    if major != own_major or not minor.isdecimal() or int(minor) > int(own_minor):
        raise ValueError(
            f"{path.name} should have a schema_version from {own_major}.0 to {SCHEMA_VERSION}, but has {version!r}. "
            "Read it with the version of monai_unlearn that wrote it."
        )
    report = {**copy.deepcopy(ADDED), **report, "schema_version": SCHEMA_VERSION}
    if isinstance(report.get("cost"), dict):
        report["cost"] = {**dict.fromkeys(ADDED_TO_COST), **report["cost"]}
    try:
        validate_report(report)
    except ValueError as error:
        raise ValueError(f"{path.name} should be a whole report, but: {error}") from None
    return report


@cache
def _validator() -> Any:
    schema = json.loads(Path(__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
    del schema["$id"]  # jsonschema 3 would look for its parts there
    return Validator(schema)
