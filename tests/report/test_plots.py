"""The plots of a run's figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from monai_unlearn.report.plots import accuracy_plot, cost_plot, finding_plot, shorten, values

MakeReport = Callable[..., dict[str, Any]]
ZERO = {"seconds": 0.0, "samples": 0, "forward": 0, "backward": 0}
PHASES = ("mask", "tuning", "unlearn", "retrain", "evaluation", "caching")


@pytest.mark.parametrize("reference", [True, False])
def test_each_plot_is_one_svg_without_a_size_or_a_date(make_report: MakeReport, reference: bool) -> None:
    report = make_report(reference)
    models = {name: model for name, model in report["models"].items() if model is not None}
    for text in (accuracy_plot(models), accuracy_plot(models, floor=1.2), cost_plot(report["cost"])):
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "viewBox" in root.attrib
        assert not {"width", "height"} & set(root.attrib)
        assert "dc:date" not in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("retrain", [None, ZERO, {**ZERO, "seconds": 4.0}])
@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_any_cost_can_be_drawn(seconds: float, retrain: dict | None) -> None:
    cost = {**dict.fromkeys(PHASES), "unlearn": {**ZERO, "seconds": seconds}, "retrain": retrain, "ratio": None}
    ET.fromstring(cost_plot(cost))


def test_the_phases_that_are_apart_have_a_bar_of_their_own() -> None:
    cost = {phase: {**ZERO, "seconds": 1.0} for phase in PHASES}
    text = cost_plot(cost)
    for name in ("unlearning", "retraining", "apart", "evaluation 1.0 s", "caching 1.0 s"):
        assert f"<!-- {name} -->" in text
    assert "<!-- apart -->" not in cost_plot({**cost, "evaluation": None, "caching": None})


def test_an_undefined_accuracy_can_be_drawn(make_report: MakeReport) -> None:
    models = make_report()["models"]
    for name in ("unlearned", "retrained"):
        models[name]["test"]["accuracy"] = None
    ET.fromstring(accuracy_plot(models, floor=1.2))


def test_the_noise_floor_is_drawn_beside_a_retrained_model(make_report: MakeReport) -> None:
    models = make_report()["models"]
    assert accuracy_plot(models, floor=5.0) != accuracy_plot(models, floor=None)
    del models["retrained"]
    assert accuracy_plot(models, floor=5.0) == accuracy_plot(models, floor=None)


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
    assert width == pytest.approx(5.4 * 72)


@pytest.mark.parametrize("findings", [1, 14, 120])
def test_each_finding_has_a_row(findings: int) -> None:
    each = {f"finding {i}": 0.5 + i / 300 for i in range(findings)}
    text = finding_plot({"original": {"test": {"auroc_per_finding": each}}})
    heights = [float(value) for value in ET.fromstring(text).attrib["viewBox"].split()]
    assert heights[3] >= 72 * (1 + 0.3 * findings) - 1


def test_what_is_undefined_is_not_drawn_at_zero() -> None:
    np.testing.assert_array_equal(values([1, None, 0.5]), [1, np.nan, 0.5])
    assert values([]).shape == (0,)


def test_a_short_name_stays_as_it_is() -> None:
    assert shorten("Edema") == "Edema"
    assert shorten("x" * 28) == "x" * 28
    assert shorten("x" * 29) == "x" * 27 + "…"
