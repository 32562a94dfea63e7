"""Perturb and recover in a bundle: within its budget, judged where there is something to judge by, and saying which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import Workplace, messages

pytest_plugins = ["bundle_runs"]
RECIPE = 4 * 108  # samples that retraining takes
JUDGEMENT = 12 + 21  # forget samples, and those of the selection half


def report_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_unlearning_and_judging_stay_within_the_budget(workplace: Workplace, budget) -> None:
    report = report_of(workplace.unlearn("auto", budget=budget, reference=False))
    cost = report["cost"]
    spent = cost["unlearn"]["samples"] + cost["tuning"]["samples"]
    assert budget * RECIPE - 2 * JUDGEMENT - 4 * 16 < spent <= budget * RECIPE
    assert cost["tuning"]["samples"] in (JUDGEMENT, 2 * JUDGEMENT)
    assert cost["tuning"]["backward"] == 0


def test_the_report_says_what_was_judged_and_by_what(workplace: Workplace) -> None:
    notes = report_of(workplace.unlearn("auto", budget=0.3, reference=False))["notes"]
    (judged,) = [note for note in notes if "selection half" in note]
    assert "matched by class" in judged


def test_it_needs_no_retrained_model_and_gives_the_same_with_one(workplace: Workplace) -> None:
    outputs = [
        workplace.unlearn("auto", budget=0.3, reference=reference, output_dir=f"runs/{reference}")
        for reference in (True, False)
    ]
    first, second = (torch.load(output / "unlearned_model.pt", weights_only=True) for output in outputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_request_by_the_originals_difficulty_has_nothing_comparable_and_says_so(workplace: Workplace) -> None:
    request = workplace.folder / "hardest.json"
    request.write_text(json.dumps({"include": [{"hardest": 10}]}))
    report = report_of(workplace.unlearn("auto", budget=0.3, reference=False, forget_request=str(request)))
    (note,) = [note for note in report["notes"] if "No state was judged" in note]
    assert "30 %" in note
    assert report["cost"]["tuning"]["samples"] == 0


def test_selection_data_that_is_too_small_is_said_and_the_budget_is_fixed(workplace: Workplace) -> None:
    arrays = dict(np.load(workplace.data))
    few = np.flatnonzero(arrays["val_labels"][:, 0] == 0)[:8]
    arrays |= {"val_images": arrays["val_images"][few], "val_labels": arrays["val_labels"][few]}
    np.savez(workplace.folder / "few.npz", **arrays)
    settings = {"dataset_file": str(workplace.folder / "few.npz"), "reference": False, "budget": 0.5}
    original = str(workplace.kept()["original"])
    report = report_of(workplace.unlearn("auto", original_checkpoint=original, **settings))
    assert any("No state was judged" in note for note in report["notes"])


def test_more_can_be_forgotten_than_is_retained(workplace: Workplace) -> None:
    report = report_of(workplace.unlearn("auto", budget=2, reference=False, forget_fraction=0.7))
    assert report["models"]["unlearned"]["forget"]["n"] == 84
    assert report["cost"]["unlearn"]["samples"] + report["cost"]["tuning"]["samples"] <= 2 * 4 * 36


@pytest.mark.parametrize("method", ["auto", "saliency", "finetune", "synaptic_dampening"])
def test_a_part_of_the_retain_data_is_enough(workplace: Workplace, method) -> None:
    own = {"budget": 0.9} if method == "auto" else {"alpha": 0.5} if method == "synaptic_dampening" else {"lr": 1e-3}
    report = report_of(workplace.unlearn(method, reference=False, retain_fraction=0.5, **own))
    assert report["settings"]["retain_fraction"] == 0.5
    assert report["models"]["unlearned"]["retain"]["n"] == 108
    if method in ("saliency", "finetune"):
        step = 54 + (12 if method == "saliency" else 0)
        assert report["cost"]["unlearn"]["backward"] == step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget should be above 0, but got 0"),
        ({"budget": -1}, "budget should be above 0"),
        ({"budget": 0.05}, "budget should allow at least one step"),
        ({"retain_fraction": 0}, r"retain_fraction should lie in (0, 1], but got 0"),
        ({"retain_fraction": 2}, r"retain_fraction should lie in (0, 1], but got 2"),
        ({"budgt": 0.2}, "Did you mean 'budget'?"),
    ],
)
def test_settings_that_can_not_work_are_refused(workplace: Workplace, settings, message) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it
        workplace.unlearn("auto", reference=False, **settings)
    assert message in messages(error.value)
    assert not (workplace.folder / "runs" / "auto").exists()
