"""What the report says in words: verdicts, limits, and no more than the figures say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import sample_audit

from monai_unlearn.report import terminal_table
from monai_unlearn.report.results import cost_sentence
from monai_unlearn.report.summary import findings, largest_missed
from monai_unlearn.report.verdict import headline, limit, meaning, verdict_line

MakeReport = Callable[..., dict[str, Any]]


@pytest.fixture
def make(make_report: MakeReport) -> MakeReport:
    """A report with an audit whose verdict is changed."""

    def make(answer: str = "equivalent", reference: bool = True, **changes: Any) -> dict[str, Any]:
        audit = sample_audit(reference)
        audit["verdict"] |= {"answer": answer, **changes}
        return make_report(reference=reference, audit=audit)

    return make


@pytest.mark.parametrize(
    ("answer", "direction", "reference", "told"),
    [
        ("equivalent", None, True, "Not distinguished from the retrained model by these tests"),
        ("equivalent", None, False, "Not distinguished from unseen images by these tests"),
        ("different", "remembers", True, "Distinguished from the retrained model: part of what was learned can still"),
        ("different", "remembers", False, "Distinguished from unseen images: part of what was learned can still"),
        ("different", "over-forgets", True, "Over-forgetting: distinguished from the retrained model by scoring worse"),
        ("different", "over-forgets", False, "Over-forgetting: distinguished from unseen images by scoring worse"),
        ("different", None, True, "Distinguished from the retrained model"),
        ("inconclusive", None, True, "Inconclusive"),
        ("powerless", None, True, "Powerless: these tests could not have seen a difference"),
        ("not comparable", None, False, "Not comparable: there is no yardstick for this request"),
    ],
)
def test_each_verdict_has_its_words(
    make: MakeReport, answer: str, direction: str | None, reference: bool, told: str
) -> None:
    report = make(answer, reference, direction=direction)
    assert headline(report).startswith(told)
    everything = " ".join([headline(report), limit(report), meaning(report) or "", verdict_line(report)])
    for promise in ("passed", "certified", "forgotten.", "has forgotten"):
        assert promise not in everything.lower()
    assert ("retrained model" in everything) is (reference and answer in ("equivalent", "different"))
    assert ("worse" in everything) is (direction == "over-forgets")
    assert len(verdict_line(report)) < 120


@pytest.mark.parametrize(
    ("detectable", "told"),
    [
        (0.06, "n = 31 images of 7 patients; a difference of AUC below 0.06 would not have been seen"),
        (0.0642, "a difference of AUC below 0.06 would"),
        (0.0042, "a difference of AUC below 0.004 would"),
        (0.499, "a difference of AUC below 0.50 would"),
        (0.5, "not even two models that differ in everything would have been told apart"),
        (None, "n = 31 images of 7 patients"),
    ],
)
def test_what_would_not_have_been_seen_is_said(make: MakeReport, detectable: float | None, told: str) -> None:
    text = limit(make(detectable=detectable))
    assert told in text
    assert (detectable is None) is (";" not in text)


def test_without_patients_only_images_are_counted(make_report: MakeReport) -> None:
    report = make_report(audit=sample_audit(patients=False))
    assert limit(report).startswith("n = 31; a difference")


@pytest.mark.parametrize("floor", [1.2, None])
def test_the_terminal_has_the_verdict_and_the_noise_floor_in_one_line(make: MakeReport, floor: float | None) -> None:
    report = make()
    report["audit"]["distance"]["average_gap"]["floor"] = floor
    line = next(line for line in terminal_table(report).splitlines() if line.startswith("Verdict"))
    expected = "Verdict: not distinguished from the retrained model (n = 31; below 0.06 of AUC unseen)"
    assert line == expected + ("" if floor is None else "; noise floor 1.2 points")
    assert "Verdict: powerless (n = 31)" in terminal_table(make("powerless", detectable=None, reference=False))
    assert "differs from the retrained model: over-forgets (" in terminal_table(
        make("different", direction="over-forgets")
    )


def _told(report: dict[str, Any]) -> str:
    return "\n".join(findings(report))


def test_the_summary_goes_from_attack_to_cost(make: MakeReport) -> None:
    told = _told(make())
    places = [
        told.index(words)
        for words in (
            "is right in 52 % of pairs (47 to 57 %); for a model that never saw these images it is 50 %. Before "
            "unlearning it was 83 %.",
            "The same attack does find these images in the original model",
            "is 3.8 percentage points away from the retrained model on average; two retrained models are 1.2 points",
            "accuracy is 7.0 points lower than the retrained model's (95 % interval of the difference −9.0 to −5.0)",
            "rose most for the class pneumonia: +8.0 (+4.6 to +11.4) percentage points",
            "Between groups by sex, by age band, no difference beyond chance was seen",
            "Cost: 11.8 s",
        )
    ]
    assert places == sorted(places)


def test_an_attack_that_sees_nothing_on_the_original_is_too_weak(make: MakeReport) -> None:
    report = make()
    report["audit"]["attacks"]["sanity"]["original"]["detected"] = False
    assert "too weak here to show anything" in _told(report)
    assert "it can see membership" not in _told(report)
    report["audit"]["attacks"]["sanity"]["original"]["detected"] = None
    assert "too weak" not in _told(report)


@pytest.mark.parametrize("as_expected", [True, False, None])
def test_halves_that_differ_are_a_warning(make: MakeReport, as_expected: bool | None) -> None:
    report = make()
    report["audit"]["attacks"]["sanity"]["halves"]["as_expected"] = as_expected
    assert ("Read its other figures with doubt" in _told(report)) is (as_expected is False)


def test_images_without_a_match_are_counted(make: MakeReport) -> None:
    report = make()
    assert "Left out" not in _told(report)
    for n, told in ((1, "1 image"), (4, "4 images")):
        report["audit"]["attacks"]["forget"]["without_match"] = n
        assert f"Left out of the attacks: {told} to be forgotten without an unseen image of the same kind" in _told(
            report
        )


@pytest.mark.parametrize("power", [True, False, None])
def test_a_forget_set_without_power_is_named(make: MakeReport, power: bool | None) -> None:
    report = make()
    report["audit"]["distance"]["power"] = power
    assert ("has no power" in _told(report)) is (power is False)


def test_the_most_missed_class_is_that_whose_misses_rose_most(make: MakeReport) -> None:
    report = make()
    classes = report["audit"]["utility"]["test"]["classes"]
    classes["normal"]["false_negatives"]["retrained"] = {"difference": 40.0, "low": None, "high": None}
    assert largest_missed(report)[:2] == ("normal", "retrained")
    assert "rose most for the class normal: +40.0 percentage points more" in _told(report)
    for row in classes.values():
        row["false_negatives"]["retrained"] = None
    assert largest_missed(report)[:2] == ("pneumonia", "original")
    for row in classes.values():
        row["false_negatives"]["original"] = {"difference": -1.0, "low": -2.0, "high": 0.0}
    assert "False negatives" not in _told(report)
    del report["audit"]["utility"]["test"]
    assert largest_missed(report) is None


@pytest.mark.parametrize(("p", "beyond"), [(0.049, True), (0.05, False), (None, False)])
def test_a_difference_between_groups_is_named_where_chance_does_not_explain_it(
    make: MakeReport, p: float | None, beyond: bool
) -> None:
    report = make()
    sections = report["audit"]["subgroups"]
    sections["sex"]["largest"]["test"]["p_holm"] = p
    told = _told(report)
    named = "the retrained model differs by +3.1 (+0.4 to +5.8) points (the first minus the second; p = 0.049"
    assert ("By sex, unlearning did not change all groups alike: between F and M" in told) is (named in told) is beyond
    assert ("groups by age band, no" in told) is beyond
    assert ("groups by sex, by age band, no" in told) is not beyond
    for section in sections.values():
        section["largest"]["test"] = None
    assert "Between groups" not in _told(report)


def test_of_one_image_nothing_is_said_of_pairs(make: MakeReport) -> None:
    report = make()
    attacks = report["audit"]["attacks"]
    attacks["population"]["log_odds"]["models"]["unlearned"]["low"] = None
    attacks["sanity"]["original"] |= {"low": None, "detected": False}
    assert "of pairs" not in _told(report)
    assert "too weak" not in _told(report)


def test_what_is_left_is_counted(make_report: MakeReport, left: list[dict]) -> None:
    assert "or weights from before, in 2 places, listed below." in _told(make_report(left=left))
    assert "in 1 place," in _told(make_report(left=left[:1]))
    assert "What is left" not in _told(make_report())


def test_a_request_that_can_be_compared_without_a_reference_says_with_what(make: MakeReport) -> None:
    assert "held against guessing" in _told(make(reference=False))
    assert "no yardstick" in _told(make("not comparable", reference=False))


# ---- without an audit


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        ({"auc": 0.30, "low": 0.25, "high": 0.35}, "Over-forgetting: the images to be forgotten score worse"),
        ({"auc": 0.80, "low": 0.75, "high": 0.85}, "Part of what was learned from these images can still be seen"),
        ({"auc": 0.52, "low": 0.46, "high": 0.58}, "does not tell the two models apart"),
    ],
)
def test_the_findings_name_the_side_on_which_the_attack_fails(
    make_report: MakeReport, figures: dict[str, dict], attack: dict[str, float], sentence: str
) -> None:
    figures["unlearned"]["attack"] = attack
    told = _told(make_report())
    others = ("Over-forgetting", "can still be seen", "does not tell the two models apart")
    assert sentence in told
    assert sum(other in told for other in others) == 1
    assert f"right in {100 * attack['auc']:.0f} % of pairs" in told
    assert "it is 50 %" in told


@pytest.mark.parametrize("reference", [True, False])
def test_too_few_images_say_nothing(make_report: MakeReport, figures: dict[str, dict], reference: bool) -> None:
    for model in figures.values():
        model["attack"] = {"auc": 0.9, "low": float("nan"), "high": float("nan")}
        model["forget"]["n"] = 1
    told = _told(make_report(reference))
    assert "With 1 image to be forgotten nothing can be said about whether they can still be told" in told
    assert "of pairs" not in told


def test_without_a_retrained_model_there_is_no_yardstick(make_report: MakeReport) -> None:
    told = _told(make_report(False))
    assert "There is no retrained model to compare with, so there is no yardstick" in told
    assert "percentage points away" not in told
    assert "tell the two models apart" not in told
    assert "accuracy is 6.0 points lower than the original model's" in told


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.65, "7.0 points lower than"), (0.80, "8.0 points higher than"), (0.72, "the same as")],
)
def test_the_findings_compare_the_accuracy_on_new_images(
    make_report: MakeReport, figures: dict[str, dict], accuracy: float, words: str
) -> None:
    figures["unlearned"]["test"]["accuracy"] = accuracy
    assert f"accuracy is {words} the retrained model's" in _told(make_report())


def test_the_findings_compare_the_ranking_of_new_images_too(make_report: MakeReport, figures: dict[str, dict]) -> None:
    figures["unlearned"]["test"]["auroc"], figures["retrained"]["test"]["auroc"] = 0.88, 0.957
    assert "its AUROC is 7.7 points lower than the retrained model's" in _told(make_report())
    figures["unlearned"]["test"] = {"accuracy": None, "auroc": None, "loss": None, "n": 83}
    told = _told(make_report())
    assert "On new images" not in told
    assert "percentage points away" not in told


@pytest.mark.parametrize(
    ("retain", "words"), [(-0.071, "7.1 points lower than"), (0.02, "2.0 points higher than"), (0.0, "the same as")]
)
@pytest.mark.parametrize("reference", [True, False])
def test_the_findings_say_what_was_lost_on_images_that_stay(
    make_report: MakeReport, figures: dict[str, dict], retain: float, words: str, reference: bool
) -> None:
    against = "retrained" if reference else "original"
    figures["unlearned"]["retain"]["accuracy"] = figures[against]["retain"]["accuracy"] + retain
    told = _told(make_report(reference))
    assert f"(the retain set) the unlearned model's accuracy is {words} the {against} model's." in told


def test_of_several_findings_the_mean_auroc_on_images_that_stay_is_told(
    make_report: MakeReport, finding_figures: dict[str, dict]
) -> None:
    finding_figures["unlearned"]["retain"]["auroc"] = finding_figures["retrained"]["retain"]["auroc"] - 0.046
    assert "(the retain set) the unlearned model's mean AUROC is 4.6 points lower" in _told(
        make_report(task="multi-label")
    )
    finding_figures["unlearned"]["retain"]["auroc"] = None
    assert "that stay" not in _told(make_report(task="multi-label"))


def test_with_several_findings_the_one_that_differs_most_is_named(
    make_report: MakeReport, finding_figures: dict[str, dict]
) -> None:
    told = _told(make_report(task="multi-label"))
    assert "Of the single findings Fracture differs most: its AUROC is 13.5 points lower than the retrained" in told
    assert "Over forget, retain and test mean AUROC" in told


# ---- cost


@pytest.mark.parametrize(
    ("together", "told"), [(True, "in one run on one machine"), (False, "in different runs"), (None, "is not known")]
)
def test_the_ratio_says_whether_it_can_be_compared(make_report: MakeReport, together: bool | None, told: str) -> None:
    cost = _told(make_report(measured_together=together))
    assert re.search(rf": 19 % of the time of retraining \([^)]*{told}", cost)
    assert "of the time" not in _told(make_report(reference=False))


def test_a_cost_that_nobody_measured_is_not_nothing(make_report: MakeReport) -> None:
    report = make_report(cost={})
    assert cost_sentence(report["cost"]) == "Cost: not measured"
    assert "Cost: not measured." in _told(report)
