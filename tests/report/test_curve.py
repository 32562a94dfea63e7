"""Several runs as a curve over the size of the forget set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import FINDINGS, sample_audit

from monai_unlearn.report import forget_size_rows, render_html, validate_report

Make = Callable[..., dict[str, Any]]


def _of_size(report: dict[str, Any], forget: int, method: str = "saliency") -> dict[str, Any]:
    report = copy.deepcopy({**report, "method": method})
    for model in report["models"].values():
        if model is not None:
            model["forget"]["n"], model["retain"]["n"] = forget, 300 - forget
    return report


def test_rows_are_sorted_by_size_and_this_run_is_marked(make_report: Make) -> None:
    report = make_report()
    this = _of_size(report, 60, "a method")
    rows = forget_size_rows([_of_size(report, 90), _of_size(report, 60, "b"), _of_size(report, 3)], this)
    assert [(row["fraction"], row["images"], row["method"], row["this"]) for row in rows] == [
        (0.01, 3, "saliency", False),
        (0.2, 60, "a method", True),
        (0.2, 60, "b", False),
        (0.3, 90, "saliency", False),
    ]
    assert {row["gap"] for row in rows} == {report["gap_to_retrained"]}
    assert {row["attack"] for row in rows} == {0.52}


def test_the_change_is_that_of_the_audit_or_of_the_plain_figures(make_report: Make) -> None:
    plain, audited = make_report(), make_report(audit=sample_audit())
    rows = forget_size_rows([plain, audited])
    assert rows[0]["test_change"] == {"difference": pytest.approx(-0.07), "low": None, "high": None}
    assert rows[1]["test_change"] == audited["audit"]["utility"]["test"]["changes"]["retrained"]["accuracy"]
    del audited["audit"]["utility"]["test"]
    assert forget_size_rows([audited])[0]["test_change"]["difference"] == pytest.approx(-0.07)


def test_of_findings_it_is_that_of_their_mean_auroc(make_report: Make, finding_figures: dict[str, dict]) -> None:
    report = make_report(task="multi-label")
    assert forget_size_rows([report])[0]["test_change"]["difference"] == pytest.approx(-0.035)
    audited = make_report(task="multi-label", audit=sample_audit(classes=FINDINGS))
    audited["audit"]["utility"]["test"]["changes"]["retrained"]["auroc"]["difference"] = -0.25
    assert forget_size_rows([audited])[0]["test_change"]["difference"] == -0.25


def test_without_a_retrained_model_there_is_no_change(make_report: Make) -> None:
    (row,) = forget_size_rows([make_report(reference=False, audit=sample_audit(False))])
    assert (row["test_change"], row["gap"]) == (None, None)


def test_an_undefined_figure_gives_no_change(make_report: Make, figures: dict[str, dict]) -> None:
    figures["unlearned"]["test"]["accuracy"] = None
    assert forget_size_rows([make_report()])[0]["test_change"] is None


def test_reports_that_cannot_be_compared_are_refused(make_report: Make, finding_figures: dict[str, dict]) -> None:
    report = make_report()
    other = copy.deepcopy(report)
    other["provenance"]["data"]["sha256"] = "cd" * 32
    with pytest.raises(ValueError, match="should be of one data, but are of 2 different ones"):
        forget_size_rows([report, other])
    with pytest.raises(ValueError, match="should be of one data"):
        forget_size_rows([report], this=other)
    with pytest.raises(ValueError, match="should be of one task"):
        forget_size_rows([report, make_report(task="multi-label")])
    other["provenance"]["data"]["sha256"] = None
    with pytest.raises(ValueError, match="should name their data by its hash"):
        forget_size_rows([report, other])
    assert len(forget_size_rows([other])) == 1
    assert forget_size_rows([]) == []


def test_the_rows_stand_in_a_report(make_report: Make, undrawn: None) -> None:
    report = make_report(audit=sample_audit())
    report["audit"]["forget_size"] = forget_size_rows([make_report()], report)
    validate_report(report)
    assert "10.3 % (this run)" in render_html(report)
