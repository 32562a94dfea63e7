"""The published schema, and reading what was written before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from audit_samples import VARIANTS, sample_audit

import monai_unlearn.report
from monai_unlearn.report import SCHEMA_VERSION, read_report, render_html, terminal_table, validate_report

Make = Callable[..., dict[str, Any]]
SCHEMA = json.loads(Path(monai_unlearn.report.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))


def _write(report: Any, folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report), encoding="utf-8")
    return path


def _objects(schema: Any) -> list[dict[str, Any]]:
    """Every part of the schema that describes an object's keys."""
    found = [schema] if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) else []
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return found + [inner for part in parts for inner in _objects(part)]


def test_the_schema_is_one_and_is_of_this_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_no_part_of_it_takes_unknown_keys_but_those_that_say_so() -> None:
    places = [json.dumps(list(part["properties"])) for part in _objects(SCHEMA) if "additionalProperties" not in part]
    assert places == [
        json.dumps(["original_checkpoint", "data", "versions", "machine", "retrained_on", "seeds", "hashes"]),
        json.dumps(["name", "sha256"]),
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_reports_of_all_kinds_follow_it(make_variant: Make, name: str, tmp_path: Path) -> None:
    report = make_variant(name)
    validate_report(report)
    jsonschema.validate(report, SCHEMA)
    assert read_report(_write(report, tmp_path)) == report


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("audit", "verdict", "answer"), "passed"),
        (("audit", "verdict", "direction"), "forgets"),
        (("audit", "verdict", "more"), 1),
        (("audit", "attacks", "population", "log_odds", "models", "original", "auc"), 1.2),
        (("audit", "attacks", "population", "log_odds", "models", "original", "auc"), "0.5"),
        (("audit", "attacks", "forget", "images"), None),
        (("audit", "attacks", "forget", "images"), 3.5),
        (("audit", "attacks", "roc", "original", "fpr", 0), "no number"),
        (("audit", "utility", "forget"), {}),
        (("audit", "subgroups", "sex", "largest", "test", "groups"), ["F"]),
        (("audit", "distance", "harm", "test"), -1),
        (("cost", "ratio"), 0.5),
        (("cost", "unlearn", "seconds"), -1),
        (("left",), [{"what": "mask"}]),
        (("schema_version",), "2.0"),
        (("models", "unlearned", "test", "accuracy"), 65),
        (("nothing",), None),
    ],
)
def test_what_does_not_follow_it_is_refused_with_its_place(
    make_variant: Make, place: tuple[str | int, ...], value: Any
) -> None:
    report = make_variant("classes")
    part: Any = report
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    with pytest.raises(ValueError, match=r"should be as report\.schema\.json says") as error:
        validate_report(report)
    assert str(error.value).startswith("/".join(str(step) for step in place[:-1]))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_every_key_is_needed(make_variant: Make, key: str) -> None:
    report = make_variant("no audit")
    del report[key]
    with pytest.raises(ValueError, match=key):
        validate_report(report)


# ---- reading


def _earlier(report: dict[str, Any], version: str) -> dict[str, Any]:
    """The report as an earlier version wrote it."""
    report = copy.deepcopy(report)
    report["schema_version"] = version
    for key in ("audit", "left", *(("task", "request", "notes", "findings_left_out") if version == "1.0" else ())):
        del report[key]
    report["cost"] = {name: report["cost"][name] for name in ("mask", "tuning", "unlearn", "retrain")}
    return report


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_report_of_the_first_release_is_read(make_report: Make, version: str, tmp_path: Path, undrawn: None) -> None:
    report = make_report()
    earlier = _earlier(report, version)
    path = _write(earlier, tmp_path)
    read = read_report(path)
    assert read == {**report, "cost": {**report["cost"], "ratio": None}}
    assert json.loads(path.read_text()) == earlier
    render_html(read)
    terminal_table(read)


def test_two_reports_that_are_read_share_nothing(make_report: Make, tmp_path: Path) -> None:
    path = _write(_earlier(make_report(), "1.0"), tmp_path)
    read_report(path)["notes"].append("changed")
    assert read_report(path)["notes"] == []


@pytest.mark.parametrize("version", ["2.0", "0.9", "1.3", "1.10", "1", "1.x", "one", "1.2.3"])
def test_a_report_of_another_version_is_refused(make_report: Make, version: str, tmp_path: Path) -> None:
    path = _write({**make_report(), "schema_version": version}, tmp_path)
    with pytest.raises(ValueError, match=r"schema_version from 1\.0 to 1\.2, but has"):
        read_report(path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '"report"', "{}", '{"schema_version": "1.2"}', '{"schema_version": 1, "models": 1}']
)
def test_what_is_no_report_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"should be a report\.json of this package, but is n"):
        read_report(_write(content, tmp_path))


def test_a_report_that_is_cut_short_is_refused_with_the_place(make_report: Make, tmp_path: Path) -> None:
    report = make_report(audit=sample_audit())
    del report["models"]["unlearned"]["attack"]
    with pytest.raises(ValueError, match=r"report\.json should be a whole report, but: models/unlearned .*'attack'"):
        read_report(_write(report, tmp_path))
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_report(path)
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "none.json")
