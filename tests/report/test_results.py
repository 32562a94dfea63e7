"""The report for programs and for the terminal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from audit_samples import sample_audit

from monai_unlearn.cost import Cost
from monai_unlearn.report import SCHEMA_VERSION, build_report, gap_figures, terminal_table, validate_report

MakeReport = Callable[..., dict[str, Any]]
SPLITS = ("forget", "retain", "validation", "test")


def _at_least(**properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _exactly(**properties: dict) -> dict:
    return {**_at_least(**properties), "additionalProperties": False}


def _or_null(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


SHARE = _or_null({"type": "number", "minimum": 0, "maximum": 1})
COUNT = {"type": "integer", "minimum": 0}
FIGURES = _exactly(accuracy=SHARE, auroc=SHARE, loss=_or_null({"type": "number"}), n={"type": "integer", "minimum": 1})
MODEL = _exactly(**dict.fromkeys(SPLITS, FIGURES), attack=_exactly(auc=SHARE, low=SHARE, high=SHARE))
NAMES = {"type": "array", "items": {"type": "string"}}
COST = _at_least(seconds={"type": "number", "minimum": 0}, samples=COUNT, forward=COUNT, backward=COUNT)
# What programs rely on since the first release. A change here is a new major version.
SCHEMA = _at_least(
    schema_version={"type": "string", "pattern": "^1\\."},
    task={"enum": ["multi-class", "multi-label"]},
    method={"type": "string"},
    settings={"type": "object"},
    models=_exactly(original=MODEL, unlearned=MODEL, retrained=_or_null(MODEL)),
    gap_to_retrained=_or_null({"type": "number", "minimum": 0, "maximum": 100}),
    findings_left_out=_or_null(_exactly(**dict.fromkeys(SPLITS, NAMES))),
    cost=_at_least(mask=COST, tuning=COST, unlearn=COST, retrain=_or_null(COST)),
    request=_or_null({"type": "object"}),
    notes=NAMES,
    provenance={"type": "object", "required": ["original_checkpoint"]},
)


@pytest.mark.parametrize("reference", [True, False])
def test_the_report_has_exactly_the_promised_nesting(make_report: MakeReport, reference: bool) -> None:
    report = make_report(reference)
    jsonschema.validate(report, SCHEMA)
    validate_report(report)
    assert report["schema_version"] == SCHEMA_VERSION
    assert (report["models"]["retrained"] is None) is not reference
    assert (report["cost"]["retrain"] is None) is not reference
    assert (report["gap_to_retrained"] is None) is not reference
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_figures_arrive_unchanged(make_report: MakeReport, figures: dict[str, dict]) -> None:
    report = make_report()
    assert report["models"] == figures
    assert report["cost"]["mask"] == Cost(1.25, 31, 31, 31).as_dict()
    assert report["cost"]["tuning"] == Cost().as_dict()
    assert (report["audit"], report["left"]) == (None, [])
    assert report["method"] == "random_labeling"
    assert report["settings"]["lr"] == 0.013


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan"), None])
@pytest.mark.parametrize(("part", "name"), [("test", "auroc"), ("forget", "accuracy"), ("attack", "low")])
def test_what_is_undefined_is_null(
    make_report: MakeReport, figures: dict[str, dict], value: float | None, part: str, name: str
) -> None:
    figures["unlearned"][part][name] = value
    report = make_report()
    assert report["models"]["unlearned"][part][name] is None
    jsonschema.validate(report, SCHEMA)
    json.dumps(report, allow_nan=False)
    assert (report["gap_to_retrained"] is None) == (name == "accuracy")


def test_the_gap_is_over_three_accuracies_and_the_attack(make_report: MakeReport, figures: dict[str, dict]) -> None:
    # |.74 - .70|, |.97 - .99|, |.65 - .72|, |.52 - .50|; the validation set does not count.
    assert make_report()["gap_to_retrained"] == pytest.approx((4 + 2 + 7 + 2) / 4)
    assert gap_figures(figures["unlearned"]) == [0.74, 0.97, 0.65, 0.52]
    figures["unlearned"]["validation"]["accuracy"] = 0.1
    assert make_report()["gap_to_retrained"] == pytest.approx(3.75)
    figures["unlearned"] = copy.deepcopy(figures["retrained"])
    assert make_report()["gap_to_retrained"] == 0


def test_the_input_is_not_changed(make_report: MakeReport, figures: dict[str, dict]) -> None:
    figures["original"]["test"]["auroc"] = float("inf")
    before = copy.deepcopy(figures)
    report = make_report()
    report["models"]["unlearned"]["test"]["n"] = 0
    report["settings"]["lr"] = 1
    assert figures == before


def test_the_order_of_the_models_is_fixed(figures: dict[str, dict]) -> None:
    models = {name: figures[name] for name in ("retrained", "unlearned", "original")}
    report = build_report("x", {}, models, {"unlearn": Cost()}, {})
    assert list(report["models"]) == ["original", "unlearned", "retrained"]
    assert list(report["cost"]) == ["mask", "tuning", "unlearn", "retrain", "evaluation", "caching", "ratio"]


def test_the_terminal_table_shows_each_model_its_attack_and_the_cost(make_report: MakeReport) -> None:
    lines = terminal_table(make_report()).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert lines[0].split()[3:7] == list(SPLITS)
    assert rows["original"][:4] == ["99.0", "98.0", "72.0", "71.0"]
    assert rows["unlearned"] == ["74.0", "97.0", "70.0", "65.0", "0.52", "(0.46", "to", "0.58)"]
    assert rows["retrained"][:4] == ["70.0", "99.0", "73.0", "72.0"]
    assert rows["images"] == ["31", "269", "52", "83"]
    text = "\n".join(lines)
    assert "Mean gap to the retrained model: 3.8 points" in text
    assert "Cost: 11.8 s and 3,031 samples (the mask 1.2 s of it)" in text
    assert "retraining took 61.4 s and 26,900 samples" in text
    assert max(map(len, lines)) < 120


def test_the_terminal_table_without_a_retrained_model_speaks_of_none(make_report: MakeReport) -> None:
    text = terminal_table(make_report(reference=False))
    assert "retrain" not in text
    assert "gap" not in text


def test_the_terminal_table_shows_a_dash_for_what_is_undefined(
    make_report: MakeReport, figures: dict[str, dict]
) -> None:
    figures["unlearned"]["test"]["accuracy"] = None
    figures["unlearned"]["attack"] = {"auc": 0.4, "low": float("nan"), "high": float("nan")}
    figures["original"]["attack"] = {"auc": None, "low": None, "high": None}
    rows = {line.split()[0]: line for line in terminal_table(make_report()).splitlines() if line.strip()}
    assert rows["unlearned"].split()[4] == "–"
    assert "0.40 (too few for an interval)" in rows["unlearned"]
    assert rows["original"].endswith("–")


def test_without_a_mask_none_is_mentioned(make_report: MakeReport) -> None:
    cost = {"mask": Cost(), "tuning": Cost(2, 7, 7, 7), "unlearn": Cost(3, 10, 10, 10)}
    text = terminal_table(make_report(reference=False, cost=cost))
    assert "Cost: 5.0 s and 17 samples" in text
    assert "mask" not in text


# ---- the audit, what is left, and the ratio


def test_the_audit_arrives_as_it_is_with_null_for_what_is_undefined(make_report: MakeReport) -> None:
    audit = sample_audit()
    expected = copy.deepcopy(audit)
    for model, (value, plain) in zip(
        ("original", "unlearned", "retrained"),
        ((np.float32(0.25), 0.25), (np.float64("nan"), None), (np.float32("inf"), None)),
    ):
        audit["attacks"]["population"]["loss"]["models"][model]["auc"] = value
        expected["attacks"]["population"]["loss"]["models"][model]["auc"] = plain
    audit["attacks"]["forget"]["images"] = np.int64(31)
    audit["attacks"]["sanity"]["original"]["detected"] = np.bool_(True)
    audit["attacks"]["histogram"]["edges"] = np.array(audit["attacks"]["histogram"]["edges"])
    audit["attacks"]["roc"]["original"]["tpr"] = (np.nan, 1.0)
    expected["attacks"]["roc"]["original"]["tpr"] = [None, 1.0]
    report = make_report(audit=audit)
    assert report["audit"] == expected
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    report["audit"]["attacks"]["matched_by"].append("site")
    assert audit["attacks"]["matched_by"] == ["class", "sex"]


def test_what_is_left_arrives_as_it_is(make_report: MakeReport, left: list[dict[str, Any]]) -> None:
    report = make_report(left=left)
    assert report["left"] == left
    report["left"][0]["path"] = ""
    assert left[0]["path"]


@pytest.mark.parametrize("together", [True, False, None])
def test_the_ratio_is_everything_for_unlearning_by_retraining(make_report: MakeReport, together: bool | None) -> None:
    cost = {
        "mask": Cost(1, 10, 10, 10),
        "tuning": Cost(2, 20, 20, 20),
        "unlearn": Cost(3, 30, 30, 30),
        "retrain": Cost(24, 600, 600, 600),
        "evaluation": Cost(100, 1000, 1000, 0),
        "caching": Cost(100, 0, 0, 0),
    }
    report = make_report(cost=cost, measured_together=together)
    assert report["cost"]["ratio"] == {"seconds": 0.25, "samples": 0.1, "measured_together": together}
    assert report["cost"]["evaluation"]["seconds"] == 100
    assert "Cost: 6.0 s and 60 samples" in terminal_table(report)


@pytest.mark.parametrize(
    ("cost", "ratio"),
    [
        ({"unlearn": Cost(1, 1, 1, 1)}, None),
        ({"retrain": Cost(1, 1, 1, 1)}, None),
        ({}, None),
        ({"unlearn": Cost(1, 1, 1, 1), "retrain": Cost()}, (None, None)),
        ({"unlearn": Cost(), "retrain": Cost(2, 4, 4, 4)}, (0, 0)),
    ],
)
def test_a_ratio_of_what_was_not_measured_is_null(make_report: MakeReport, cost: dict, ratio: tuple | None) -> None:
    report = make_report(cost=cost)
    found = report["cost"]["ratio"]
    assert (found and (found["seconds"], found["samples"])) == ratio
    validate_report(report)
    terminal_table(report)


# ---- several findings an image

FINDINGS = ("Edema", "Fracture", "Nodule")


def _schema_of_findings() -> dict:
    """The same, where each split has the AUROC of each finding too."""
    schema = copy.deepcopy(SCHEMA)
    each = _exactly(**dict.fromkeys(FINDINGS, SHARE))
    figures = _exactly(**FIGURES["properties"], auroc_per_finding=each)
    model = _exactly(**dict.fromkeys(SPLITS, figures), attack=MODEL["properties"]["attack"])
    schema["properties"]["models"] = _exactly(original=model, unlearned=model, retrained=_or_null(model))
    return schema


@pytest.mark.parametrize("reference", [True, False])
def test_the_report_of_findings_has_exactly_the_promised_nesting(
    make_report: MakeReport, finding_figures: dict[str, dict], request_figures: dict, reference: bool
) -> None:
    report = make_report(reference, task="multi-label", request=request_figures, notes=("A note.",))
    jsonschema.validate(report, _schema_of_findings())
    validate_report(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["task"] == "multi-label"
    assert report["request"] == request_figures
    assert report["notes"] == ["A note."]
    assert report["findings_left_out"] == {"forget": ["Fracture"], "retain": [], "validation": [], "test": ["Nodule"]}
    assert report["models"]["unlearned"]["forget"]["auroc_per_finding"]["Fracture"] is None


def test_the_report_of_classes_speaks_of_no_findings(make_report: MakeReport) -> None:
    report = make_report()
    assert (report["task"], report["findings_left_out"]) == ("multi-class", None)
    assert (report["request"], report["notes"]) == (None, [])


def test_the_gap_of_findings_is_over_their_mean_auroc(
    make_report: MakeReport, finding_figures: dict[str, dict]
) -> None:
    # AUROC is (1 + accuracy) / 2 here, so the three differences are half of those of the accuracies.
    assert make_report(task="multi-label")["gap_to_retrained"] == pytest.approx((2 + 1 + 3.5 + 2) / 4)
    assert gap_figures(finding_figures["unlearned"], "multi-label") == [0.87, 0.985, 0.825, 0.52]
    finding_figures["unlearned"]["test"]["auroc"] = float("nan")
    assert make_report(task="multi-label")["gap_to_retrained"] is None


@pytest.mark.parametrize("task", ["multi_label", "binary", ""])
def test_another_task_is_refused(make_report: MakeReport, task: str) -> None:
    with pytest.raises(ValueError, match="task should be one of multi-class, multi-label"):
        make_report(task=task)


def test_the_terminal_table_of_findings_shows_their_mean_auroc(
    make_report: MakeReport, finding_figures: dict[str, dict]
) -> None:
    lines = terminal_table(make_report(task="multi-label")).splitlines()
    assert lines[0].startswith("AUROC in %    ")
    assert lines[0].index("forget") == terminal_table(make_report()).splitlines()[0].index("forget")
    assert lines[2].split()[:5] == ["unlearned", "87.0", "98.5", "85.0", "82.5"]
    assert "accuracy" not in "\n".join(lines)


def test_the_terminal_warns_of_the_request_in_one_line(make_report: MakeReport, request_figures: dict) -> None:
    assert terminal_table(make_report(request=request_figures)).splitlines()[-1] == (
        "Mind the request: 1 of its 9 entries matched nothing; 2 of 7 patients keep some of their images; "
        "8 validation and test images of the same patients are still evaluated on."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": None},
        {"overlap": {"option": "drop", "patients": 5, "images": 8}},
        {"overlap": {"option": "keep", "patients": 0, "images": 0}},
        {"patients": None, "partly_forgotten": None, "duplicates": None, "overlap": None},
    ],
)
def test_a_request_that_is_met_needs_no_warning(
    make_report: MakeReport, request_figures: dict, changes: dict[str, Any]
) -> None:
    met = {**request_figures, "partly_forgotten": 0, "unmatched": 0, **changes}
    plain = terminal_table(make_report())
    assert terminal_table(make_report(request=met)) == plain
    assert terminal_table(make_report(request=dict.fromkeys(met))) == plain
    assert terminal_table(make_report(request={})) == plain


def test_the_request_of_a_report_is_its_own(make_report: MakeReport, request_figures: dict) -> None:
    before = copy.deepcopy(request_figures)
    report = make_report(request=request_figures)
    report["request"]["overlap"]["images"] = 99
    assert request_figures == before
