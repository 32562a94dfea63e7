"""The report for people."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from audit_samples import FINDINGS, VARIANTS, sample_audit
from pages import Page

from monai_unlearn.cost import Cost
from monai_unlearn.report import model_card, render_html

MakeReport = Callable[..., dict[str, Any]]
Render = Callable[..., Page]
SECTIONS = {
    "summary": "Summary",
    "models": "How well each model does",
    "attacks": "Can they be told apart?",
    "distance": "How far from retraining?",
    "harm": "Whom it hurts",
    "cost": "What it cost",
    "left": "What is left",
    "card": "For the model card",
    "request": "The request",
    "words": "What the words mean",
    "made": "How it was made",
}
DRAWN: dict[str, str] = {}
parsed = cache(Page)


@pytest.fixture(params=VARIANTS)
def drawn(request: pytest.FixtureRequest, make_variant: Callable[[str], dict[str, Any]]) -> str:
    """The page of each variant, made once; some with their plots, which take their time."""
    if request.param not in DRAWN:
        if request.param not in ("classes", "findings", "one image, no reference"):
            request.getfixturevalue("undrawn")
        DRAWN[request.param] = render_html(make_variant(request.param))
    return DRAWN[request.param]


@pytest.fixture
def render(make_report: MakeReport, undrawn: None) -> Render:
    """A page without its plots."""
    return lambda **changes: Page(render_html(make_report(**changes)))


@pytest.fixture
def render_variant(make_variant: Callable[[str], dict[str, Any]], undrawn: None) -> Callable[[str], Page]:
    return lambda name: Page(render_html(make_variant(name)))


# ---- the page as such


def test_it_is_whole_and_balanced_html(drawn: str) -> None:
    page = parsed(drawn)
    assert drawn.startswith("<!DOCTYPE html>")
    assert (page.errors, page.open) == ([], [])
    assert [page.names.count(name) for name in ("html", "head", "body", "title", "h1", "main")] == [1] * 6
    assert ("html", {"lang": "en"}) in page.tags
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_no_id_stands_twice_and_every_reference_has_its_target(drawn: str) -> None:
    page = parsed(drawn)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    references = set(re.findall(r'href="#([^"]+)"', drawn)) | set(re.findall(r"url\(#([^)]+)\)", drawn))
    references |= {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert references
    assert references <= set(ids)


def test_it_loads_nothing_from_anywhere(drawn: str) -> None:
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>)]+", drawn))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    assert "@import" not in drawn
    assert not re.search(r"url\((?!#)", drawn)
    for tag, attributes in parsed(drawn).tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")


def test_headings_are_in_order_and_the_contents_list_them(drawn: str) -> None:
    page = parsed(drawn)
    levels = [int(tag[1]) for tag in page.names if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    sections = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert sections == [name for name in SECTIONS if name in sections]
    for name in sections:
        assert f'<h2 id="{name}">{SECTIONS[name]}</h2>' in drawn
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in sections[1:]]


def test_each_plot_has_a_text_alternative_a_caption_and_a_table(drawn: str) -> None:
    page = parsed(drawn)
    figures = re.findall(r"<figure>(.*?)</figure>(.*?)(?=<figure>|</section>|<h3>|$)", drawn, re.DOTALL)
    drawings = page.all("svg")
    assert len(figures) == len(drawings) == page.names.count("figcaption") >= 2
    for inside, after in figures:
        alternative = re.search(r'<div role="img" aria-label="([^"]+)">\s*<svg', inside)
        assert alternative is not None
        assert len(alternative[1]) > 40
        assert re.search(r"tables? below ha(s|ve) ", alternative[1])
        assert "<table>" in after
        assert len(re.sub(r"<[^>]+>|\s", "", inside[inside.index("<figcaption>") :])) > 15
    for attributes in drawings:
        assert attributes["aria-hidden"] == "true"
        assert "viewbox" in attributes
        assert "width" not in attributes


def test_every_table_has_a_caption_and_headings_and_can_be_reached_by_keyboard(drawn: str) -> None:
    page = parsed(drawn)
    tables = page.names.count("table")
    assert tables == page.names.count("caption") >= 4
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row", "rowgroup"} or {
        attributes.get("scope") for attributes in page.all("th")
    } == {"col", "row"}
    regions = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(regions) == tables + page.names.count("figure")
    for attributes in regions:
        assert (attributes["role"], attributes["tabindex"]) == ("region", "0")
    names = [attributes["aria-label"] for attributes in regions]
    assert len(set(names)) == len(names)


def test_what_is_undefined_is_a_dash(drawn: str) -> None:
    words = parsed(drawn).words
    for phrase in ("or none", "that none is"):
        words = words.replace(phrase, "")
    assert not re.search(r"\b(nan|none|null|inf)\b", words, re.IGNORECASE)


def test_it_promises_nothing(drawn: str) -> None:
    words = parsed(drawn).words.lower()
    for promise in ("certified", "passed", "clean", "guarantee", "gdpr", "has forgotten"):
        assert promise not in words
    assert "forgotten" not in words.replace("to be forgotten", "")


def test_it_is_made_from_the_json_alone(make_variant: Callable[[str], dict[str, Any]]) -> None:
    report = make_variant("one image, no reference")
    before = copy.deepcopy(report)
    again = json.loads(json.dumps(report))
    assert render_html(again) == render_html(report)
    assert report == before


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast(drawn: str) -> None:
    style = drawn[drawn.index("<style>") : drawn.index("</style>")]
    colors = set(re.findall(r"[{; ]color: (#[0-9a-f]{6})", style))
    assert len(colors) >= 3
    for color in colors:
        for background in ("#ffffff", "#f3f6f9"):
            light, dark = sorted((_luminance(color), _luminance(background)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5


# ---- what comes from outside

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title><b>&amp;", "--><b>{{ 7 * 191 }}"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_comes_from_outside_is_escaped(make_report: MakeReport, undrawn: None, hostile: str) -> None:
    provenance = {
        "original_checkpoint": hostile,
        "data": {"name": hostile},
        "versions": {hostile: hostile},
        "machine": {"device": hostile},
        "retrained_on": {"device": hostile},
        "hashes": {hostile: hostile},
    }
    audit = sample_audit(classes=(hostile, "b"))
    audit["verdict"]["reason"] = hostile
    audit["attacks"]["matched_by"] = [hostile]
    audit["subgroups"] = {hostile: {**audit["subgroups"]["sex"], "groups": {hostile: {}}}}
    report = make_report(
        method=hostile,
        settings={hostile: hostile},
        provenance=provenance,
        audit=audit,
        notes=[hostile],
        left=[{"what": hostile, "path": hostile, "ours": True, "holds": hostile}],
        request={"reference": hostile, "images": 31},
    )
    text = render_html(report)
    page = Page(text)
    assert hostile not in text
    assert "1337" not in text
    assert page.errors == []
    assert not {"script", "img", "b"} & set(page.names)
    assert page.words.count(" ".join(hostile.split())) >= 16


def test_names_that_are_drawn_are_escaped(make_report: MakeReport, finding_figures: dict[str, dict]) -> None:
    hostile = "<script>-->"
    for model in finding_figures.values():
        for split in ("forget", "retain", "validation", "test"):
            model[split]["auroc_per_finding"] = {hostile: 0.7, "Edema": 0.8}
    audit = sample_audit(classes=(hostile, "Edema"))
    audit["subgroups"] = {hostile: {**audit["subgroups"]["sex"]}}
    groups = audit["subgroups"][hostile]["groups"]
    audit["subgroups"][hostile]["groups"] = {hostile: groups["F"], "\\g<1>$x^{": groups["M"]}
    text = render_html(make_report(task="multi-label", audit=audit))
    page = Page(text)
    assert hostile not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)  # drawn text stands in a comment too
    assert page.errors == []
    assert not {"script", "img", "b"} & set(page.names)


# ---- the sections


def test_only_what_a_report_has_is_shown(render_variant: Callable[[str], Page]) -> None:
    def sections(name: str) -> set[str | None]:
        return {attributes["aria-labelledby"] for attributes in render_variant(name).all("section")}

    assert sections("classes") == set(SECTIONS)
    assert sections("no reference") == set(SECTIONS) - {"distance", "request"}
    assert sections("no audit") == {"summary", "models", "attacks", "cost", "card", "words", "made"}
    assert sections("findings, no audit") == sections("no audit") | {"harm"}


def test_the_tables_hold_the_figures(render_variant: Callable[[str], Page]) -> None:
    words = render_variant("classes").words
    for told in (
        "99.0 · 99.5 · 0.01",
        "74.0 · 87.0 · 0.26",
        "n = 269",
        "31 of 300 training images to be forgotten",
        "synthetic cells",
        "random labeling",
        "runs/models/x/model.pt",
        "lr 0.013",
        "cd" * 32,
        "torch 2.13",
        "another processor",
        # attacks
        "31 images to be forgotten of 7 patients and 52 unseen ones of 13 patients",
        "weighted to be alike in class, sex; so weighted, the unseen ones count as much as 44",
        "log-odds of the truth original 0.83 (0.78 to 0.88) 73.1 9.0 –",
        "by patient original 0.86",
        "ratio attack (1 reference) original 0.85",
        "U-LiRA (16 shadow models) original 0.87",
        "loss +0.02 (−0.01 to +0.05) −0.02 to +0.05 equivalent",
        "On the original model, which was trained on these images, the AUC is 0.83 (0.78 to 0.88): membership is found",
        "it is 0.49 (0.43 to 0.55): as it should be",
        "accuracy is +27.0 points on training images",
        # distance
        "average gap 16.5 3.8 1.2 lower",
        "excess over the noise floor – 2.5 – lower",
        "indiscernibility (retrained: 0.99) 0.34 0.96 –",
        "JS divergence 0.110 0.060 0.021",
        "agreement 71.0 83.0 91.0",
        "The original model is at least three noise floors away",
        "2.0 points of accuracy on the retain set and 7.0 on the test set",
        "unlearned 1.40 1.40 1.40 1.40 noise floor 0.30",
        "1.30 on average over the images",
        "after 12 steps, the retrained one not within 50 steps",
        # harm
        "sensitivity 62.0 56.0 63.0 −6.0 (−8.0 to −4.0) −7.0 (−9.0 to −5.0)",
        "pneumonia 57 40.0 46.0 39.0 +7.0 (+3.8 to +10.2) +8.0 (+4.6 to +11.4)",
        "unlearned 35.0 31.0 25",
        "test F against M +3.1 (+0.4 to +5.8) 0.013 0.052",
        "forget too few groups or images",
        "F forget 36 9 74.0 · 87.0 · 61.0 69.0 · 82.0 · 56.0 74.5 · 87.5 · 61.5 −5.5 (−8.5 to −2.5) 0.52",
        "10.0 % (this run) 30 saliency −3.0 (−5.0 to −1.0) 3.0 0.48",
        # cost, and what is left
        "unlearn 10.5 3,000 3,031 3,000",
        "0.19 in seconds, 0.11 in samples",
        "saliency mask runs/saliency/private a function of the forget set finalise",
        "original model model.pt weights from before you",
        "python -m monai_unlearn finalise RUN",
        "audit: resamples 1000",
    ):
        assert told in words, told


def test_the_page_of_findings_speaks_of_findings(render_variant: Callable[[str], Page]) -> None:
    words = render_variant("findings").words
    for told in (
        "87.0 · 74.0 · 0.26",
        "AUROC in % (mean over findings), then accuracy",
        "unlearned model's mean AUROC is 7.0 points lower than",
        "Of the single findings Fracture differs most: its AUROC is 13.5 points lower than",
        "Over forget, retain and test mean AUROC",
        "How sure each model is of the true findings",
        "Edema 84.5 81.5 85.0",
        "Fracture 85.5 72.5 86.0",
        "Nodule – – –",
        "forget: Fracture test: Nodule",
        "False negatives of 3 findings",
        "On the dotted line findings are there as often as the model says",
    ):
        assert told in words, told
    for of_classes in ("the true class", "mean over classes", "accuracy is", "of the class"):
        assert of_classes not in words


def test_without_a_retrained_model_nothing_is_said_of_one(render_variant: Callable[[str], Page]) -> None:
    for name, absent in (("no reference", "There is no retrained model to compare with."), ("findings, no audit", "")):
        words = render_variant(name).words
        absent = absent or "There is no retrained model to compare with, so there is no yardstick"
        assert absent in words
        rest = words.replace(absent, "").replace("No model was retrained for comparison.", "")
        assert re.findall(r"[^.]*retrain[^.]*", rest, re.IGNORECASE) == []


def test_a_run_that_retrains_says_what_it_is_compared_with(render_variant: Callable[[str], Page]) -> None:
    told = "The method of this run is retraining itself. The retrained model that it is compared with differs only in"
    assert told in render_variant("retraining").words
    assert told not in render_variant("classes").words


def test_with_one_retrained_model_there_is_no_noise_floor(render_variant: Callable[[str], Page]) -> None:
    words = render_variant("one retrained model").words
    assert "There is one retrained model, so the noise floor" in words
    assert "The blue band" not in words
    assert "How far two retrained models are from each other was not measured" in words
    assert "three noise floors" not in words
    assert "measured in different runs, so seconds are not quite comparable" in words


def test_the_cost_says_whether_it_was_measured_together(render: Render) -> None:
    cost = {
        "mask": Cost(),
        "tuning": Cost(),
        "unlearn": Cost(5, 100, 100, 100),
        "retrain": Cost(10, 400, 400, 400),
        "evaluation": Cost(3, 70, 70, 0),
        "caching": Cost(2, 0, 0, 0),
    }
    for together, told in (
        (True, "Both were measured in one run on one machine."),
        (False, "The two were not measured in one run"),
        (None, "Whether both were measured in one run is not known"),
    ):
        words = render(cost=cost, measured_together=together).words
        assert f"0.50 in seconds, 0.25 in samples. {told}" in words
    assert "evaluation (apart) 3.0 70 70 0" in words
    assert "caching (apart) 2.0 0 0 0" in words


@pytest.mark.parametrize(("size", "told"), [(None, "–"), (3 * 2**20, "3 MiB"), (5 * 2**29, "2.5 GiB")])
def test_the_peak_memory_is_told(make_report: MakeReport, undrawn: None, size: int | None, told: str) -> None:
    report = make_report()
    report["cost"]["unlearn"]["peak_bytes"] = size
    assert f"unlearn 10.5 3,000 3,031 3,000 {told} retrain" in Page(render_html(report)).words


def test_a_share_to_be_drawn_is_listed_only_where_it_decided(render: Render) -> None:
    settings = {"forget_fraction": 0.125, "forget_request": None, "lr": 0.5}
    words = render(settings=settings).words
    assert "forget_fraction 0.125" in words
    assert "forget_request" not in words
    for name in ("forget_request", "forget_indices", "forget_patients"):
        words = render(settings={**settings, name: "a file"}).words
        assert "forget_fraction" not in words
        assert f"{name} a file" in words


def test_of_very_many_groups_the_plot_shows_the_most_changed(
    make_report: MakeReport, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        "monai_unlearn.report.audit_plots.group_plot", lambda name, groups, *_: shown.extend(groups) or "<svg></svg>"
    )
    audit = sample_audit()
    group = audit["subgroups"]["sex"]["groups"]["F"]
    groups = {}
    for i in range(80):
        groups[f"site {i}"] = copy.deepcopy(group)
        for split in groups[f"site {i}"].values():
            split["change"]["retrained"]["difference"] = -i / 100
    audit["subgroups"] = {"site": {"groups": groups, "largest": {}}}
    page = Page(render_html(make_report(audit=audit)))
    assert shown == [f"site {i}" for i in range(50, 80)]
    assert "Shown are the 30 groups that changed most." in page.words
    assert "site 3 forget 36 9 74.0 · 87.0" in page.words


def test_the_model_card_stands_in_the_page(make_variant: Callable[[str], dict[str, Any]], undrawn: None) -> None:
    report = make_variant("classes")
    assert " ".join(model_card(report).split()) in Page(render_html(report)).words


# ---- the request


def test_the_request_is_told_in_a_table_and_its_warnings_above(render: Render, request_figures: dict) -> None:
    words = render(request=request_figures, notes=["This attack sees 0.25 at best."]).words
    findings, rest = words.split("How well each model does", 2)[1:]
    findings = words.split("Contents")[0]
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
        "equal images among the training images, taken along 4",
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
    render: Render, request_figures: dict, overlap: dict | None, words: str
) -> None:
    page = render(request={**request_figures, "overlap": overlap}).words
    assert words in page
    assert ("of the same patients" in page) is (overlap is not None)
    assert "still evaluated on" not in page


def test_of_a_request_only_what_is_known_is_told(render: Render, request_figures: dict) -> None:
    unknown = {**dict.fromkeys(request_figures), "images": 31, "entries": 1, "unmatched": 0}
    table = render(request=unknown).words.split("Who was to be forgotten, in numbers.")[1].split("What the words")[0]
    assert table.strip() == (
        "entries 1 entries that matched nothing 0 may be met in part no images to be forgotten 31 "
        "equal images under another name not looked for"
    )
    assert "The request" not in render().words


def test_with_one_finding_there_is_a_page_too(
    make_report: MakeReport, finding_figures: dict[str, dict], undrawn: None
) -> None:
    for model in finding_figures.values():
        for split in ("forget", "retain", "validation", "test"):
            model[split]["auroc_per_finding"] = {"Edema": 0.8}
    words = Page(render_html(make_report(task="multi-label", audit=sample_audit(classes=FINDINGS[:1])))).words
    assert "Of the single findings" not in words
    assert "Left out of the means" not in words
    assert "False negatives of 1 finding" in words
