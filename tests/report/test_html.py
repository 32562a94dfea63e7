"""The report for people."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from monai_unlearn.report import render_html

MakeReport = Callable[..., dict[str, Any]]
MakeScores = Callable[..., dict[str, dict[str, np.ndarray]]]

VOID = {"meta", "link", "br", "hr", "img", "input", "base"}


class _Page(HTMLParser):
    """Collects what a page is made of, and checks that every tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def render(make_report: MakeReport, make_scores: MakeScores) -> Callable[..., str]:
    def make(**changes: Any) -> str:
        report = make_report(**changes)
        return render_html(report, make_scores(report))

    return make


@pytest.mark.parametrize("reference", [True, False])
def test_it_is_whole_and_balanced_html(render: Callable[..., str], reference: bool) -> None:
    text = render(reference=reference)
    page = _Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.errors == []
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert [names.count(name) for name in ("html", "head", "body", "title", "h1")] == [1, 1, 1, 1, 1]
    assert ("html", {"lang": "en"}) in page.tags
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_no_id_stands_twice_and_every_reference_has_its_target(render: Callable[..., str]) -> None:
    text = render()
    ids = [attributes["id"] for _, attributes in _Page(text).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    references = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert references
    assert references <= set(ids)


def test_it_loads_nothing_from_anywhere(render: Callable[..., str]) -> None:
    text = render()
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>)]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for tag, attributes in _Page(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title><b>&amp;"])
def test_whatever_comes_from_outside_is_escaped(render: Callable[..., str], hostile: str) -> None:
    provenance = {
        "original_checkpoint": hostile,
        "data": {"name": hostile},
        "versions": {hostile: hostile},
        "machine": {"device": hostile},
        "retrained_on": {"device": hostile},
        "hashes": {hostile: hostile},
    }
    text = render(method=hostile, settings={hostile: hostile}, provenance=provenance)
    page = _Page(text)
    assert hostile not in text
    assert page.errors == []
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert page.words.count(" ".join(hostile.split())) >= 9


def test_each_plot_has_a_text_alternative_and_a_caption(render: Callable[..., str]) -> None:
    page = _Page(render())
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == len(drawings) == [tag for tag, _ in page.tags].count("figcaption") == 3
    for attributes in figures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20
    for attributes in drawings:
        assert attributes["aria-hidden"] == "true"
        assert "viewbox" in attributes
        assert "width" not in attributes


def test_the_tables_hold_the_figures(render: Callable[..., str]) -> None:
    words = _Page(render()).words
    for figure in ("99.0 · 99.5 · 0.01", "74.0 · 87.0 · 0.26", "0.52 (0.46 to 0.58)", "61.4", "26,900", "n = 269"):
        assert figure in words
    assert "31 of 300 training images to be forgotten" in words
    assert "synthetic cells" in words
    assert "random labeling" in words
    for value in ("runs/models/x/model.pt", "0.013", "cd" * 32, "2.13", "another processor"):
        assert value in words


def test_every_table_has_headings(render: Callable[..., str]) -> None:
    tags = [tag for tag, _ in _Page(render()).tags]
    scopes = [attributes.get("scope") for tag, attributes in _Page(render()).tags if tag == "th"]
    assert tags.count("table") == 4
    assert set(scopes) == {"col", "row"}


NOT_PROOF = "This report is evidence with limits, not proof"


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        ({"auc": 0.30, "low": 0.25, "high": 0.35}, "score worse than they would had the model never seen"),
        ({"auc": 0.80, "low": 0.75, "high": 0.85}, "Part of what was learned from these images can still be seen"),
        ({"auc": 0.52, "low": 0.46, "high": 0.58}, "does not tell the two models apart"),
    ],
)
def test_the_findings_name_the_side_on_which_the_attack_fails(
    render: Callable[..., str], figures: dict[str, dict], attack: dict[str, float], sentence: str
) -> None:
    figures["unlearned"]["attack"] = attack
    words = _Page(render()).words
    others = ("score worse than they would", "can still be seen", "does not tell the two models apart")
    assert sentence in words
    assert sum(other in words for other in others) == 1
    assert f"right in {100 * attack['auc']:.0f} % of pairs" in words
    assert "it is 50 %" in words
    assert NOT_PROOF in words


@pytest.mark.parametrize("reference", [True, False])
def test_too_few_images_say_nothing(render: Callable[..., str], figures: dict[str, dict], reference: bool) -> None:
    for model in figures.values():
        model["attack"] = {"auc": 0.9, "low": float("nan"), "high": float("nan")}
        model["forget"]["n"] = 1
    words = _Page(render(reference=reference)).words
    assert "nothing can be said about whether they can still be told from unseen ones" in words
    assert "too few for an interval" in words
    assert "of pairs (" not in words


def test_without_a_retrained_model_there_is_no_yardstick(render: Callable[..., str]) -> None:
    words = _Page(render(reference=False)).words
    assert "No model was retrained for comparison" in words
    assert "percentage points away" not in words
    assert "tell the two models apart" not in words
    assert "Retraining was measured on: –" in words


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.65, "7.0 points lower than"), (0.80, "8.0 points higher than"), (0.72, "the same as")],
)
def test_the_findings_compare_the_accuracy_on_new_images(
    render: Callable[..., str], figures: dict[str, dict], accuracy: float, words: str
) -> None:
    figures["unlearned"]["test"]["accuracy"] = accuracy
    assert f"accuracy is {words} the retrained model's" in _Page(render()).words


def test_the_findings_compare_the_ranking_of_new_images_too(
    render: Callable[..., str], figures: dict[str, dict]
) -> None:
    figures["unlearned"]["test"]["auroc"], figures["retrained"]["test"]["auroc"] = 0.88, 0.957
    assert "its AUROC is 7.7 points lower than the retrained model's" in _Page(render()).words


def test_what_is_undefined_is_a_dash(render: Callable[..., str], figures: dict[str, dict]) -> None:
    figures["unlearned"]["test"] = {"accuracy": None, "auroc": None, "loss": None, "n": 83}
    words = _Page(render()).words
    assert "– · – · –" in words
    assert "percentage points away" not in words
    assert not re.search(r"\b(nan|none|null)\b", words, re.IGNORECASE)


def test_it_promises_nothing(render: Callable[..., str]) -> None:
    words = _Page(render()).words.lower()
    for promise in ("certified", "clean", "has forgotten", "guarantee", "gdpr"):
        assert promise not in words
