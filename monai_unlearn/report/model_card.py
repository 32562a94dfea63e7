"""A section to paste into the unlearned model's card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from monai_unlearn.report.numbers import DASH, change, count, counted, interval, number, percent
from monai_unlearn.report.results import MAIN_FIGURE, SPLITS, cost_sentence
from monai_unlearn.report.summary import SAME_METHOD, held_against, largest_missed
from monai_unlearn.report.verdict import headline, limit, meaning

__all__ = ["model_card"]


def model_card(report: Mapping[str, Any]) -> str:
    """The run in Markdown: what was unlearned, what the tests say and can't say, whom it hurt and what it cost.

    Args:
        report: as ``build_report`` returns it.

    Returns:
        Markdown that begins with a heading of the second level.
    """
    audit = report["audit"]
    sections = [["## Unlearning", "", *_origin(report)]]
    if audit is not None:
        sections.append(["### What the tests say", "", *_verdict(report)])
    sections.append(["### Figures", "", *_figures(report)])
    if audit is not None:
        sections.append(["### Whom it hurt", "", *_harm(report)])
    sections.append(["### Cost", "", f"{cost_sentence(report['cost']).removeprefix('Cost: ')}."])
    sections.append(["### Limits", "", *_limits(report)])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _origin(report: Mapping[str, Any]) -> list[str]:
    models, request = report["models"], report["request"] or {}
    n, retain = (models["original"][split]["n"] for split in ("forget", "retain"))
    who = f"{count(n)} of {count(n + retain)} training images"
    if request.get("patients") is not None:
        who += f", of {counted(request['patients'], 'patient')}"
    lines = [
        f"- Method: {_text(report['method'].replace('_', ' '))}",
        f"- Data: {_text(report['provenance']['data']['name'])}",
        f"- To be forgotten: {who}",
    ]
    if (reference := request.get("reference")) is not None:
        lines.append(f"- Request: {_text(reference)}")
    hashes = report["provenance"]["hashes"]
    lines += [
        f"- SHA-256 of the {name} model: `{_text(hashes[name])}`"
        for name in ("original", "unlearned")
        if hashes.get(name)
    ]
    if report["method"] == "retrain" and models["retrained"] is not None:
        lines.append(f"- {SAME_METHOD}")
    return lines


def _verdict(report: Mapping[str, Any]) -> list[str]:
    distance = report["audit"]["distance"]
    sentences = [_text(report["audit"]["verdict"]["reason"]), meaning(report)]
    lines = [f"**{headline(report)}** ({limit(report)}).", *(sentence for sentence in sentences if sentence)]
    if distance is not None and distance["average_gap"]["unlearned"] is not None:
        gap = distance["average_gap"]
        floor = "not measured" if gap["floor"] is None else f"{gap['floor']:.1f}"
        lines.append(
            f"Average gap to the retrained model: {gap['unlearned']:.1f} percentage points; noise floor: {floor}."
        )
    return lines


def _figures(report: Mapping[str, Any]) -> list[str]:
    figure = MAIN_FIGURE[report["task"]]
    name = "mean AUROC" if figure == "auroc" else "accuracy"
    models = {name: model for name, model in report["models"].items() if model is not None}
    return _table(
        (f"{name} in %", *SPLITS, "attack AUC (95 % interval)"),
        [
            (model, *(percent(figures[split][figure]) for split in SPLITS), interval(figures["attack"]))
            for model, figures in models.items()
        ],
    )


def _harm(report: Mapping[str, Any]) -> list[str]:
    audit = report["audit"]
    lines = []
    utility = audit["utility"].get("test")
    against = held_against(report)
    if utility is not None:
        changes = utility["changes"][against] or {}
        names = {"accuracy": "accuracy", "auroc": "AUROC", "sensitivity": "sensitivity", "ece": "calibration error"}
        told = [f"{name} {change(changes.get(figure))}" for figure, name in names.items() if changes.get(figure)]
        if told:
            lines.append(f"- On new images against the {against} model, in points (95 % interval): {'; '.join(told)}")
    if (missed := largest_missed(report)) is not None:
        lines.append(
            f"- Largest rise of false negatives: {_text(missed[0])}, {change(missed[2], scale=1)} points against the "
            f"{missed[1]} model"
        )
    for column, section in audit["subgroups"].items():
        if (found := section["largest"].get("test")) is not None:
            first, second = map(_text, found["groups"])
            lines.append(
                f"- Largest difference by {_text(column)}: {first} against {second}, {change(found)} points, "
                f"p = {number(found['p_holm'], 3)} (Holm)"
            )
    return lines or ["Not measured."]


def _limits(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Evidence, not proof: these tests, on one split, of one run. A stronger attack may see what they do not.",
        "- An unlearned model is a new model and needs the validation that the original needed.",
    ]
    if report["models"]["retrained"] is None:
        lines.append("- No model was retrained for comparison.")
    if report["left"]:
        lines.append(f"- Data or weights from before were still in {counted(len(report['left']), 'place')}.")
    return lines + [f"- {_text(note)}" for note in report["notes"]]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(_text(cell) or DASH for cell in row)} |" for row in rows),
    ]


def _text(value: str) -> str:
    """Text in which nothing is Markdown or HTML, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
