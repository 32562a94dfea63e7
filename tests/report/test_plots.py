"""The plots of the report."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from monai_unlearn.report.plots import accuracy_plot, cost_plot, finding_plot, score_plot

MakeReport = Callable[..., dict[str, Any]]
ZERO = {"seconds": 0.0, "samples": 0, "forward": 0, "backward": 0}


@pytest.mark.parametrize("reference", [True, False])
def test_each_plot_is_one_svg_without_a_size_or_a_date(make_report: MakeReport, reference: bool) -> None:
    report = make_report(reference)
    models = {name: model for name, model in report["models"].items() if model is not None}
    scores = {name: {"forget": np.arange(5.0), "validation": np.arange(9.0)} for name in models}
    for text in (accuracy_plot(models), score_plot(scores), cost_plot(report["cost"])):
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "viewBox" in root.attrib
        assert not {"width", "height"} & set(root.attrib)
        assert "dc:date" not in text


@pytest.mark.parametrize(
    ("forget", "validation"),
    [
        (np.zeros(3), np.zeros(4)),
        (np.full(3, 40.0), np.full(4, 40.0)),
        (np.array([1.0]), np.array([2.0])),
        (np.array([-700.0, 700.0]), np.array([0.0, 1e-12])),
    ],
)
def test_scores_without_a_spread_or_with_a_huge_one_can_be_drawn(forget: np.ndarray, validation: np.ndarray) -> None:
    ET.fromstring(score_plot({"original": {"forget": forget, "validation": validation}}))


@pytest.mark.filterwarnings("ignore:No artists with labels")
@pytest.mark.parametrize("retrain", [None, ZERO, {**ZERO, "seconds": 4.0}])
@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_any_cost_can_be_drawn(seconds: float, retrain: dict | None) -> None:
    cost = {"mask": ZERO, "tuning": ZERO, "unlearn": {**ZERO, "seconds": seconds}, "retrain": retrain}
    ET.fromstring(cost_plot(cost))


def test_an_undefined_accuracy_can_be_drawn(make_report: MakeReport) -> None:
    models = make_report()["models"]
    models["unlearned"]["test"]["accuracy"] = None
    ET.fromstring(accuracy_plot(models))


@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_scores_that_are_not_there_are_left_out(task: str) -> None:
    known, unseen = np.array([0.0, 1.0, 4.0]), np.array([2.0, 3.0])
    holed = np.array([np.nan, 0.0, 1.0, np.nan, 4.0])
    drawn, expected = (
        score_plot({"original": {"forget": scores, "validation": unseen}}, task) for scores in (holed, known)
    )
    assert drawn == expected
    ET.fromstring(score_plot({"original": {"forget": np.full(3, np.nan), "validation": unseen}}, task))
    ET.fromstring(score_plot({"original": {"forget": np.full(3, np.nan), "validation": np.array([np.nan])}}, task))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("aurocs", [(0.8, 0.7), (None, 0.7), (None, None)])
@pytest.mark.parametrize("name", ["Edema", "a_b $x^{", "<b>&amp;--", "long name of a finding " * 5])
def test_findings_can_be_drawn_whatever_their_name(name: str, aurocs: tuple) -> None:
    models = {
        model: {"test": {"auroc_per_finding": {name: aurocs[0], "Other": aurocs[1]}}}
        for model in ("original", "unlearned", "retrained")
    }
    root = ET.fromstring(finding_plot(models))
    _, _, width, _ = map(float, root.attrib["viewBox"].split())
    assert width == 8 * 72


@pytest.mark.parametrize("findings", [1, 14, 120])
def test_each_finding_has_a_row(findings: int) -> None:
    each = {f"finding {i}": 0.5 + i / 300 for i in range(findings)}
    text = finding_plot({"original": {"test": {"auroc_per_finding": each}}})
    heights = [float(value) for value in ET.fromstring(text).attrib["viewBox"].split()]
    assert heights[3] >= 72 * (1 + 0.3 * findings) - 1
