"""The plots of the audit's figures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import sample_audit

from monai_unlearn.report import audit_plots as drawn

AUDIT = sample_audit(several=True)
GROUPS = AUDIT["subgroups"]["sex"]["groups"]
# Each plot, and what it shows.
PLOTS: dict[str, tuple[Callable[[Any], str], Any]] = {
    "score": (lambda part: drawn.score_plot(part, "multi-class"), AUDIT["attacks"]["histogram"]),
    "roc": (drawn.roc_plot, AUDIT["attacks"]["roc"]),
    "attack": (
        drawn.attack_plot,
        {name: entry["models"] for name, entry in AUDIT["attacks"]["population"].items()},
    ),
    "group": (lambda part: drawn.group_plot("group", part, "retrained"), GROUPS),
    "reliability": (drawn.reliability_plot, AUDIT["reliability"]["test"]),
    "distance": (drawn.distance_plot, AUDIT["distance"]),
    "curve": (lambda part: drawn.curve_plot(part, "accuracy"), AUDIT["forget_size"]),
}


def _without(value: Any, kept: tuple[str, ...] = ("edges", "fraction", "this", "method")) -> Any:
    """The same with null in the place of each number that may be null."""
    if isinstance(value, dict):
        return {key: part if key in kept else _without(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without(part) for part in value]
    return None if isinstance(value, (int, float)) else value


def _marks(text: str) -> int:
    """How much is drawn in a colour of the models, legends included."""
    colored = re.findall(r"<(?:path|use)[^>]*(?:#8a8a8a|#d55e00|#0072b2)[^>]*>", text)
    return sum(map(len, colored))


@pytest.mark.parametrize("name", PLOTS)
def test_each_plot_is_one_svg_without_a_size_or_a_date(name: str) -> None:
    plot, part = PLOTS[name]
    text = plot(part)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not {"width", "height"} & set(root.attrib)
    assert "dc:date" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids
    assert all(identity.startswith(f"{name}-") for identity in ids)
    assert text == plot(part)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PLOTS)
def test_where_nothing_is_defined_the_plot_is_empty_and_no_number_is_made_up(name: str) -> None:
    plot, part = PLOTS[name]
    full, empty = plot(part), plot(_without(part))
    ET.fromstring(empty)
    assert _marks(empty) < _marks(full)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["score", "roc", "attack", "reliability"])
def test_a_model_that_is_not_there_is_left_out(name: str) -> None:
    plot, part = PLOTS[name]
    nothing = dict.fromkeys(("original", "unlearned", "retrained"))
    if name == "score":
        two, none = {**part, "models": {**part["models"], "retrained": None}}, {**part, "models": nothing}
    elif name == "attack":
        two, none = {key: {**models, "retrained": None} for key, models in part.items()}, dict.fromkeys(part, nothing)
    else:
        two, none = {**part, "retrained": None}, nothing
    assert "<!-- retrained -->" in plot(part)
    assert "<!-- retrained -->" not in plot(two)
    assert "<!-- unlearned -->" in plot(two)
    ET.fromstring(plot(none))


@pytest.mark.filterwarnings("error")
def test_a_curve_that_starts_at_no_false_alarm_can_be_drawn_on_logarithmic_axes() -> None:
    for fpr, tpr in (([0.0, 1.0], [0.0, 1.0]), ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0]), ([], []), ([1e-6, 1], [0.0, 1])):
        ET.fromstring(drawn.roc_plot({"original": {"fpr": fpr, "tpr": tpr}}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edges", [[0.0, 1e-9], [-700.0, 700.0], [3.0, 4.0, 5.0]])
def test_any_range_of_scores_can_be_drawn(edges: list[float]) -> None:
    shares = [1.0] + [0.0] * (len(edges) - 2)
    ET.fromstring(drawn.score_plot({"edges": edges, "models": {"original": {"forget": shares, "unseen": shares}}}, ""))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["F", "a_b $x^{", "<b>&amp;--", "a long name of a group " * 5, "\\g<1>"])
def test_groups_can_be_drawn_whatever_their_name(name: str) -> None:
    ET.fromstring(drawn.group_plot("group", {name: GROUPS["F"]}, "original"))


def test_a_group_without_images_in_one_set_keeps_its_row() -> None:
    text = drawn.group_plot("group", {"F": {"test": GROUPS["F"]["test"]}, "M": {"forget": None}}, "retrained")
    assert text.count("<!-- F -->") == text.count("<!-- M -->") >= 1


def test_the_noise_floor_is_named_where_it_is_known() -> None:
    plot, part = PLOTS["distance"]
    assert "<!-- noise floor -->" in plot(part)
    assert "<!-- noise floor -->" not in plot(sample_audit(retrained=1)["distance"])


def test_each_method_of_a_curve_is_named_and_this_run_is_ringed() -> None:
    plot, part = PLOTS["curve"]
    text = plot(part)
    for name in ("random labeling", "saliency", "this run"):
        assert f"<!-- {name} -->" in text
    assert plot([{**row, "this": False} for row in part]) != text
