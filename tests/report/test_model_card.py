"""The section for the model card."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import VARIANTS, sample_audit

from monai_unlearn.report import model_card

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_whole_for_every_kind_of_report(make_variant: Make, variant: str) -> None:
    card = model_card(make_variant(variant))
    headings = [line for line in card.splitlines() if line.startswith("#")]
    audited = "no audit" not in variant
    assert headings == [
        "## Unlearning",
        *(["### What the tests say"] if audited else []),
        "### Figures",
        *(["### Whom it hurt"] if audited else []),
        "### Cost",
        "### Limits",
    ]
    assert card.endswith("\n")
    assert "Evidence, not proof" in card
    for promise in ("certified", "passed", "clean"):
        assert promise not in card.lower()
    assert "forgotten" not in card.lower().replace("to be forgotten", "")
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_it_has_the_verdict_with_its_limits_and_the_figures(make_variant: Make) -> None:
    card = model_card(make_variant("classes"))
    for told in (
        "- Method: random labeling",
        "- To be forgotten: 31 of 300 training images, of 7 patients",
        "**Not distinguished from the retrained model by these tests** (n = 31 images of 7 patients; a difference of "
        "AUC below 0.06 would not have been seen).",
        "Average gap to the retrained model: 3.8 percentage points; noise floor: 1.2.",
        "| unlearned | 74.0 | 97.0 | 70.0 | 65.0 | 0.52 (0.46 to 0.58) |",
        "against the retrained model, in points (95 % interval): accuracy −7.0 (−9.0 to −5.0)",
        "- Largest rise of false negatives: pneumonia, +8.0 (+4.6 to +11.4) points against the retrained model",
        "- Largest difference by sex: F against M, +3.1 (+0.4 to +5.8) points, p = 0.052 (Holm)",
        "11.8 s and 3,031 samples",
        "- Data or weights from before were still in 2 places.",
    ):
        assert told in card, told


def test_without_a_retrained_model_it_speaks_of_none_but_to_say_so(make_variant: Make) -> None:
    for name in ("no reference", "findings, no audit"):
        card = model_card(make_variant(name))
        assert re.findall(".*retrain.*", card, re.IGNORECASE) == ["- No model was retrained for comparison."]
    assert "The method of this run is retraining itself." in model_card(make_variant("retraining"))


def test_a_run_without_test_figures_says_that_harm_was_not_measured(make_report: Make) -> None:
    audit = sample_audit()
    audit["utility"], audit["subgroups"] = {}, {}
    assert "### Whom it hurt\n\nNot measured." in model_card(make_report(audit=audit))


@pytest.mark.parametrize("hostile", ["a | b", "`code`", "<b>x</b>", "[x](y)", "## x\n## y", "*x*"])
def test_names_are_text_and_no_markdown(make_report: Make, hostile: str) -> None:
    audit = sample_audit(classes=(hostile,))
    audit["verdict"]["reason"] = hostile
    card = model_card(make_report(audit=audit, method=hostile, notes=[hostile]))
    assert hostile not in card
    assert sum(line.startswith("#") for line in card.splitlines()) == 6
    plain = re.sub(r"\\(.)", r"\1", card)
    assert plain.count(" ".join(hostile.split())) == 4
