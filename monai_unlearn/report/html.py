"""The report for people: one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from monai_unlearn.report.plots import accuracy_plot, cost_plot, finding_plot, score_plot
from monai_unlearn.report.results import SPLITS, cost_sentence, interval, percent, request_warning

__all__ = ["render_html"]


def render_html(report: Mapping[str, Any], scores: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Render the page.

    Args:
        report: as ``build_report`` returns it.
        scores: model → ``forget`` and ``validation`` → scores of the images, for their distributions.
    """
    environment = Environment(
        loader=PackageLoader("monai_unlearn.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    models = {name: model for name, model in report["models"].items() if model is not None}
    task = report["task"]
    compared = scores["unlearned"]
    plots = {
        "accuracy": accuracy_plot(models, task),
        "scores": score_plot(scores, task),
        "cost": cost_plot(report["cost"]),
    }
    if task == "multi-label":
        plots["findings"] = finding_plot(models)
    return environment.get_template("report.html.j2").render(
        report=report,
        models=models,
        splits=SPLITS,
        percent=percent,
        interval=interval,
        cost=cost_sentence(report["cost"]),
        findings=_findings(report, {part: int((~np.isnan(values)).sum()) for part, values in compared.items()}),
        multi_label=task == "multi-label",
        request=_request(report["request"]),
        plots=plots,
    )


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
        rows["equal images among the training images, forgotten too"] = duplicates["training"]
        rows["equal images left out of the evaluation"] = duplicates["evaluation"]
    elif "duplicates" in request:
        rows["equal images under another name"] = "not looked for"
    if (overlap := request.get("overlap")) is not None:
        what = {"keep": "kept in the evaluation", "drop": "left out of the evaluation"}.get(overlap["option"], "")
        rows["validation and test images of the same patients"] = (
            f"{overlap['images']} (patients: {overlap['patients']}), {what}" if overlap["images"] else 0
        )
    return {name: value for name, value in rows.items() if value is not None}


def _findings(report: Mapping[str, Any], compared: Mapping[str, int]) -> list[str]:
    """What the figures say, in plain words and no more than they say."""
    models = report["models"]
    unlearned, retrained = models["unlearned"], models["retrained"]
    n, m = compared["forget"], compared["validation"]
    multi_label = report["task"] == "multi-label"
    figure = "mean AUROC" if multi_label else "accuracy"
    sentences = []
    auc = unlearned["attack"]["auc"]
    if unlearned["attack"]["low"] is None:
        sentences.append(
            f"With {n} images to be forgotten{' of which a finding is known' if multi_label else ''}, nothing can be "
            "said about whether they can still be told from unseen ones."
        )
    elif retrained is not None and auc is not None:
        low, high = retrained["attack"]["low"], retrained["attack"]["high"]
        told = (
            f"An attacker who guesses from the model's scores which of two images was to be forgotten is right in "
            f"{100 * auc:.0f} % of pairs ({100 * unlearned['attack']['low']:.0f} to "
            f"{100 * unlearned['attack']['high']:.0f} %); for a model that never saw these images it is "
            f"{100 * retrained['attack']['auc']:.0f} %."
        )
        if auc < low:
            told += (
                " The forgotten images score worse than they would had the model never seen them: that gives them away "
                "as much as scoring better would."
            )
        elif auc > high:
            told += " Part of what was learned from these images can still be seen."
        else:
            told += (
                f" This attack, on {n} forgotten and {m} unseen images, does not tell the two models apart. A stronger "
                "attack or more images may."
            )
        sentences.append(told)
    if retrained is not None:
        compare = {"auroc": figure} if multi_label else {"accuracy": figure, "auroc": "AUROC"}
        differences = [
            f"{name} is {_difference(unlearned['test'][key], retrained['test'][key])} the retrained model's"
            for key, name in compare.items()
            if None not in (unlearned["test"][key], retrained["test"][key])
        ]
        if differences:
            sentences.append(f"On new images (the test set) the unlearned model's {', and its '.join(differences)}.")
        if multi_label:
            sentences.extend(_largest_change(unlearned["test"], retrained["test"]))
    if report["gap_to_retrained"] is not None:
        sentences.append(
            f"Over forget, retain and test {figure} and this attack it is {report['gap_to_retrained']:.1f} percentage "
            "points away from the retrained model on average."
        )
    if retrained is None:
        told = "" if auc is None else f"The attack's AUC is {interval(unlearned['attack'])}. "
        sentences.append(
            told + "No model was retrained for comparison (reference false), so there is no yardstick: an attack near "
            f"0.5 and a low forget {figure} alone prove nothing."
        )
    if (warning := request_warning(report["request"])) is not None:
        sentences.append(warning)
    return [*sentences, *report["notes"]]


def _largest_change(unlearned: Mapping[str, Any], retrained: Mapping[str, Any]) -> list[str]:
    """The finding whose AUROC on new images is furthest from the retrained model's."""
    pairs = {
        name: (auroc, retrained["auroc_per_finding"][name]) for name, auroc in unlearned["auroc_per_finding"].items()
    }
    pairs = {name: pair for name, pair in pairs.items() if None not in pair}
    if len(pairs) < 2:
        return []
    name, (auroc, reference) = max(pairs.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    return [
        f"Of the single findings {name} differs most: its AUROC is {_difference(auroc, reference)} the retrained "
        "model's."
    ]


def _difference(value: float, reference: float) -> str:
    change = 100 * (value - reference)
    if abs(change) < 0.05:
        return "the same as"
    return f"{abs(change):.1f} points {'higher' if change > 0 else 'lower'} than"
