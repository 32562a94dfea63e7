"""The audit's first question: can anyone tell this model from one that never saw these images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_unlearn.data import column_strata
from monai_unlearn.evaluation.audited import Audited, AuditOptions, Facts, member_scores
from monai_unlearn.evaluation.evaluate import SplitResult
from monai_unlearn.metrics import (
    AttackFigures,
    Sides,
    attack_auc,
    attack_figures,
    attack_roc,
    cross_fitted_scores,
    group_numbers,
    holm,
    interval,
    lira_scores,
    ratio_scores,
    two_sided_p,
)

__all__ = ["attack_section", "matching_strata", "verdict_section"]

Scores = dict[str, tuple[np.ndarray, np.ndarray]]  # model → scores of forget and of unseen images
POWER = 1.96 + 0.84  # standard errors that a difference has to have to show at 5 % in four of five audits
BINS = 30


def attack_section(audited: Audited, options: AuditOptions) -> dict[str, Any]:
    """All attacks, between the forget set and the half of the validation images on which nothing was chosen.

    Args:
        audited: outputs of the models.
        options: how to audit.

    Returns:
        The section ``attacks`` of the report.
    """
    forget, unseen = audited.facts["forget"], audited.facts["validation"]
    pair = audited.original["forget"], audited.original["validation"]
    known = [~np.isnan(result.scores) for result in pair]
    matched_by, strata = matching_strata(_labels(pair), (forget, unseen), options.matched)
    whole = Sides(forget.people, unseen.people, *strata)
    weights = _weights(whole, known)
    models = {name: list(group) for name, group in audited.models.items()}
    kinds = _kinds(models)

    population = {kind: _entry(scores, whole, options) for kind, scores in kinds.items()}
    population["classifier"] = _entry(_fitted(kinds, whole, options.seed), whole, options)
    log_odds = kinds["log_odds"]
    people = [
        _count(facts.people, keep & (weight > 0)) for facts, keep, weight in zip((forget, unseen), known, weights)
    ]
    return {
        "aucs": {name: _aucs(group, whole) for name, group in log_odds.items()},
        "matched_by": matched_by,
        "forget": {
            "images": int(known[0].sum()),
            "patients": people[0],
            "without_match": int((known[0] & (weights[0] == 0)).sum()),
        },
        "unseen": {"images": int(known[1].sum()), "patients": people[1], "effective": _effective(weights[1][known[1]])},
        "population": population,
        "patient": _by_patient(log_odds, forget, unseen, options),
        "ratio": _ratio(models, whole, options),
        "u_lira": None if audited.shadows is None else _u_lira(log_odds, whole, options, audited.shadows),
        "sanity": _sanity(audited, population["log_odds"], log_odds, unseen, options),
        "roc": _roc(log_odds, whole),
        "histogram": _histogram(log_odds, weights),
    }


def verdict_section(attacks: Mapping[str, Any], audited: Audited, options: AuditOptions) -> dict[str, Any]:
    """What all attacks together say.

    ``equivalent`` where the 90 % interval of each attack's difference lies within the margin; ``different`` where one
    attack's difference is not 0 at 5 %, corrected for the number of attacks by Holm; else ``inconclusive``.
    ``powerless`` where the attacks can't tell even the original from the yardstick; ``not comparable`` where there is
    no retrained model and the forget set differs from unseen images by what it was chosen by.

    Args:
        attacks: the section ``attacks``.
        audited: outputs of the models.
        options: how to audit.
    """
    entries = {
        **{f"population attack ({kind.replace('_', ' ')})": entry for kind, entry in attacks["population"].items()},
        "patient-level attack": attacks["patient"],
        "ratio attack": attacks["ratio"],
        "U-LiRA": attacks["u_lira"],
    }
    differences = {name: entry["difference"] for name, entry in entries.items() if entry and entry["difference"]}
    differences = {name: found for name, found in differences.items() if found["answer"] is not None}
    main = attacks["population"]["log_odds"]
    retrained = bool(audited.retrained)
    yardstick = "the retrained model" if retrained else "guessing"
    detectable = main["difference"]["detectable"] if main["difference"] else None
    answer, direction, reason = "powerless", None, ""
    if not differences:
        reason = (
            "With fewer than two independent images, or patients, on one side no attack has an interval. "
            "Nothing can be said about whether the images to be forgotten can still be told from unseen ones."
        )
        return {"answer": answer, "direction": None, "reason": reason, "detectable": None}
    if not retrained and not options.comparable:
        reason = (
            "The forget set was chosen by class, sex, site, difficulty or the like, so unseen images differ from it "
            "even for a model that never saw either. Without a retrained model there is nothing to compare with: "
            "retrain one (--reference true)."
        )
        return {"answer": "not comparable", "direction": None, "reason": reason, "detectable": detectable}
    corrected = dict(zip(differences, holm(np.array([found["p"] for found in differences.values()]))))
    beyond = {n: f for n, f in differences.items() if corrected[n] < 0.05 and f["answer"] != "equivalent"}
    if beyond:
        strongest = max(beyond, key=lambda name: abs(beyond[name]["difference"]))
        # The fitted attack finds both, and does not tell which.
        told = main["difference"] if "classifier" in strongest else beyond[strongest]
        direction = "remembers" if told["difference"] > 0 else "over-forgets"
        answer = "different"
        reason = (
            f"The {strongest} tells the unlearned model from {yardstick}: its AUC differs by "
            f"{_signed(beyond[strongest]['difference'])} ({_signed(beyond[strongest]['low_95'])} to "
            f"{_signed(beyond[strongest]['high_95'])})."
        )
    elif not attacks["sanity"]["original"]["detected"]:
        reason = (
            f"These attacks can't tell even the original model, which was trained on the forget set, from {yardstick}. "
            "That they find nothing in the unlearned model says nothing about it."
        )
    elif all(found["answer"] == "equivalent" for found in differences.values()):
        answer = "equivalent"
        reason = (
            f"Every attack's AUC lies within ±{options.margin:g} of that of {yardstick} (90 % intervals). "
            "A stronger attack may still tell them apart."
        )
    else:
        answer = "inconclusive"
        wide = [name for name, found in differences.items() if found["answer"] != "equivalent"]
        reason = (
            f"No attack tells the unlearned model from {yardstick}, but {len(wide)} of {len(differences)} can't "
            f"exclude a difference of AUC beyond ±{options.margin:g} either: more images or patients would be needed."
        )
    return {"answer": answer, "direction": direction, "reason": reason, "detectable": detectable}


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _kinds(models: Mapping[str, Sequence[Mapping[str, SplitResult]]]) -> dict[str, dict[str, list]]:
    """Kind of score → model → for each of its models the scores of forget and unseen images."""
    kinds: dict[str, dict[str, list]] = {}
    for name, group in models.items():
        for outputs in group:
            sides = [member_scores(outputs[split]) for split in ("forget", "validation")]
            for kind in sides[0]:
                kinds.setdefault(kind, {}).setdefault(name, []).append((sides[0][kind], sides[1][kind]))
    return kinds


def _labels(pair: tuple[SplitResult, SplitResult]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0].labels, pair[1].labels


def matching_strata(
    labels: tuple[np.ndarray, np.ndarray], facts: tuple[Facts, Facts], matched: Sequence[str]
) -> tuple[list[str], tuple[np.ndarray, np.ndarray]]:
    """What unseen images are matched by, and the stratum of each image of both sides.

    Args:
        labels: labels of the forget images and of unseen ones: whole numbers, or N × L findings.
        facts: what is known of both.
        matched: columns that the request names; those that a side does not have are left out.

    Returns:
        What they are matched by: the class (of findings: how many there are) and columns; and the strata, as words.
    """
    keys: dict[str, list[np.ndarray]] = {}
    if labels[0].ndim == 2:
        keys["number of findings (0, 1, 2, more)"] = [np.minimum((side > 0.5).sum(1), 3).astype(str) for side in labels]
    else:
        keys["class"] = [side.astype(str) for side in labels]
    for name in matched:
        if all(name in side.columns for side in facts):
            keys[name] = column_strata(*(side.columns[name] for side in facts))
    strata = [np.array(["\0".join(row) for row in zip(*(values[side] for values in keys.values()))]) for side in (0, 1)]
    return list(keys), (strata[0], strata[1])


def _entry(scores: Mapping[str, Sequence], sides: Sides, options: AuditOptions) -> dict[str, Any]:
    """An attack on each model, and how far the unlearned one is from the retrained."""
    rows = [(name, one) for name, group in scores.items() for one in group]
    members, others = (np.stack([one[side] for _, one in rows]) for side in (0, 1))
    keep = [~np.isnan(part).any(axis=0) for part in (members, others)]
    figures = attack_figures(
        members[:, keep[0]], others[:, keep[1]], _kept(sides, *keep), options.resamples, options.seed
    )
    return _compared([name for name, _ in rows], figures, options)


def _compared(names: Sequence[str], figures: AttackFigures, options: AuditOptions) -> dict[str, Any]:
    """The figures of each model, averaged over models of one name, and the difference from the yardstick."""
    models: dict[str, Any] = {"original": None, "unlearned": None, "retrained": None}
    drawn: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        models[name] = {}
        for figure, values in figures.values.items():
            low, high = float("nan"), float("nan")
            if figures.resampled:
                resampled = figures.resampled[figure][:, own].mean(axis=1)
                low, high = interval(resampled)
                if figure == "auc":
                    drawn[name] = resampled
            prefix = "" if figure == "auc" else f"{figure}_"
            models[name] |= {figure: float(values[own].mean()), f"{prefix}low": low, f"{prefix}high": high}
    yardstick = models["retrained"]
    difference = models["unlearned"]["auc"] - (0.5 if yardstick is None else yardstick["auc"])
    resampled = None
    if drawn:
        resampled = drawn["unlearned"] - (0.5 if yardstick is None else drawn["retrained"])
    return {"models": models, "difference": _equivalence(difference, resampled, yardstick is not None, options)}


def _equivalence(
    difference: float, resampled: np.ndarray | None, retrained: bool, options: AuditOptions
) -> dict[str, Any]:
    nothing = float("nan")
    found: dict[str, Any] = {"against": "retrained" if retrained else "0.5", "difference": difference}
    if resampled is None or np.isnan(difference):
        names = ("low_90", "high_90", "low_95", "high_95", "p", "detectable")
        return found | dict.fromkeys(names, nothing) | {"answer": None}
    (low, high), (lower, higher) = interval(resampled, 0.9), interval(resampled)
    if -options.margin <= low and high <= options.margin:
        answer = "equivalent"
    elif lower > 0 or higher < 0:
        answer = "different"
    else:
        answer = "inconclusive"
    return found | {
        "low_90": low,
        "high_90": high,
        "low_95": lower,
        "high_95": higher,
        "p": two_sided_p(resampled),
        "detectable": POWER * float(np.nanstd(resampled)),
        "answer": answer,
    }


def _kept(sides: Sides, ours: np.ndarray, theirs: np.ndarray) -> Sides:
    def of(values: np.ndarray | None, keep: np.ndarray) -> np.ndarray | None:
        return None if values is None else values[keep]

    return Sides(
        of(sides.member_groups, ours),
        of(sides.non_member_groups, theirs),
        of(sides.member_strata, ours),
        of(sides.non_member_strata, theirs),
    )


def _fitted(kinds: Mapping[str, Mapping[str, Sequence]], sides: Sides, seed: int) -> dict[str, list]:
    """Scores of a classifier on all kinds of score, fitted crosswise: it needs no notion of which way membership shows.

    Each fold is scored by one that was fitted on the folds before it, so that intervals and p-values hold.

    The class is no feature: unseen images are matched by it, so that it tells nothing but, within the folds, the
    opposite of what holds in the fold that was left out.
    """
    fitted: dict[str, list] = {}
    for name, group in next(iter(kinds.values())).items():
        for i in range(len(group)):
            features = [np.column_stack([kinds[kind][name][i][side] for kind in kinds]) for side in (0, 1)]
            keep = [np.isfinite(part).all(axis=1) for part in features]
            scores = [np.full(len(part), np.nan) for part in features]
            found = cross_fitted_scores(features[0][keep[0]], features[1][keep[1]], _kept(sides, *keep), seed)
            for part, rows, values in zip(scores, keep, found):
                part[rows] = values
            fitted.setdefault(name, []).append((scores[0], scores[1]))
    return fitted


def _weights(sides: Sides, known: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Matching weights of the images that have a score; 0 for those that have none."""
    weights = np.zeros(len(known[0])), np.zeros(len(known[1]))
    found = _kept(sides, *known).weights(*(int(k.sum()) for k in known))
    for weight, rows, values in zip(weights, known, found):
        weight[rows] = values
    return weights


def _by_patient(
    scores: Mapping[str, Sequence], forget: Facts, unseen: Facts, options: AuditOptions
) -> dict[str, Any] | None:
    """The attack on people: the mean score over each one's images."""
    if forget.people is None or unseen.people is None:
        return None
    strata = None
    if named := [name for name in options.matched if name in forget.columns and name in unseen.columns]:
        columns = [column_strata(forget.columns[name], unseen.columns[name]) for name in named]
        strata = [np.array(["\0".join(row) for row in zip(*(c[side] for c in columns))]) for side in (0, 1)]
    averaged: dict[str, list] = {}
    first: list[np.ndarray] = []
    for name, group in scores.items():
        for one in group:
            sides = [_mean_by(values, facts.people) for values, facts in zip(one, (forget, unseen))]
            averaged.setdefault(name, []).append((sides[0][0], sides[1][0]))
            first = [side[1] for side in sides]
    people = Sides() if strata is None else Sides(None, None, strata[0][first[0]], strata[1][first[1]])
    return _entry(averaged, people, options)


def _mean_by(values: np.ndarray, people: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean over each person's images that have a score, and the place of each person's first image."""
    numbers = group_numbers(people, len(values))
    known = ~np.isnan(values)
    size = int(numbers.max()) + 1 if len(numbers) else 0
    counts = np.bincount(numbers[known], minlength=size)
    sums = np.bincount(numbers[known], weights=values[known], minlength=size)
    mean = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return mean, np.unique(numbers, return_index=True)[1]


def _ratio(
    models: Mapping[str, Sequence[Mapping[str, SplitResult]]], sides: Sides, options: AuditOptions
) -> dict[str, Any] | None:
    """The ratio attack: each image's probability against what models that never saw it give it.

    Each retrained model in turn is the yardstick while the others are the references, for all models alike.
    """
    retrained = models.get("retrained", [])
    if len(retrained) < 2:
        return None

    def log_p(outputs: Mapping[str, SplitResult]) -> list[np.ndarray]:
        return [member_scores(outputs[split])["loss"] for split in ("forget", "validation")]

    references = [log_p(outputs) for outputs in retrained]
    scores: dict[str, list] = {}
    for name in ("original", "unlearned", "retrained"):
        for left_out in range(len(retrained)):
            own = references[left_out] if name == "retrained" else log_p(models[name][0])
            others = [reference for i, reference in enumerate(references) if i != left_out]
            pair = []
            for side in (0, 1):
                known, values = ~np.isnan(own[side]), np.full(len(own[side]), np.nan)
                values[known] = ratio_scores(own[side][known], np.stack([other[side][known] for other in others]))
                pair.append(values)
            scores.setdefault(name, []).append((pair[0], pair[1]))
    return {**_entry(scores, sides, options), "references": len(retrained) - 1}


def _u_lira(
    scores: Mapping[str, Sequence], sides: Sides, options: AuditOptions, shadows: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """U-LiRA on every model: how much likelier each image's score is for models that unlearned it."""
    found: dict[str, list] = {}
    for name, group in scores.items():
        for ours, theirs in group:
            both = np.concatenate([ours, theirs])
            known, values = ~np.isnan(both), np.full(len(both), np.nan)
            values[known] = lira_scores(both[known], shadows[0][:, known], shadows[1][:, known])
            found.setdefault(name, []).append((values[: len(ours)], values[len(ours) :]))
    return {**_entry(found, sides, options), "shadow_models": len(shadows[0])}


def _sanity(
    audited: Audited, main: Mapping[str, Any], scores: Mapping[str, Sequence], unseen: Facts, options: AuditOptions
) -> dict[str, Any]:
    """Whether the attack sees membership where it is, and none where it is not."""
    original = scores["original"]
    against = "retrained" if "retrained" in scores else "0.5"
    rows = {"unlearned": original, **({"retrained": scores["retrained"]} if "retrained" in scores else {})}
    strata = matching_strata(
        _labels((audited.original["forget"], audited.original["validation"])),
        (audited.facts["forget"], audited.facts["validation"]),
        options.matched,
    )[1]
    sides = Sides(audited.facts["forget"].people, unseen.people, *strata)
    difference = _entry(rows, sides, options)["difference"]
    auc = main["models"]["original"]
    seen, held_out = (getattr(audited.original[split], audited.figure) for split in ("retain", "validation"))
    _, values = scores["unlearned"][0]
    known = ~np.isnan(values)
    people = group_numbers(None if unseen.people is None else unseen.people[known], int(known.sum()))
    half = np.zeros(0, dtype=bool)
    if len(people):
        half = np.random.default_rng(options.seed).permutation(int(people.max()) + 1)[people] % 2 == 0
    halves = attack_figures(
        values[known][None, half],
        values[known][None, ~half],
        Sides(people[half], people[~half]),
        options.resamples,
        options.seed,
    )
    low, high = interval(halves.resampled["auc"][:, 0], 0.99) if halves.resampled else (float("nan"), float("nan"))
    return {
        "original": {
            "auc": auc["auc"],
            "low": auc["low"],
            "high": auc["high"],
            "against": against,
            "difference": difference["difference"],
            "detected": None if np.isnan(difference["p"]) else difference["p"] < 0.05,
        },
        "halves": {
            "auc": float(halves.values["auc"][0]),
            "low": low,
            "high": high,
            "as_expected": None if np.isnan(low) else bool(low <= 0.5 <= high),
        },
        "memorisation": None if seen is None or held_out is None else seen - held_out,
    }


def _roc(scores: Mapping[str, Sequence], sides: Sides) -> dict[str, Any]:
    """True positive rate at false positive rates from 1 over the number of unseen images on; mean of several models."""
    ours, theirs = next(iter(scores.values()))[0]
    keep = ~np.isnan(ours), ~np.isnan(theirs)
    kept = _kept(sides, *keep)
    weights = kept.weights(int(keep[0].sum()), int(keep[1].sum()))
    usable = weights[0] > 0
    curves: dict[str, Any] = {"original": None, "unlearned": None, "retrained": None}
    if not usable.any() or not (weights[1] > 0).any():
        return curves
    grid = np.concatenate([[0.0], np.geomspace(1 / max(int(keep[1].sum()), 2), 1, 120)])
    for name, group in scores.items():
        rates = []
        for members, others in group:
            fpr, tpr = attack_roc(members[keep[0]][usable], others[keep[1]], weights[1])
            rates.append(tpr[np.searchsorted(fpr, grid + 1e-12, side="right") - 1])
        curves[name] = {"fpr": grid.tolist(), "tpr": np.mean(rates, axis=0).tolist()}
    return curves


def _histogram(scores: Mapping[str, Sequence], weights: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Shares of both sides' images by score, the unseen ones weighted as they are matched."""
    everything = np.concatenate([part for group in scores.values() for one in group for part in one])
    everything = everything[np.isfinite(everything)]
    low, high = np.quantile(everything, [0.005, 0.995]) if len(everything) else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-9), BINS + 1)
    models: dict[str, Any] = {"original": None, "unlearned": None, "retrained": None}
    for name, group in scores.items():
        models[name] = {}
        for part, side in (("forget", 0), ("unseen", 1)):
            shares = []
            for one in group:
                known = ~np.isnan(one[side])
                heights, _ = np.histogram(
                    np.clip(one[side][known], low, edges[-1]), edges, weights=weights[side][known]
                )
                shares.append(heights / heights.sum() if heights.sum() else heights)
            models[name][part] = np.mean(shares, axis=0).tolist()
    return {"edges": edges.tolist(), "models": models}


def _aucs(scores: Sequence, sides: Sides) -> list[float]:
    """AUC of the population attack on each model of a name."""
    rows = np.stack([ours for ours, _ in scores]), np.stack([theirs for _, theirs in scores])
    keep = [~np.isnan(part).any(axis=0) for part in rows]
    figures = attack_figures(rows[0][:, keep[0]], rows[1][:, keep[1]], _kept(sides, *keep), resamples=0)
    return figures.values["auc"].tolist()


def _count(people: np.ndarray | None, keep: np.ndarray) -> int | None:
    return None if people is None else len(np.unique(people[keep]))


def _effective(weights: np.ndarray) -> float:
    """Number of equally weighted images that would give as sure a mean."""
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0


def group_attack(scores: Sequence, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean AUC over models of one name, between parts of both sides."""
    return float(np.mean([attack_auc(one[0][ours], one[1][theirs]) for one in scores]))
