"""Audits as the package makes them, with figures that could come from a real run."""

from __future__ import annotations

from typing import Any

import numpy as np

SPLITS = ("forget", "retain", "validation", "test")
MODELS = ("original", "unlearned", "retrained")
FINDINGS = ("Edema", "Fracture", "Nodule")
VARIANTS = (
    "classes",
    "findings",
    "no reference",
    "one retrained model",
    "retraining",
    "powerless",
    "one image",
    "one image, no reference",
    "no audit",
    "findings, no audit",
)
ATTACKS = {"original": 0.83, "unlearned": 0.52, "retrained": 0.50}


def _attack(auc: float, low_rates: bool) -> dict[str, float | None]:
    rates = {"tpr_at_1_percent": (auc - 0.47) / 4, "tpr_at_0.1_percent": None}
    return {
        "auc": auc,
        "low": max(auc - 0.05, 0.0),
        "high": min(auc + 0.05, 1.0),
        "balanced_accuracy": 0.5 + (auc - 0.5) * 0.7,
        **(rates if low_rates else dict.fromkeys(rates)),
    }


def _entry(reference: bool, shift: float = 0.0, low_rates: bool = True) -> dict[str, Any]:
    models = {name: _attack(auc + shift, low_rates) for name, auc in ATTACKS.items()}
    return {
        "models": models if reference else {**models, "retrained": None},
        "difference": {
            "against": "retrained" if reference else "0.5",
            "difference": 0.02,
            "low_90": -0.012,
            "high_90": 0.046,
            "low_95": -0.017,
            "high_95": 0.051,
            "p": 0.21,
            "detectable": 0.06,
            "answer": "equivalent",
        },
    }


def _difference(value: float, spread: float = 0.02) -> dict[str, float]:
    return {"difference": value, "low": value - spread, "high": value + spread}


def _utility(reference: bool, classes: tuple[str, ...], harm: float) -> dict[str, Any]:
    levels = {"original": 0.0, "unlearned": -harm, "retrained": 0.01}
    models: dict[str, Any] = {
        name: {"accuracy": 0.71 + d, "auroc": 0.86 + d, "sensitivity": 0.62 + d, "brier": 0.4 - d, "ece": 0.08 - d / 2}
        for name, d in levels.items()
    }
    changes: dict[str, Any] = {
        "original": {name: _difference(-harm) for name in models["original"]},
        "retrained": {name: _difference(-harm - 0.01) for name in models["original"]},
    }
    rows: dict[str, Any] = {}
    for i, name in enumerate(classes):
        figures: dict[str, Any] = {
            model: {"auroc": 0.85 + d, "sensitivity": 0.6 + d, "false_negatives": (40 + 17 * i) * (0.4 - d)}
            for model, d in levels.items()
        }
        rows[name] = {
            "positives": 40 + 17 * i,
            "models": figures if reference else {**figures, "retrained": None},
            "false_negatives": {
                "original": _difference(100 * harm + i, 3.2),
                "retrained": _difference(100 * harm + 1 + i, 3.4) if reference else None,
            },
        }
    if not reference:
        models["retrained"] = changes["retrained"] = None
    return {"models": models, "changes": changes, "classes": rows}


def _group(reference: bool, split: str, n: int, harm: float) -> dict[str, Any]:
    models: dict[str, Any] = {
        name: {"accuracy": 0.74 + d, "auroc": 0.87 + d, "sensitivity": 0.61 + d, "brier": 0.36, "ece": 0.07}
        for name, d in (("original", 0.0), ("unlearned", -harm), ("retrained", 0.005))
    }
    group = {
        "n": n,
        "patients": n // 4,
        "models": models if reference else {**models, "retrained": None},
        "change": {
            "original": _difference(-harm, 0.03),
            "retrained": _difference(-harm - 0.005, 0.03) if reference else None,
        },
    }
    if split == "forget":
        group["attack"] = {**ATTACKS, **({} if reference else {"retrained": None})}
    return group


def _subgroups(reference: bool, harms: dict[str, float]) -> dict[str, Any]:
    names = list(harms)
    largest = {
        "groups": [names[0], names[-1]],
        "against": "retrained" if reference else "original",
        "difference": 0.031,
        "low": 0.004,
        "high": 0.058,
        "p": 0.013,
        "p_holm": 0.052,
    }
    return {
        "groups": {
            name: {split: _group(reference, split, 12 * (i + 3), harm) for split in SPLITS}
            for i, (name, harm) in enumerate(harms.items())
        },
        "largest": {"forget": None, "retain": largest, "validation": largest, "test": largest},
    }


def _floored(original: float, unlearned: float, floor: float | None) -> dict[str, float | None]:
    return {"original": original, "unlearned": unlearned, "floor": floor}


def _distance(retrained: int, several: bool) -> dict[str, Any]:
    floor = retrained > 1
    splits = {
        split: {
            "js_divergence": _floored(0.11 - i / 50, 0.06 - i / 100, 0.021 if floor else None),
            "activation_distance": _floored(0.4 - i / 20, 0.2 - i / 50, 0.11 if floor else None),
            "agreement": _floored(0.71 + i / 50, 0.83 + i / 50, 0.91 if floor else None),
        }
        for i, split in enumerate(SPLITS)
    }
    klom = {**dict.fromkeys(SPLITS, 1.4), "floor": dict.fromkeys(SPLITS, 0.3)}
    return {
        "splits": splits,
        "average_gap": _floored(16.5, 3.75, 1.2 if floor else None),
        "excess": 2.55 if floor else None,
        "power": True if floor else None,
        "tug_of_war": _floored(0.68, 0.91, 0.98 if floor else None),
        "retention_deviation": _floored(0.42, 0.17, 0.03 if floor else None),
        "indiscernibility": {"original": 0.34, "unlearned": 0.96, "retrained": 0.99},
        "harm": {"retain": 2.0, "test": 7.0},
        "klom": klom if several else None,
        "epsilon": {"mean": 1.3, "quality": 0.21, "score": 0.19} if several else None,
        "relearn": {
            "budget": 50,
            "original_loss": 0.03,
            "steps": {"unlearned": 12, "retrained": None, "second_retrained": 31},
        },
    }


def _curves(reference: bool) -> dict[str, Any]:
    fpr = np.concatenate([[0.0], np.geomspace(1 / 52, 1, 60)])
    powers = {"original": 0.22, "unlearned": 0.92, "retrained": 1.0}
    curves: dict[str, Any] = {
        name: {"fpr": fpr.tolist(), "tpr": (fpr**power).tolist()} for name, power in powers.items()
    }
    return curves if reference else {**curves, "retrained": None}


def _histogram(reference: bool) -> dict[str, Any]:
    edges = np.linspace(-6, 12, 31)
    middles = (edges[1:] + edges[:-1]) / 2

    def shares(centre: float, width: float) -> list[float]:
        heights = np.exp(-(((middles - centre) / width) ** 2))
        return (heights / heights.sum()).tolist()

    centres = {"original": 7.5, "unlearned": 2.4, "retrained": 2.1}
    models: dict[str, Any] = {
        name: {"forget": shares(centre, 3.4), "unseen": shares(2.0, 3.6)} for name, centre in centres.items()
    }
    return {"edges": edges.tolist(), "models": models if reference else {**models, "retrained": None}}


def sample_audit(
    reference: bool = True,
    retrained: int = 2,
    classes: tuple[str, ...] = ("normal", "pneumonia"),
    several: bool = False,
    patients: bool = True,
) -> dict[str, Any]:
    """An audit of a run that over-fits a little.

    Args:
        reference: whether there is a retrained model.
        retrained: how many there are.
        classes: names of classes or findings.
        several: whether several models were unlearned, and shadow models trained.
        patients: whether the data has patients.
    """
    entry = _entry(reference)
    confidence = np.linspace(0.35, 0.97, 10)
    bins = {
        name: {"confidence": confidence.tolist(), "accuracy": (confidence - shift).tolist(), "n": [25] * 9 + [None]}
        for name, shift in (("original", 0.12), ("unlearned", 0.04), ("retrained", 0.08))
    }
    curve = [
        {
            "fraction": fraction,
            "images": int(300 * fraction),
            "method": method,
            "test_change": _difference(-0.3 * fraction, 0.02) if reference else None,
            "gap": 30 * fraction if reference else None,
            "attack": 0.5 - 0.2 * fraction,
            "this": fraction == 0.1 and method == "saliency",
        }
        for fraction in (0.02, 0.05, 0.1, 0.2)
        for method in ("random_labeling", "saliency")
    ]
    return {
        "options": {
            "resamples": 1000,
            "margin": 0.05,
            "specificity": 0.9,
            "seed": 0,
            "unlearned_models": 3 if several else 1,
            "retrained_models": retrained if reference else 0,
        },
        "verdict": {
            "answer": "equivalent",
            "direction": None,
            "reason": "Every attack's AUC lies within ±0.05 of that of the yardstick (90 % intervals).",
            "detectable": 0.06,
        },
        "attacks": {
            "matched_by": ["class", "sex"],
            "forget": {"images": 31, "patients": 7 if patients else None, "without_match": 0},
            "unseen": {"images": 52, "patients": 13 if patients else None, "effective": 44.2},
            "population": {
                "log_odds": entry,
                "modified_entropy": _entry(reference, -0.02),
                "loss": _entry(reference, -0.01),
                "classifier": _entry(reference, 0.01),
            },
            "patient": _entry(reference, 0.03, low_rates=False) if patients else None,
            "ratio": {**_entry(reference, 0.02), "references": retrained - 1} if reference and retrained > 1 else None,
            "u_lira": {**_entry(reference, 0.04), "shadow_models": 16} if several else None,
            "sanity": {
                "original": {
                    "auc": 0.83,
                    "low": 0.78,
                    "high": 0.88,
                    "against": "retrained" if reference else "0.5",
                    "difference": 0.33,
                    "detected": True,
                },
                "halves": {"auc": 0.49, "low": 0.43, "high": 0.55, "as_expected": True},
                "memorisation": 0.27,
            },
            "roc": _curves(reference),
            "histogram": _histogram(reference),
        },
        "distance": _distance(retrained, several) if reference else None,
        "utility": {
            split: _utility(reference, classes, harm)
            for split, harm in (("retain", 0.01), ("validation", 0.02), ("test", 0.06))
        },
        "reliability": {"test": bins if reference else {**bins, "retrained": None}},
        "subgroups": {
            "sex": _subgroups(reference, {"F": 0.05, "M": 0.08}),
            "age band": _subgroups(reference, {"0–19": 0.02, "20–39": 0.03, "40–59": 0.06, "60–79": 0.07, "80+": 0.04}),
        },
        "forget_size": curve,
        "evaluation_seconds": 12.3,
    }


def tiny_audit(reference: bool = True) -> dict[str, Any]:
    """The audit of a single image to be forgotten: next to nothing is defined."""
    audit = sample_audit(reference, retrained=1, patients=False)
    nothing = dict.fromkeys(("auc", "low", "high", "balanced_accuracy", "tpr_at_1_percent", "tpr_at_0.1_percent"))
    unknown = dict.fromkeys(("difference", "low_90", "high_90", "low_95", "high_95", "answer"))
    for entry in audit["attacks"]["population"].values():
        entry["models"] = {name: model and dict(nothing) for name, model in entry["models"].items()}
        entry["difference"] = unknown
    audit["attacks"]["forget"] = {"images": 1, "patients": None, "without_match": 1}
    audit["attacks"]["sanity"] = {
        "original": {**dict.fromkeys(("auc", "low", "high", "detected"))},
        "halves": {**dict.fromkeys(("auc", "low", "high", "as_expected"))},
        "memorisation": None,
    }
    audit["attacks"]["roc"] = dict.fromkeys(MODELS)
    audit["verdict"] = {
        "answer": "powerless",
        "direction": None,
        "reason": "With fewer than two independent images on one side no attack has an interval.",
        "detectable": None,
    }
    audit["subgroups"] = {"sex": {"groups": {}, "largest": {"test": None}}}
    audit["forget_size"] = None
    return audit


def powerless_audit() -> dict[str, Any]:
    """The audit of an original that does not memorise, so that the attack sees nothing anywhere."""
    audit = sample_audit()
    audit["attacks"]["sanity"]["original"] |= {"auc": 0.52, "low": 0.45, "high": 0.58, "detected": False}
    audit["verdict"] = {
        "answer": "powerless",
        "direction": None,
        "reason": "These attacks can't tell even the original model from the retrained model.",
        "detectable": 0.14,
    }
    audit["distance"]["power"] = False
    return audit
