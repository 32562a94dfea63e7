"""Figures of a run, as the workflow puts them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import FINDINGS, powerless_audit, sample_audit, tiny_audit

from monai_unlearn.cost import Cost
from monai_unlearn.report import audit_plots, build_report, html

SPLITS = ("forget", "retain", "validation", "test")


def _model(forget: float, retain: float, validation: float, test: float, auc: float) -> dict[str, dict]:
    figures = dict(zip(SPLITS, (forget, retain, validation, test)))
    sizes = dict(zip(SPLITS, (31, 269, 52, 83)))
    model: dict[str, dict] = {
        name: {"accuracy": value, "auroc": 0.5 + value / 2, "loss": 1 - value, "n": sizes[name]}
        for name, value in figures.items()
    }
    return model | {"attack": {"auc": auc, "low": auc - 0.06, "high": auc + 0.06}}


@pytest.fixture
def figures() -> dict[str, dict]:
    """Original, unlearned and retrained model."""
    return {
        "original": _model(0.99, 0.98, 0.72, 0.71, 0.83),
        "unlearned": _model(0.74, 0.97, 0.70, 0.65, 0.52),
        "retrained": _model(0.70, 0.99, 0.73, 0.72, 0.50),
    }


@pytest.fixture
def finding_figures(figures: dict[str, dict]) -> dict[str, dict]:
    """The same of a multi-label task, whose forget set has no fracture and whose test set has nothing but nodules."""
    for model in figures.values():
        for split in SPLITS:
            auroc = model[split]["auroc"]
            model[split]["auroc_per_finding"] = {"Edema": auroc - 0.01, "Fracture": auroc, "Nodule": auroc + 0.004}
        model["forget"]["auroc_per_finding"]["Fracture"] = float("nan")
        model["test"]["auroc_per_finding"]["Nodule"] = None
    figures["unlearned"]["test"]["auroc_per_finding"]["Fracture"] -= 0.1
    return figures


@pytest.fixture
def request_figures() -> dict[str, Any]:
    """What a split says of its request; everything in it is a reason to warn."""
    return {
        "reference": "2024-017",
        "images": 31,
        "unit": "patient",
        "matched": 29,
        "patients": 7,
        "partly_forgotten": 2,
        "entries": 9,
        "unmatched": 1,
        "duplicates": {"training": 4, "evaluation": 6},
        "allow_partial": True,
        "overlap": {"option": "keep", "patients": 5, "images": 8},
    }


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with an empty drawing in the place of each plot: for tests of words, of which there are many."""
    for module, names in (
        (html, ("accuracy_plot", "cost_plot", "finding_plot")),
        (audit_plots, [name for name in audit_plots.__all__ if name.endswith("_plot")]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_: '<svg viewBox="0 0 1 1" aria-hidden="true"></svg>')


@pytest.fixture
def left() -> list[dict[str, Any]]:
    """What is left of the forget set, of ours and of others."""
    mask = {
        "what": "saliency mask",
        "path": "runs/saliency/private",
        "ours": True,
        "holds": "a function of the forget set",
    }
    original = {"what": "original model", "path": "model.pt", "ours": False, "holds": "weights from before"}
    return [mask, original]


@pytest.fixture
def make_report(figures: dict[str, dict]) -> Callable[..., dict[str, Any]]:
    """The report of these figures; ``reference=False`` without the retrained model."""

    def make(reference: bool = True, **changes: Any) -> dict[str, Any]:
        cost = {"mask": Cost(1.25, 31, 31, 31), "tuning": Cost(), "unlearn": Cost(10.5, 3000, 3031, 3000)}
        models = dict(figures)
        if reference:
            cost["retrain"] = Cost(61.4, 26900, 26900, 26900)
        else:
            del models["retrained"]
        arguments = {
            "method": "random_labeling",
            "settings": {"lr": 0.013, "epochs": 10, "forget_indices": None, "reference": reference},
            "models": models,
            "cost": cost,
            "provenance": {
                "original_checkpoint": "runs/models/x/model.pt",
                "data": {"name": "synthetic cells", "sha256": "ab" * 32},
                "versions": {"python": "3.11", "torch": "2.13"},
                "machine": {"device": "a processor", "cores": 2},
                "retrained_on": {"device": "another processor"} if reference else None,
                "seeds": {"split": 0},
                "hashes": {"original": "cd" * 32, "retrained": "ef" * 32 if reference else None},
            },
        }
        return build_report(**{**arguments, **changes})

    return make


@pytest.fixture
def make_variant(
    request: pytest.FixtureRequest,
    make_report: Callable[..., dict[str, Any]],
    request_figures: dict[str, Any],
    left: list[dict[str, Any]],
) -> Callable[[str], dict[str, Any]]:
    """Reports of unlike runs, by the names in ``audit_samples.VARIANTS``."""

    def make(name: str) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "classes": {"audit": sample_audit(several=True), "left": left, "request": request_figures},
            "findings": {"audit": sample_audit(classes=FINDINGS), "measured_together": True},
            "no reference": {"audit": sample_audit(reference=False), "reference": False, "left": left},
            "one retrained model": {"audit": sample_audit(retrained=1), "measured_together": False},
            "retraining": {"audit": sample_audit(), "method": "retrain"},
            "powerless": {"audit": powerless_audit()},
            "one image": {"audit": tiny_audit()},
            "one image, no reference": {"audit": tiny_audit(reference=False), "reference": False},
            "no audit": {},
            "findings, no audit": {"reference": False},
        }[name]
        if "findings" in name:
            request.getfixturevalue("finding_figures")
            arguments["task"] = "multi-label"
        return make_report(**arguments)

    return make
