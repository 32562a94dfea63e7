"""Whatever is undefined in an audit, its report can be shown."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from audit_samples import sample_audit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import Page

import monai_unlearn.report
from monai_unlearn.report import model_card, render_html, scalars, terminal_table, validate_report

SCHEMA = json.loads(Path(monai_unlearn.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
Place = tuple[str | int, ...]


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _nullable(value: Any, schema: dict[str, Any], place: Place = ()) -> Iterator[Place]:
    """The places of an audit at which the schema takes null; of a list only the first one."""
    schema = _resolved(schema)
    if "oneOf" in schema:
        yield place
        schema = _resolved(next(part for part in schema["oneOf"] if part != {"type": "null"}))
    elif "null" in schema.get("type", ()) or None in schema.get("enum", ()):
        yield place
    if isinstance(value, dict):
        for key, part in value.items():
            below = schema["properties"][key] if key in schema.get("properties", {}) else schema["additionalProperties"]
            yield from _nullable(part, below, (*place, key))
    elif isinstance(value, list) and value:
        yield from _nullable(value[0], schema["items"], (*place, 0))


def _without(audit: dict[str, Any], places: list[Place]) -> dict[str, Any]:
    """The audit with null at these places."""
    audit = copy.deepcopy(audit)
    for place in places:
        part: Any = audit
        for step in place[:-1]:
            part = None if part is None else part[step]
        if part is not None:
            part[place[-1]] = None
    return audit


AUDIT = sample_audit(several=True)
AUDIT["subgroups"] = {"sex": AUDIT["subgroups"]["sex"]}
del AUDIT["utility"]["validation"], AUDIT["subgroups"]["sex"]["groups"]["M"]["retain"]
NULLABLE = list(_nullable(AUDIT, SCHEMA["$defs"]["audit"]))


def test_most_of_an_audit_may_be_undefined() -> None:
    assert len(NULLABLE) > 400
    assert ("verdict", "detectable") in NULLABLE
    assert ("attacks", "population", "log_odds", "models", "retrained") in NULLABLE
    assert ("verdict", "answer") not in NULLABLE


def _shown(report: dict[str, Any]) -> None:
    validate_report(report)
    words = Page(render_html(report)).words
    assert "Summary" in words
    card = model_card(report)
    for text in (words, card, terminal_table(report)):
        assert not re.search(r"\b(nan|None|null|inf)\b", text)
    assert all(isinstance(value, float) and value == value for value in scalars(report).values())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.sampled_from(NULLABLE), min_size=1, max_size=60))
def test_nulls_anywhere_do_not_break_the_report(make_report: Any, undrawn: None, places: list[Place]) -> None:
    _shown(make_report(audit=_without(AUDIT, places)))


@pytest.mark.parametrize("depth", range(2, 9))
def test_nulls_everywhere_do_not_break_the_report(make_report: Any, undrawn: None, depth: int) -> None:
    _shown(make_report(audit=_without(AUDIT, [place for place in NULLABLE if len(place) >= depth])))


@pytest.mark.parametrize("depth", [3, 6])
def test_nulls_do_not_break_the_plots(make_report: Any, depth: int) -> None:
    _shown(make_report(audit=_without(AUDIT, [place for place in NULLABLE if len(place) >= depth])))
