"""What the figures say, in plain words and no more than they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monai_unlearn.report.numbers import change, counted, interval, number, signed
from monai_unlearn.report.results import MAIN_FIGURE, UNLEARNING, cost_sentence, request_warning

__all__ = ["SAME_METHOD", "findings", "held_against", "largest_missed"]

LEVEL = 0.05  # below this a corrected p-value is taken for more than chance
SAME_METHOD = (
    "The method of this run is retraining itself. The retrained model that it is compared with differs only in its "
    "seed, so what lies between the two is the noise of training."
)
NO_YARDSTICK = (
    "There is no retrained model to compare with, so there is no yardstick: an attack near 0.5 and a low forget "
    "{figure} alone prove nothing."
)
GUESSING = (
    "There is no retrained model to compare with. The attacks are held against guessing, which is right only where "
    "unseen images are of one kind with those to be forgotten, and nothing tells how high the forget {figure} "
    "should be."
)


def findings(report: Mapping[str, Any]) -> list[str]:
    """The summary's sentences below the verdict, most important first."""
    audit = report["audit"]
    parts = [_before_audit(report)] if audit is None else [_attack(report), _distance(report)]
    parts += [_new_images(report), _kept(report)]
    if audit is not None:
        parts += [_missed(report), _subgroups(report)]
    parts.append(_general(report))
    return [sentence for part in parts for sentence in part]


def held_against(report: Mapping[str, Any]) -> str:
    """The model that the unlearned one is held against: ``"retrained"``, or ``"original"`` where there is none."""
    return "original" if report["models"]["retrained"] is None else "retrained"


def largest_missed(report: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]] | None:
    """The class or finding of the test set whose share of missed positives rose most.

    Returns:
        Its name, the model that it is compared with, and the difference in percentage points; None where none is known.
    """
    utility = report["audit"]["utility"].get("test")
    if utility is None:
        return None
    for against in ("retrained", "original"):
        known = [
            (name, against, difference)
            for name, figures in utility["classes"].items()
            if (difference := figures["false_negatives"][against]) and difference["difference"] is not None
        ]
        if known:
            return max(known, key=lambda row: row[2]["difference"])
    return None


def _before_audit(report: Mapping[str, Any]) -> Iterator[str]:
    """What the one attack of a report without an audit says."""
    models = report["models"]
    attack, retrained = models["unlearned"]["attack"], models["retrained"]
    n, m = models["unlearned"]["forget"]["n"], models["unlearned"]["validation"]["n"]
    if attack["auc"] is None or attack["low"] is None or attack["high"] is None:
        yield (
            f"With {counted(n, 'image')} to be forgotten nothing can be said about whether they can still be told from "
            "unseen ones."
        )
        return
    if retrained is None:
        yield f"The attack's AUC is {interval(attack)}."
        return
    reference = retrained["attack"]
    if None in reference.values():
        yield f"{_pairs(attack)}."
        return
    yield f"{_pairs(attack)}; for a model that never saw these images it is {100 * reference['auc']:.0f} %."
    if attack["auc"] < reference["low"]:
        yield (
            "Over-forgetting: the images to be forgotten score worse than they would had the model never seen them. "
            "That gives them away as much as scoring better would."
        )
    elif attack["auc"] > reference["high"]:
        yield "Part of what was learned from these images can still be seen."
    else:
        yield (
            f"This attack, on {counted(n, 'image')} to be forgotten and {m} unseen ones, does not tell the two models "
            "apart. A stronger attack or more images may."
        )


def _attack(report: Mapping[str, Any]) -> Iterator[str]:
    attacks = report["audit"]["attacks"]
    entry = attacks["population"]["log_odds"]
    models = {} if entry is None else entry["models"]
    attack, retrained, original = (models.get(name) for name in ("unlearned", "retrained", "original"))
    if attack is not None and None not in (attack["auc"], attack["low"], attack["high"]):
        sentence = _pairs(attack)
        if retrained is not None and retrained["auc"] is not None:
            sentence += f"; for a model that never saw these images it is {100 * retrained['auc']:.0f} %"
        if original is not None and original["auc"] is not None:
            sentence += f". Before unlearning it was {100 * original['auc']:.0f} %"
        yield f"{sentence}."
    sanity = attacks["sanity"]
    detected = None if sanity["original"]["low"] is None else sanity["original"]["detected"]
    if detected is False:
        yield (
            "The attack does not even find these images in the original model, which was trained on them: it is too "
            "weak here to show anything about the unlearned one."
        )
    elif detected:
        yield "The same attack does find these images in the original model, so it can see membership here."
    if sanity["halves"]["as_expected"] is False:
        yield (
            f"Between two halves of the unseen images the attack's AUC is {interval(sanity['halves'])}, where 0.5 is "
            "right: something besides membership moves the scores. Read its other figures with doubt."
        )
    if attacks["forget"]["without_match"]:
        yield (
            f"Left out of the attacks: {counted(attacks['forget']['without_match'], 'image')} to be forgotten without "
            "an unseen image of the same kind."
        )


def _pairs(attack: Mapping[str, Any]) -> str:
    return (
        "An attacker who guesses from the model's scores which of two images was to be forgotten is right in "
        f"{100 * attack['auc']:.0f} % of pairs ({100 * attack['low']:.0f} to {100 * attack['high']:.0f} %)"
    )


def _distance(report: Mapping[str, Any]) -> Iterator[str]:
    distance = report["audit"]["distance"]
    if distance is None:
        return
    gap = distance["average_gap"]
    if gap["unlearned"] is not None:
        figure = "mean AUROC" if report["task"] == "multi-label" else "accuracy"
        sentence = (
            f"Over forget, retain and test {figure} and this attack the unlearned model is {gap['unlearned']:.1f} "
            "percentage points away from the retrained model on average"
        )
        if gap["floor"] is None:
            yield (
                f"{sentence}. How far two retrained models are from each other was not measured, so part of that may "
                "be the noise of training."
            )
        else:
            yield f"{sentence}; two retrained models are {gap['floor']:.1f} points apart (the noise floor)."
    if distance["power"] is False:
        yield (
            "The original model itself is less than three noise floors away from the retrained one: this forget set "
            "has no power to tell a good method from a bad one."
        )


def _new_images(report: Mapping[str, Any]) -> Iterator[str]:
    """How the unlearned model does on new images beside the retrained one, or the original where there is none."""
    models = report["models"]
    against = held_against(report)
    unlearned, other = models["unlearned"]["test"], models[against]["test"]
    multi_label = report["task"] == "multi-label"
    names = {"auroc": "mean AUROC"} if multi_label else {"accuracy": "accuracy", "auroc": "AUROC"}
    utility = None if report["audit"] is None else report["audit"]["utility"].get("test")
    measured = {} if utility is None else utility["changes"][against] or {}
    differences = []
    for figure, name in names.items():
        if unlearned[figure] is None or other[figure] is None:
            continue
        found = measured.get(figure) or {"difference": None}
        difference = unlearned[figure] - other[figure] if found["difference"] is None else found["difference"]
        text = f"{name} is {_difference(difference)} the {against} model's"
        if found["difference"] is not None and None not in (found["low"], found["high"]):
            text += f" (95 % interval of the difference {signed(found['low'])} to {signed(found['high'])})"
        differences.append(text)
    if differences:
        yield f"On new images (the test set) the unlearned model's {', and its '.join(differences)}."
    if multi_label:
        yield from _largest_change(unlearned, other, against)


def _kept(report: Mapping[str, Any]) -> Iterator[str]:
    """How the unlearned model does on the images that stay, beside the retrained one, or the original."""
    models = report["models"]
    against = held_against(report)
    figure = MAIN_FIGURE[report["task"]]
    name = "mean AUROC" if figure == "auroc" else figure
    unlearned, other = models["unlearned"]["retain"][figure], models[against]["retain"][figure]
    if None not in (unlearned, other):
        told = f"{_difference(unlearned - other)} the {against} model's"
        yield f"On training images that stay (the retain set) the unlearned model's {name} is {told}."


def _largest_change(unlearned: Mapping[str, Any], other: Mapping[str, Any], against: str) -> Iterator[str]:
    """The finding whose AUROC on new images is furthest from the other model's."""
    pairs = {name: (auroc, other["auroc_per_finding"][name]) for name, auroc in unlearned["auroc_per_finding"].items()}
    pairs = {name: pair for name, pair in pairs.items() if None not in pair}
    if len(pairs) > 1:
        name, (auroc, reference) = max(pairs.items(), key=lambda item: abs(item[1][0] - item[1][1]))
        told = _difference(auroc - reference)
        yield f"Of the single findings {name} differs most: its AUROC is {told} the {against} model's."


def _difference(difference: float) -> str:
    points = 100 * difference
    if abs(points) < 0.05:
        return "the same as"
    return f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'} than"


def _missed(report: Mapping[str, Any]) -> Iterator[str]:
    found = largest_missed(report)
    if found is not None and found[2]["difference"] > 0:
        name, against, difference = found
        kind = "finding" if report["task"] == "multi-label" else "class"
        yield (
            f"False negatives on new images rose most for the {kind} {name}: {change(difference, scale=1)} percentage "
            f"points more of its images are missed than by the {against} model."
        )


def _subgroups(report: Mapping[str, Any]) -> Iterator[str]:
    """Between which groups unlearning made a difference on new images that chance does not explain."""
    unclear = []
    for column, section in report["audit"]["subgroups"].items():
        found = section["largest"].get("test")
        if found is None or found["difference"] is None:
            continue
        if found["p_holm"] is None or found["p_holm"] >= LEVEL:
            unclear.append(column)
            continue
        first, second = found["groups"]
        yield (
            f"By {column}, unlearning did not change all groups alike: between {first} and {second} the change of "
            f"accuracy on new images against the {found['against']} model differs by {change(found)} points (the first "
            f"minus the second; p = {number(found['p_holm'], 3)}, corrected for the number of tests)."
        )
    if unclear:
        yield (
            f"Between groups by {', by '.join(unclear)}, no difference beyond chance was seen in how accuracy on new "
            "images changed. With few images in a group that says little."
        )


def _general(report: Mapping[str, Any]) -> Iterator[str]:
    retrained = report["models"]["retrained"]
    multi_label = report["task"] == "multi-label"
    if report["audit"] is None and report["gap_to_retrained"] is not None:
        figure = "mean AUROC" if multi_label else "accuracy"
        yield (
            f"Over forget, retain and test {figure} and this attack it is {report['gap_to_retrained']:.1f} percentage "
            "points away from the retrained model on average."
        )
    if retrained is None:
        compared = report["audit"] is not None and report["audit"]["verdict"]["answer"] != "not comparable"
        yield (GUESSING if compared else NO_YARDSTICK).format(figure="mean AUROC" if multi_label else "accuracy")
    elif report["method"] == "retrain":
        yield SAME_METHOD
    yield _cost(report["cost"])
    if report["left"]:
        places = counted(len(report["left"]), "place")
        yield f"What is left: data of these images, or weights from before, in {places}, listed below."
    if (warning := request_warning(report["request"])) is not None:
        yield warning
    yield from report["notes"]


def _cost(cost: Mapping[str, Any]) -> str:
    sentence, ratio = cost_sentence(cost), cost["ratio"]
    if ratio is None or ratio["seconds"] is None or not any(cost[phase] for phase in UNLEARNING):
        return f"{sentence}."
    together = {
        True: "measured in one run on one machine",
        False: "measured in different runs, so seconds are not quite comparable",
        None: "whether in one run is not known",
    }[ratio["measured_together"]]
    return f"{sentence}: {100 * ratio['seconds']:.0f} % of the time of retraining ({together})."
