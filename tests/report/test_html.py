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


# ---- the request, notes, and several findings an image


def test_the_request_is_told_in_a_table_and_its_warnings_above(
    render: Callable[..., str], request_figures: dict
) -> None:
    words = _Page(render(request=request_figures, notes=["This attack sees 0.25 at best."])).words
    findings, rest = words.split(NOT_PROOF)
    table = rest.split("The request ")[1].split("What the words mean")[0]
    assert "Mind the request: 1 of its 9 entries matched nothing; 2 of 7 patients keep" in findings
    assert "This attack sees 0.25 at best." in findings
    for row in (
        "reference 2024-017",
        "what an entry means patient",
        "entries 9",
        "entries that matched nothing 1",
        "may be met in part yes",
        "images to be forgotten 31",
        "patients with such images 7",
        "patients who keep other images 2",
        "equal images among the training images, forgotten too 4",
        "equal images left out of the evaluation 6",
        "validation and test images of the same patients 8 (patients: 5), kept in the evaluation",
    ):
        assert row in table


@pytest.mark.parametrize(
    ("overlap", "words"),
    [
        ({"option": "refuse", "patients": 0, "images": 0}, "of the same patients 0"),
        ({"option": "drop", "patients": 5, "images": 8}, "of the same patients 8 (patients: 5), left out of the"),
        (None, ""),
    ],
)
def test_what_became_of_shared_patients_is_told(
    render: Callable[..., str], request_figures: dict, overlap: dict | None, words: str
) -> None:
    page = _Page(render(request={**request_figures, "overlap": overlap})).words
    assert words in page
    assert ("of the same patients" in page) is (overlap is not None)
    assert "still evaluated on" not in page


def test_of_a_request_only_what_is_known_is_told(render: Callable[..., str], request_figures: dict) -> None:
    unknown = {**dict.fromkeys(request_figures), "images": 31, "entries": 1, "unmatched": 0}
    words = _Page(render(request=unknown)).words
    table = words.split("The request ")[1].split("What the words mean")[0]
    assert table.strip() == (
        "entries 1 entries that matched nothing 0 may be met in part no images to be forgotten 31 "
        "equal images under another name not looked for"
    )
    assert "The request" not in _Page(render()).words


@pytest.fixture
def render_findings(
    finding_figures: dict[str, dict], make_report: MakeReport, make_scores: MakeScores
) -> Callable[..., str]:
    def make(**changes: Any) -> str:
        report = make_report(task="multi-label", **changes)
        scores = make_scores(report)
        for parts in scores.values():
            parts["forget"][:3] = np.nan
        return render_html(report, scores)

    return make


@pytest.mark.parametrize("reference", [True, False])
def test_the_page_of_findings_is_whole_and_has_a_plot_and_a_table_more(
    render_findings: Callable[..., str], reference: bool
) -> None:
    text = render_findings(reference=reference)
    page = _Page(text)
    assert (page.errors, page.open) == ([], [])
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("svg") == tags.count("figcaption") == 4
    assert tags.count("table") == 5
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert not re.search(r"\b(nan|none|null)\b", page.words.replace("or none", ""), re.IGNORECASE)


def test_the_page_of_findings_speaks_of_findings(render_findings: Callable[..., str]) -> None:
    words = _Page(render_findings()).words
    for told in (
        "87.0 · 74.0 · 0.26",
        "AUROC in % (mean over findings), then accuracy",
        "unlearned model's mean AUROC is 3.5 points lower than",
        "Of the single findings Fracture differs most: its AUROC is 13.5 points lower than",
        "Over forget, retain and test mean AUROC",
        "on 28 forgotten and 52 unseen images",
        "How sure each model is of the true findings",
        "Edema 84.5 81.5 85.0",
        "Fracture 85.5 72.5 86.0",
        "Nodule – – –",
        "forget: Fracture test: Nodule",
    ):
        assert told in words
    for of_classes in ("the true class", "mean over classes", "accuracy is"):
        assert of_classes not in words


def test_without_a_known_finding_among_them_nothing_can_be_said_of_forgotten_images(
    make_report: MakeReport, make_scores: MakeScores, finding_figures: dict[str, dict]
) -> None:
    for model in finding_figures.values():
        model["attack"] = {"auc": float("nan"), "low": float("nan"), "high": float("nan")}
    report = make_report(task="multi-label")
    scores = make_scores(report)
    for parts in scores.values():
        parts["forget"][:] = np.nan
    words = _Page(render_html(report, scores)).words
    assert "With 0 images to be forgotten of which a finding is known, nothing can be said" in words


def test_with_one_finding_no_single_one_differs_most(
    render_findings: Callable[..., str], finding_figures: dict[str, dict]
) -> None:
    for model in finding_figures.values():
        for split in ("forget", "retain", "validation", "test"):
            model[split]["auroc_per_finding"] = {"Edema": 0.8}
    words = _Page(render_findings()).words
    assert "Of the single findings" not in words
    assert "Left out of the means" not in words


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "--><b>&amp;"])
def test_names_of_findings_notes_and_references_are_escaped(
    render_findings: Callable[..., str], finding_figures: dict[str, dict], hostile: str
) -> None:
    for model in finding_figures.values():
        for split in ("forget", "retain", "validation", "test"):
            model[split]["auroc_per_finding"] = {hostile: None, "Edema": 0.8}
    text = render_findings(notes=[hostile], request={"reference": hostile, "images": 31})
    page = _Page(text)
    assert hostile not in re.sub(r"<!--.*?-->", "", text)  # drawn text stands in a comment of its plot
    assert page.errors == []
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
