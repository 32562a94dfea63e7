"""The report for people: one self-contained page, made from report.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from monai_unlearn.report import audit_plots as drawn
from monai_unlearn.report import numbers
from monai_unlearn.report.model_card import model_card
from monai_unlearn.report.plots import accuracy_plot, cost_plot, finding_plot
from monai_unlearn.report.results import SPLITS
from monai_unlearn.report.summary import findings
from monai_unlearn.report.verdict import headline, limit, meaning

__all__ = ["environment", "render_html"]

POPULATION = {
    "log_odds": "log-odds of the truth",
    "modified_entropy": "modified entropy",
    "loss": "loss",
    "classifier": "fitted classifier",
}
FALSE_POSITIVES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
MOST_GROUPS = 30  # that a plot shows
WHO = ("forget_request", "forget_indices", "forget_patients")


def render_html(report: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        report: as ``build_report`` returns it, or ``read_report`` reads it.

    Returns:
        HTML without scripts, which loads nothing.
    """
    models = {name: model for name, model in report["models"].items() if model is not None}
    audit = report["audit"]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            models=models,
            audit=audit,
            attacks=None if audit is None else _attacks(audit["attacks"]),
            rates=None if audit is None else _rates(audit["attacks"]["roc"]),
            against="retrained" if "retrained" in models else "original",
            sections=_sections(report),
            splits=SPLITS,
            findings=findings(report),
            verdict=None if audit is None else (headline(report), limit(report), meaning(report)),
            multi_label=report["task"] == "multi-label",
            figure="mean AUROC" if report["task"] == "multi-label" else "accuracy",
            request=_request(report["request"]),
            settings=_applied(report["settings"]),
            card=model_card(report),
            plots=_plots(report, models),
        )
    )


@cache
def environment() -> Environment:
    """Where the pages' templates come from."""
    templates = Environment(
        loader=PackageLoader("monai_unlearn.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    templates.globals.update({name: getattr(numbers, name) for name in numbers.__all__})
    return templates


def _sections(report: Mapping[str, Any]) -> dict[str, str]:
    """Template → heading of each section that this report has something for."""
    audit = report["audit"]
    sections = {
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
    empty = {
        "distance": audit is None or audit["distance"] is None,
        "harm": audit is None and report["task"] == "multi-class",
        "left": audit is None and not report["left"],
        "request": not report["request"],
    }
    return {name: heading for name, heading in sections.items() if not empty.get(name)}


def _plots(report: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    audit, task = report["audit"], report["task"]
    distance = None if audit is None else audit["distance"]
    plots: dict[str, Any] = {
        "accuracy": accuracy_plot(models, task, None if distance is None else distance["average_gap"]["floor"]),
        "cost": cost_plot(report["cost"]),
        "groups": {},
    }
    if task == "multi-label":
        plots["findings"] = finding_plot(models)
    if audit is None:
        return plots
    attacks = audit["attacks"]
    rows = {name: entry["models"] for name, entry in _attacks(attacks).items()}
    if any(attack and attack["auc"] is not None for row in rows.values() for attack in row.values()):
        plots["attacks"] = drawn.attack_plot(rows)
    if attacks["histogram"] is not None:
        plots["scores"] = drawn.score_plot(attacks["histogram"], task)
    if any((attacks["roc"] or {}).values()):
        plots["roc"] = drawn.roc_plot(attacks["roc"])
    if distance is not None:
        plots["distance"] = drawn.distance_plot(distance)
    if (reliability := audit["reliability"].get("test")) is not None:
        plots["reliability"] = drawn.reliability_plot(reliability, task)
    if any(row["test_change"] is not None or row["gap"] is not None for row in audit["forget_size"] or ()):
        plots["curve"] = drawn.curve_plot(audit["forget_size"], "mean AUROC" if task == "multi-label" else "accuracy")
    against = "retrained" if "retrained" in models else "original"
    for i, (column, section) in enumerate(audit["subgroups"].items()):
        shown = _shown_groups(section["groups"], against)
        if shown:
            plots["groups"][column] = drawn.group_plot(f"group{i}", shown, against)
    return plots


def _shown_groups(groups: Mapping[str, Any], against: str) -> dict[str, Any]:
    """The groups that a plot shows: those whose change is known, and of very many the most changed ones."""

    def largest(parts: Mapping[str, Any]) -> float:
        changes = [(parts.get(split) or {}).get("change", {}).get(against) or {} for split in ("forget", "test")]
        return max((abs(c["difference"]) for c in changes if c.get("difference") is not None), default=-1.0)

    known = [name for name, parts in groups.items() if largest(parts) >= 0]
    kept = sorted(known, key=lambda name: -largest(groups[name]))[:MOST_GROUPS]
    return {name: groups[name] for name in known if name in kept}


def _attacks(attacks: Mapping[str, Any]) -> dict[str, Any]:
    """The attacks that were made, by the names that the page gives them."""
    named = {name: attacks["population"][key] for key, name in POPULATION.items()}
    named["by patient"] = attacks["patient"]
    for key, name, number in (("ratio", "ratio attack", "references"), ("u_lira", "U-LiRA", "shadow_models")):
        if (entry := attacks[key]) is not None:
            others = number.replace("_", " ") if entry[number] != 1 else number.replace("_", " ").removesuffix("s")
            named[f"{name} ({entry[number]} {others})"] = entry
    return {name: entry for name, entry in named.items() if entry is not None}


def _rates(curves: Mapping[str, Any] | None) -> dict[float, dict[str, float | None]] | None:
    """True positive rates of each model at a few false positive rates, read off its curve."""
    if curves is None:
        return None
    rows: dict[float, dict[str, float | None]] = {}
    for limit_ in FALSE_POSITIVES:
        rows[limit_] = {}
        for name, curve in curves.items():
            if curve is None:
                continue
            points = [(f, t) for f, t in zip(curve["fpr"], curve["tpr"]) if None not in (f, t)]
            # Below the smallest rate that this number of unseen images can show there is nothing to read.
            seen = any(0 < f <= limit_ + 1e-9 for f, _ in points)
            rows[limit_][name] = max(t for f, t in points if f <= limit_ + 1e-9) if seen else None
    return rows


def _applied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that had an effect: none that was left open, and no share to be drawn where a file says who."""
    named = any(settings.get(name) is not None for name in WHO)
    return {
        name: value
        for name, value in settings.items()
        if value is not None and not (named and name == "forget_fraction")
    }


def _request(request: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rows of the request's table: what is known of it, in the reader's words."""
    if request is None:
        return {}
    rows = {
        "reference": request.get("reference"),
        "what an entry means": request.get("unit"),
        "entries": request.get("entries"),
        "entries that matched nothing": request.get("unmatched"),
        "may be met in part": "yes" if request.get("allow_partial") else "no",
        "images to be forgotten": request.get("images"),
        "patients with such images": request.get("patients"),
        "of these, patients who keep other images": request.get("partly_forgotten"),
    }
    if (duplicates := request.get("duplicates")) is not None:
        rows["equal images among the training images, taken along"] = duplicates["training"]
        rows["equal images left out of the evaluation"] = duplicates["evaluation"]
    elif "duplicates" in request:
        rows["equal images under another name"] = "not looked for"
    if (overlap := request.get("overlap")) is not None:
        what = {"keep": "kept in the evaluation", "drop": "left out of the evaluation"}.get(overlap["option"], "")
        rows["validation and test images of the same patients"] = (
            f"{overlap['images']} (patients: {overlap['patients']}), {what}" if overlap["images"] else 0
        )
    return {name: value for name, value in rows.items() if value is not None}
