"""The report for people: one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from monai_unlearn.report.plots import accuracy_plot, cost_plot, score_plot
from monai_unlearn.report.results import SPLITS, cost_sentence, interval, percent

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
    return environment.get_template("report.html.j2").render(
        report=report,
        models=models,
        splits=SPLITS,
        percent=percent,
        interval=interval,
        cost=cost_sentence(report["cost"]),
        findings=_findings(report),
        plots={
            "accuracy": accuracy_plot(models),
            "scores": score_plot(scores),
            "cost": cost_plot(report["cost"]),
        },
    )


def _findings(report: Mapping[str, Any]) -> list[str]:
    """What the figures say, in plain words and no more than they say."""
    models = report["models"]
    unlearned, retrained = models["unlearned"], models["retrained"]
    n, m = unlearned["forget"]["n"], unlearned["validation"]["n"]
    sentences = []
    auc = unlearned["attack"]["auc"]
    if unlearned["attack"]["low"] is None:
        sentences.append(
            f"With {n} images to be forgotten, nothing can be said about whether they can still be told from unseen "
            "ones."
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
        differences = [
            f"{name} is {_difference(unlearned['test'][figure], retrained['test'][figure])} the retrained model's"
            for figure, name in (("accuracy", "accuracy"), ("auroc", "AUROC"))
            if None not in (unlearned["test"][figure], retrained["test"][figure])
        ]
        if differences:
            sentences.append(f"On new images (the test set) the unlearned model's {', and its '.join(differences)}.")
    if report["gap_to_retrained"] is not None:
        sentences.append(
            f"Over forget, retain and test accuracy and this attack it is {report['gap_to_retrained']:.1f} percentage "
            "points away from the retrained model on average."
        )
    if retrained is None:
        told = "" if auc is None else f"The attack's AUC is {interval(unlearned['attack'])}. "
        sentences.append(
            told + "No model was retrained for comparison (reference false), so there is no yardstick: an attack near "
            "0.5 and a low forget accuracy alone prove nothing."
        )
    return sentences


def _difference(value: float, reference: float) -> str:
    change = 100 * (value - reference)
    if abs(change) < 0.05:
        return "the same as"
    return f"{abs(change):.1f} points {'higher' if change > 0 else 'lower'} than"
