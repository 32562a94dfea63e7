"""The audit's attacks and its verdict, against scikit-learn, SciPy and slow loops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from audit_worlds import (
    FEW,
    MODELS,
    drawn_images,
    matched,
    models,
    percentiles,
    rows_of,
    shares,
    weighted_auc,
    world,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler

from monai_unlearn.evaluation import Audited, AuditOptions, Facts, SplitResult
from monai_unlearn.evaluation.attacks import attack_section, verdict_section

pytestmark = pytest.mark.filterwarnings("error")
# Shrinking would take minutes, and a smaller seed is no smaller world.
FEW_EXAMPLES = settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
KINDS = ("log_odds", "modified_entropy", "loss")
RATES = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}

WORLDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "sizes": st.fixed_dictionaries({"forget": st.integers(9, 40), "validation": st.integers(9, 130)}),
        "classes": st.integers(2, 4),
        "multi_label": st.booleans(),
        "patients": st.booleans(),
        "retrained": st.integers(0, 3),
    }
)


# ---- scores, written out


def _binary(p: float, y: int) -> float:
    """Modified entropy of an answer out of two."""
    parts = np.array([1 - p, p])
    return float(-(1 - parts[y]) * np.log(parts[y]) - parts[1 - y] * np.log(1 - parts[1 - y]))


def _score(kind: str, outputs: SplitResult, i: int) -> float:
    """Score of one image; higher: more likely a member."""
    p, y = shares(outputs)[i], outputs.labels[i]
    if outputs.labels.ndim == 1:
        others = np.delete(p, y)
        return {
            "log_odds": np.log(p[y]) - np.log(others.sum()),
            "modified_entropy": (1 - p[y]) * np.log(p[y]) + (others * np.log(1 - others)).sum(),
            "loss": np.log(p[y]),
        }[kind]
    known = ~np.isnan(y) & ((y != 0.5) | (kind != "modified_entropy"))
    if not known.any():
        return float("nan")
    p, y, z = p[known], y[known].astype(np.float64), outputs.logits[i][known].astype(np.float64)
    return {
        "log_odds": float(np.mean((2 * y - 1) * z)),
        "modified_entropy": -float(np.mean([_binary(a, int(b > 0.5)) for a, b in zip(p, y)])),
        "loss": float(np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))),
    }[kind]


def _scores(kind: str, outputs: Mapping[str, SplitResult]) -> tuple[np.ndarray, np.ndarray]:
    forget, unseen = outputs["forget"], outputs["validation"]
    return tuple(np.array([_score(kind, side, i) for i in range(side.n)]) for side in (forget, unseen))


def _kinds_of_image(audited: Audited) -> tuple[list, list]:
    """What unseen images are matched by where the request names nothing: class, or number of findings."""

    def kind(label: np.ndarray) -> str:
        return str(label) if label.ndim == 0 else str(min(int((label > 0.5).sum()), 3))

    return tuple([kind(label) for label in audited.original[split].labels] for split in ("forget", "validation"))


def _people(audited: Audited) -> tuple[np.ndarray | None, np.ndarray | None]:
    return audited.facts["forget"].people, audited.facts["validation"].people


def _taken(values: Sequence | None, keep: np.ndarray) -> np.ndarray | None:
    return None if values is None else np.asarray(values)[keep]


class _Attack:
    """An attack on several models, slowly: rows of scores of both sides, people and strata."""

    def __init__(
        self, scores: Mapping[str, Sequence], people: Sequence = (None, None), strata: Sequence = (None, None)
    ) -> None:
        first = next(iter(scores.values()))[0]
        keep = [~np.isnan(side) for side in first]
        self.scores = {name: [[s[k] for s, k in zip(pair, keep)] for pair in group] for name, group in scores.items()}
        self.people = [_taken(part, k) for part, k in zip(people, keep)]
        self.strata = [
            [0] * int(k.sum()) if part is None else _taken(part, k).tolist() for part, k in zip(strata, keep)
        ]

    def figures(self, members: np.ndarray, others: np.ndarray) -> dict[str, list[float]]:
        """Model → AUC of each of its models between some images of both sides, as often as they are named."""
        w, v = matched(*(np.asarray(s)[rows] for s, rows in zip(self.strata, (members, others))))
        return {
            name: [weighted_auc(pair[0][members], pair[1][others], w, v) for pair in group]
            for name, group in self.scores.items()
        }

    def whole(self) -> dict[str, list[float]]:
        return self.figures(*(np.arange(len(strata)) for strata in self.strata))

    def resampled(self, options: AuditOptions) -> dict[str, np.ndarray]:
        """Model → mean AUC of its models in each resample."""
        draws = []
        for people, strata, seed in zip(self.people, self.strata, np.random.SeedSequence(options.seed).spawn(2)):
            draws.append(drawn_images(people, len(strata), options.resamples, np.random.default_rng(seed)))
        with np.errstate(invalid="ignore"):
            found = [self.figures(ours, theirs) for ours, theirs in zip(*draws)]
        return {name: np.array([np.mean(one[name]) for one in found]) for name in self.scores}


def _log_odds_attack(audited: Audited, kind: str = "log_odds", strata: Sequence | None = None) -> _Attack:
    scores = {name: [_scores(kind, outputs) for outputs in group] for name, group in models(audited).items()}
    return _Attack(scores, _people(audited), _kinds_of_image(audited) if strata is None else strata)


def _check_entry(entry: Mapping[str, Any], attack: _Attack, options: AuditOptions = FEW) -> None:
    """AUCs, their intervals, the difference from the yardstick and what is said of it."""
    whole, drawn = attack.whole(), attack.resampled(options)
    yardstick = "retrained" if "retrained" in whole else None
    for name in MODELS:
        if name not in whole:
            assert entry["models"][name] is None
            continue
        assert entry["models"][name]["auc"] == pytest.approx(np.mean(whole[name]), abs=1e-12)
        found = entry["models"][name]["low"], entry["models"][name]["high"]
        assert found == pytest.approx(_interval(drawn[name]), abs=1e-12, nan_ok=True)
    difference = entry["difference"]
    assert difference["against"] == (yardstick or "0.5")
    expected = np.mean(whole["unlearned"]) - (np.mean(whole[yardstick]) if yardstick else 0.5)
    assert difference["difference"] == pytest.approx(expected, abs=1e-12)
    draws = drawn["unlearned"] - (drawn[yardstick] if yardstick else 0.5)
    ends = {"90": _interval(draws, 0.9), "95": _interval(draws)}
    for level, pair in ends.items():
        found = difference[f"low_{level}"], difference[f"high_{level}"]
        assert found == pytest.approx(pair, abs=1e-12, nan_ok=True)
    assert difference["detectable"] == pytest.approx(2.8 * np.nanstd(draws), abs=1e-12)
    defined = draws[~np.isnan(draws)]
    if len(defined) < 0.9 * len(draws):
        assert np.isnan(difference["p"])
    else:
        tails = [(1 + np.sum(side)) / (1 + len(defined)) for side in (defined <= 0, defined >= 0)]
        assert difference["p"] == pytest.approx(min(1, 2 * min(tails)), abs=4 / len(draws))  # 0 but for rounding
    if max(map(abs, ends["90"])) <= options.margin:
        answer = "equivalent"
    else:
        answer = "different" if ends["95"][0] > 0 or ends["95"][1] < 0 else "inconclusive"
    assert difference["answer"] == answer


def _interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """NaN where an AUC is undefined in more than a tenth of the resamples."""
    defined = draws[~np.isnan(draws)]
    return percentiles(defined, level) if len(defined) >= 0.9 * len(draws) else (float("nan"),) * 2


def _identical(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


# ---- population attacks


@FEW_EXAMPLES
@given(WORLDS)
def test_aucs_and_rates_are_scikit_learns_with_weights(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    section = attack_section(audited, FEW)
    strata = _kinds_of_image(audited)
    for kind in KINDS:
        entry = section["population"][kind]
        for name, group in models(audited).items():
            found: dict[str, list[float]] = {"auc": [], **{rate: [] for rate in RATES}}
            for outputs in group:
                scores = _scores(kind, outputs)
                keep = [~np.isnan(side) for side in scores]
                weights = matched(*(np.asarray(s)[k] for s, k in zip(strata, keep)))
                truth = np.repeat([1, 0], [k.sum() for k in keep])
                values = np.concatenate([side[k] for side, k in zip(scores, keep)])
                weight = np.concatenate(weights)
                found["auc"].append(roc_auc_score(truth, values, sample_weight=weight))
                fpr, tpr, _ = roc_curve(truth, values, sample_weight=weight, drop_intermediate=False)
                for figure, rate in RATES.items():
                    enough = keep[1].sum() * rate >= 1
                    found[figure].append(tpr[fpr <= rate * (1 + 1e-9)].max() if enough else float("nan"))
            for figure, each in found.items():
                assert entry["models"][name][figure] == pytest.approx(np.mean(each), abs=1e-9, nan_ok=True)
                assert set(entry["models"][name]) >= {f"{figure}_low", f"{figure}_high"} or figure == "auc"
    assert section["aucs"] == {
        name: pytest.approx(each, abs=1e-12) for name, each in _log_odds_attack(audited).whole().items()
    }


@pytest.mark.parametrize("retrained", [0, 1, 3])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_differences_and_answers_are_those_of_a_slow_bootstrap(
    multi_label: bool, patients: bool, retrained: int
) -> None:
    audited = world(
        5 + retrained, multi_label=multi_label, patients=patients, retrained=retrained, shift=(2, 0.6, 0), classes=2
    )
    section = attack_section(audited, FEW)
    for kind in ("log_odds", "modified_entropy"):
        _check_entry(section["population"][kind], _log_odds_attack(audited, kind))


def _folds(audited: Audited) -> list[np.ndarray]:
    """Fold of each image: whole people, in an order of chance."""
    random = np.random.default_rng(FEW.seed)
    folds = []
    for people, split in zip(_people(audited), ("forget", "validation")):
        names = list(range(audited.original[split].n)) if people is None else people.tolist()
        first = list(dict.fromkeys(names))
        places = random.permutation(len(first))
        folds.append(np.array([places[first.index(name)] % 5 for name in names]))
    return folds


@pytest.mark.parametrize("patients", [False, True])
def test_the_balanced_accuracy_is_that_of_thresholds_that_were_fitted_without_the_fold(patients: bool) -> None:
    audited = world(3, patients=patients, shift=(2, 1, 0), sizes={"forget": 31, "validation": 37}, classes=2)
    audited = rows_of(audited, {"forget": np.flatnonzero(audited.original["forget"].labels == 0)})
    entry = attack_section(audited, FEW)["population"]["log_odds"]
    folds = _folds(audited)
    w, v = matched(*(np.asarray(side) for side in _kinds_of_image(audited)))
    for name, group in models(audited).items():
        ours, theirs = _scores("log_odds", group[0])
        right, wrong = np.zeros(len(ours)), np.zeros(len(theirs))
        for fold in range(5):
            fit, fit_others = folds[0] != fold, folds[1] != fold
            best = (-1.0, 0.0)
            for value in sorted({*ours[fit], *theirs[fit_others]}, reverse=True):
                hits = w[fit][ours[fit] >= value].sum() / w[fit].sum()
                alarms = v[fit_others][theirs[fit_others] >= value].sum() / v[fit_others].sum()
                if hits - alarms > best[0] + 1e-12:
                    lower = [x for x in (*ours[fit], *theirs[fit_others]) if x < value]
                    best = (hits - alarms, (value + max(lower)) / 2 if lower else value)
            right[~fit], wrong[~fit_others] = ours[~fit] >= best[1], theirs[~fit_others] >= best[1]
        expected = (np.average(right, weights=w) + 1 - np.average(wrong, weights=v)) / 2
        assert entry["models"][name]["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("patients", [False, True])
def test_the_fitted_attack_scores_each_fold_by_the_folds_before_it(patients: bool) -> None:
    audited = world(4, sizes={"forget": 30, "validation": 40}, shift=(2, 1, 0), patients=patients)
    entry = attack_section(audited, FEW)["population"]["classifier"]
    fold = np.concatenate(_folds(audited))
    strata = [np.asarray(side) for side in _kinds_of_image(audited)]
    weight, truth = np.concatenate(matched(*strata)), np.repeat([1, 0], [30, 40])
    for name, group in models(audited).items():
        x = np.vstack([np.column_stack([_scores(kind, group[0])[side] for kind in KINDS]) for side in (0, 1)])
        values = np.full(70, np.nan)
        for k in range(1, 5):
            fit = fold < k
            scaler = StandardScaler().fit(x[fit])
            balance = np.array([weight[fit][truth[fit] == side].sum() for side in (0, 1)])[truth[fit]]
            attacker = LogisticRegression(max_iter=1000)
            attacker.fit(scaler.transform(x[fit]), truth[fit], sample_weight=weight[fit] / balance * fit.sum() / 2)
            # Classifiers of different folds compare by ranks among what each was fitted on.
            fitted, new = (attacker.decision_function(scaler.transform(x[part])) for part in (fit, fold == k))
            values[fold == k] = [np.mean(fitted < value) for value in new]
        attack = _Attack({name: [(values[:30], values[30:])]}, strata=strata)
        assert entry["models"][name]["auc"] == pytest.approx(attack.whole()[name][0], abs=1e-4)


# ---- matching


def _column_key(values: Sequence, both: Sequence) -> list[str]:
    """A column's own values, or their fifths where they are numbers of more than twelve."""
    known = pd.Series(both)
    if not pd.api.types.is_numeric_dtype(known) or known.nunique() <= 12:
        return [str(value) for value in values]
    edges = np.quantile(known.dropna(), [0.2, 0.4, 0.6, 0.8])
    return ["nan" if np.isnan(value) else str(int((value > edges).sum())) for value in values]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("named", [("sex",), ("age",), ("site", "age"), ("sex", "label"), ("label",)], ids="+".join)
def test_unseen_images_are_matched_by_class_and_by_every_named_column(
    named: tuple[str, ...], multi_label: bool
) -> None:
    classes = 6 if multi_label else 3
    audited = world(8, multi_label=multi_label, patients=True, sizes={"forget": 60, "validation": 80}, classes=classes)
    options = replace(FEW, matched=named)
    section = attack_section(audited, options)
    there = [name for name in named if name in audited.facts["forget"].columns]
    assert section["matched_by"][0] == ("number of findings (0, 1, 2, more)" if multi_label else "class")
    assert section["matched_by"][1:] == there
    sides = [audited.facts[split].columns for split in ("forget", "validation")]
    keys = list(_kinds_of_image(audited))
    for name in there:
        both = pd.concat([side[name] for side in sides])
        keys = [list(zip(key, _column_key(side[name], both))) for key, side in zip(keys, sides)]
    keys = [[str(key) for key in side] for side in keys]
    attack = _log_odds_attack(audited, strata=keys)
    _check_entry(section["population"]["log_odds"], attack, options)
    w, v = matched(*attack.strata)
    assert section["forget"]["without_match"] == int((w == 0).sum())
    assert section["forget"]["images"] == len(w)
    assert section["unseen"]["images"] == len(v)
    assert section["unseen"]["effective"] == pytest.approx(v.sum() ** 2 / (v**2).sum())
    counted = [len(set(part[weight > 0])) for part, weight in zip(attack.people, (w, v))]
    assert [section["forget"]["patients"], section["unseen"]["patients"]] == counted


@pytest.mark.parametrize(("different", "fifths"), [(12, False), (13, True)])
def test_numbers_of_more_than_twelve_values_are_matched_by_fifths(different: int, fifths: bool) -> None:
    audited = world(0, sizes={"forget": 60, "validation": 60}, classes=2)
    ages = 3.0 * (np.arange(60) // 2 % (different - 1))
    both = {"forget": ages.copy(), "validation": np.where(ages == 0, 1.0, ages)}
    both["validation"][5] = both["forget"][7] = both["forget"][8] = np.nan
    assert len(set(np.concatenate([side[~np.isnan(side)] for side in both.values()]))) == different
    columns = {split: Facts(None, pd.DataFrame({"age": side})) for split, side in both.items()}
    section = attack_section(replace(audited, facts={**audited.facts, **columns}), replace(FEW, matched=("age",)))
    keys = []
    for side, kind in zip(both.values(), _kinds_of_image(audited)):
        keys.append([f"{k} {key}" for k, key in zip(kind, _column_key(side, np.concatenate(list(both.values()))))])
    w, _ = matched(*keys)
    assert section["forget"]["without_match"] == int((w == 0).sum())
    # An age that only one side has is without match by its own value, and has one by its fifth.
    assert (section["forget"]["without_match"] >= int((ages == 0).sum())) is not fifths


def test_forget_images_of_which_no_unseen_one_is_alike_are_left_out_and_counted() -> None:
    audited = world(3, sizes={"forget": 40, "validation": 60})
    labels = audited.original["validation"].labels
    seen = {"validation": np.flatnonzero(labels != 2)}
    without = rows_of(audited, seen)
    section = attack_section(without, FEW)
    third = audited.original["forget"].labels == 2
    assert section["forget"] == {"images": 40, "patients": None, "without_match": int(third.sum())}
    alone = attack_section(rows_of(without, {"forget": np.flatnonzero(~third)}), FEW)
    for kind in KINDS:
        one, other = (part["population"][kind]["models"]["unlearned"] for part in (section, alone))
        assert one["auc"] == pytest.approx(other["auc"], abs=1e-12)
    assert section["histogram"]["models"] == alone["histogram"]["models"] or third.any()


def test_no_unseen_image_of_their_kind_leaves_nothing_to_say() -> None:
    audited = world(3, sizes={"forget": 40, "validation": 60})
    audited = rows_of(
        audited,
        {split: np.flatnonzero(audited.original[split].labels == c) for split, c in (("forget", 0), ("validation", 1))},
    )
    section = attack_section(audited, FEW)
    assert section["forget"]["without_match"] == section["forget"]["images"]
    assert section["unseen"]["effective"] == 0
    assert np.isnan(section["population"]["log_odds"]["models"]["unlearned"]["auc"])
    assert section["roc"] == dict.fromkeys(MODELS)
    verdict = verdict_section(section, audited, FEW)
    assert verdict["answer"] == "powerless"
    assert verdict["detectable"] is None


@pytest.mark.parametrize("retrained", [0, 2])
def test_images_without_a_known_finding_are_as_if_they_were_not_there(retrained: int) -> None:
    audited = world(6, multi_label=True, retrained=retrained)
    known = {s: np.flatnonzero(~np.isnan(audited.original[s].scores)) for s in ("forget", "validation")}
    assert all(len(rows) < audited.original[split].n for split, rows in known.items())
    whole, without = (attack_section(one, FEW) for one in (audited, rows_of(audited, known)))
    assert _identical(whole, without)


# ---- people, references, shadow models


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("named", [(), ("sex",)])
def test_the_attack_on_people_goes_by_the_mean_of_each_ones_images(named: tuple[str, ...], multi_label: bool) -> None:
    audited = world(9, multi_label=multi_label, patients=True, sizes={"forget": 70, "validation": 80}, retrained=2)
    options = replace(FEW, matched=named)
    entry = attack_section(audited, options)["patient"]
    scores: dict[str, list] = {}
    strata: list = [None, None]
    for name, group in models(audited).items():
        for outputs in group:
            sides = []
            for side, (values, split) in enumerate(zip(_scores("log_odds", outputs), ("forget", "validation"))):
                people, columns = audited.facts[split].people, audited.facts[split].columns
                first = list(dict.fromkeys(people.tolist()))
                with np.errstate(invalid="ignore"):
                    sides.append(np.array([_mean(values[people == person]) for person in first]))
                if named:
                    strata[side] = [columns["sex"][int(np.argmax(people == person))] for person in first]
            scores.setdefault(name, []).append(tuple(sides))
    _check_entry(entry, _Attack(scores, strata=strata), options)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def test_without_patients_there_is_no_attack_on_them() -> None:
    section = attack_section(world(0), FEW)
    assert section["patient"] is None
    assert section["forget"]["patients"] is section["unseen"]["patients"] is None


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("retrained", [2, 3])
def test_the_ratio_attack_leaves_each_retrained_model_out_in_turn(retrained: int, multi_label: bool) -> None:
    audited = world(12, multi_label=multi_label, patients=True, retrained=retrained, shift=(2, 1, 0))
    entry = attack_section(audited, FEW)["ratio"]
    assert entry["references"] == retrained - 1
    log_p = {name: [_scores("loss", outputs) for outputs in group] for name, group in models(audited).items()}
    scores: dict[str, list] = {}
    for name in MODELS:
        for left_out in range(retrained):
            own = log_p["retrained"][left_out] if name == "retrained" else log_p[name][0]
            pair = []
            for side in (0, 1):
                others = [log_p["retrained"][k][side] for k in range(retrained) if k != left_out]
                values = [own[side][i] - np.log(np.mean([np.exp(o[i]) for o in others])) for i in range(len(own[side]))]
                pair.append(np.array(values))
            scores.setdefault(name, []).append(pair)
    _check_entry(entry, _Attack(scores, _people(audited), _kinds_of_image(audited)))


@pytest.mark.parametrize("retrained", [0, 1])
def test_fewer_than_two_retrained_models_leave_no_reference(retrained: int) -> None:
    assert attack_section(world(0, retrained=retrained), FEW)["ratio"] is None


def _shadows(random: np.random.Generator, targets: int, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
    inside = np.array([random.permutation(2 * each) < each for _ in range(targets)]).T
    scores = random.normal(size=inside.shape) + np.where(inside, 0.7, 0)
    return np.where(inside, scores, np.nan), np.where(inside, np.nan, scores)


@pytest.mark.parametrize("multi_label", [False, True])
def test_u_lira_asks_scipys_normal_densities(multi_label: bool) -> None:
    audited = world(13, multi_label=multi_label, retrained=1, shift=(2, 1, 0))
    targets = audited.original["forget"].n + audited.original["validation"].n
    shadows = _shadows(np.random.default_rng(0), targets)
    entry = attack_section(replace(audited, shadows=shadows), FEW)["u_lira"]
    assert entry["shadow_models"] == 8
    deviations = []
    known = ~np.isnan(np.concatenate(_scores("log_odds", audited.original)))
    for side in shadows:  # one spread for all images: four models estimate none of their own
        left = side[:, known] - np.nanmean(side[:, known], axis=0)
        deviations.append(np.sqrt(np.nansum(left**2) / (3 * known.sum())))
    scores: dict[str, list] = {}
    for name, group in models(audited).items():
        for outputs in group:
            sides = _scores("log_odds", outputs)
            both = np.concatenate(sides)
            inside, outside = (
                norm.pdf(both, np.nanmean(side, axis=0), spread) for side, spread in zip(shadows, deviations)
            )
            values = inside / (inside + outside)
            scores.setdefault(name, []).append((values[: len(sides[0])], values[len(sides[0]) :]))
    _check_entry(entry, _Attack(scores, strata=_kinds_of_image(audited)))


# ---- sanity, curves, histograms


@pytest.mark.parametrize("retrained", [0, 2])
def test_the_original_is_held_against_the_yardstick(retrained: int) -> None:
    audited = world(0, retrained=retrained, sizes={"forget": 60, "validation": 60}, shift=(3, 0, 0))
    section = attack_section(audited, FEW)
    sanity = section["sanity"]
    original = section["population"]["log_odds"]["models"]["original"]
    assert {key: sanity["original"][key] for key in ("auc", "low", "high")} == {
        key: original[key] for key in ("auc", "low", "high")
    }
    assert sanity["original"]["against"] == ("retrained" if retrained else "0.5")
    attack = _log_odds_attack(audited)
    whole, drawn = attack.whole(), attack.resampled(FEW)
    yardstick = np.mean(whole["retrained"]) if retrained else 0.5
    assert sanity["original"]["difference"] == pytest.approx(whole["original"][0] - yardstick, abs=1e-12)
    low, high = percentiles(drawn["original"] - (drawn["retrained"] if retrained else 0.5))
    assert sanity["original"]["detected"] is bool(low > 0 or high < 0) is True
    seen, unseen = audited.original["retain"].accuracy, audited.original["validation"].accuracy
    assert sanity["memorisation"] == pytest.approx(seen - unseen)


def test_an_original_that_does_not_memorise_is_not_detected() -> None:
    found = [attack_section(world(seed, shift=(0, 0, 0)), FEW)["sanity"]["original"]["detected"] for seed in range(20)]
    assert sum(found) <= 4  # one in twenty by chance


@pytest.mark.parametrize("patients", [False, True])
def test_two_halves_of_the_unseen_images_are_alike(patients: bool) -> None:
    as_expected = []
    for seed in range(12):
        audited = world(seed, patients=patients, sizes={"validation": 60})
        halves = attack_section(audited, FEW)["sanity"]["halves"]
        assert halves["as_expected"] is (halves["low"] <= 0.5 <= halves["high"])
        as_expected.append(halves["as_expected"])
    assert sum(as_expected) >= 11  # 99 % intervals
    people = audited.facts["validation"].people
    values = _scores("log_odds", audited.unlearned[0])[1]
    names = np.arange(60) if people is None else people
    first = list(dict.fromkeys(names.tolist()))
    places = np.random.default_rng(FEW.seed).permutation(len(first))
    half = np.array([places[first.index(name)] % 2 == 0 for name in names])
    assert not set(names[half]) & set(names[~half])
    assert halves["auc"] == pytest.approx(roc_auc_score(half, values), abs=1e-12)
    attack = _Attack({"unlearned": [(values[half], values[~half])]}, (names[half], names[~half]))
    expected = percentiles(attack.resampled(FEW)["unlearned"], 0.99)
    assert (halves["low"], halves["high"]) == pytest.approx(expected, abs=1e-12)


def test_halves_that_are_no_halves_are_said_to_be_none() -> None:
    audited = world(0, patients=True)
    audited.facts["validation"].people[:] = 7
    halves = attack_section(audited, FEW)["sanity"]["halves"]
    assert halves["as_expected"] is None
    assert np.isnan([halves["auc"], halves["low"], halves["high"]]).all()


@pytest.mark.parametrize("retrained", [0, 3])
@pytest.mark.parametrize("multi_label", [False, True])
def test_the_curves_are_the_scores(multi_label: bool, retrained: int) -> None:
    audited = world(21, multi_label=multi_label, retrained=retrained, sizes={"forget": 80, "validation": 200})
    section = attack_section(audited, FEW)
    for name in MODELS:
        curve = section["roc"][name]
        group = models(audited).get(name)
        if group is None:
            assert curve is None
            continue
        fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
        assert len(fpr) == len(tpr) <= 200
        assert (np.diff(fpr) >= 0).all()
        assert (np.diff(tpr) >= 0).all()
        assert (fpr[0], fpr[-1], tpr[-1]) == (0, pytest.approx(1), pytest.approx(1))
        expected = []
        for outputs in group:
            scores = _scores("log_odds", outputs)
            keep = [~np.isnan(side) for side in scores]
            w, v = matched(*(np.asarray(s)[k] for s, k in zip(_kinds_of_image(audited), keep)))
            ours, theirs = (side[k] for side, k in zip(scores, keep))
            thresholds = np.unique(np.concatenate([ours, theirs, [np.inf]]))
            rates = [(v[theirs >= t].sum() / v.sum(), w[ours >= t].sum() / w.sum()) for t in thresholds]
            expected.append([max(hit for alarm, hit in rates if alarm <= x + 1e-9) for x in fpr])
        np.testing.assert_allclose(tpr, np.mean(expected, axis=0), atol=1e-9)
        # By rectangles the area is a little less: the curve is known at 121 points.
        assert auc(fpr, tpr) == pytest.approx(section["population"]["log_odds"]["models"][name]["auc"], abs=0.02)
        for figure, rate in RATES.items():
            value = section["population"]["log_odds"]["models"][name][figure]
            if not np.isnan(value):
                assert tpr[fpr <= rate].max() <= value + 1e-9 <= tpr[fpr >= rate].min() + 2e-9


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_histograms_are_shares_of_the_images(multi_label: bool) -> None:
    audited = world(22, multi_label=multi_label, retrained=2, sizes={"forget": 80, "validation": 200})
    histogram = attack_section(audited, FEW)["histogram"]
    edges = np.array(histogram["edges"])
    assert len(edges) == 31
    everything = [
        side[~np.isnan(side)]
        for group in models(audited).values()
        for outputs in group
        for side in _scores("log_odds", outputs)
    ]
    np.testing.assert_allclose(edges[[0, -1]], np.quantile(np.concatenate(everything), [0.005, 0.995]), atol=1e-9)
    np.testing.assert_allclose(np.diff(edges), np.diff(edges)[0])
    for name, group in models(audited).items():
        for side, part in enumerate(("forget", "unseen")):
            shares_of = histogram["models"][name][part]
            assert len(shares_of) == 30
            assert sum(shares_of) == pytest.approx(1)
            expected = []
            for outputs in group:
                scores = _scores("log_odds", outputs)
                keep = [~np.isnan(values) for values in scores]
                weight = matched(*(np.asarray(s)[k] for s, k in zip(_kinds_of_image(audited), keep)))[side]
                values = np.clip(scores[side][keep[side]], edges[0], edges[-1])
                bars = [
                    weight[(values >= low) & ((values < high) | ((i == 29) & (values == high)))].sum()
                    for i, (low, high) in enumerate(itertools.pairwise(edges))
                ]
                expected.append(np.array(bars) / weight.sum())
            np.testing.assert_allclose(shares_of, np.mean(expected, axis=0), atol=1e-9)


# ---- the verdict


def _verdict(audited: Audited, **options: Any) -> dict[str, Any]:
    chosen = replace(FEW, **options)
    return verdict_section(attack_section(audited, chosen), audited, chosen)


MANY = {"forget": 900, "validation": 900, "retain": 30, "test": 30}


@pytest.mark.parametrize("retrained", [0, 2])
def test_models_that_never_saw_the_images_are_equivalent(retrained: int) -> None:
    audited = world(0, sizes={**MANY, "forget": 2200, "validation": 2200}, retrained=retrained)
    verdict = _verdict(audited)
    assert (verdict["answer"], verdict["direction"]) == ("equivalent", None)
    assert verdict["detectable"] < 0.05
    assert "may still tell them apart" in verdict["reason"]


@pytest.mark.parametrize("retrained", [0, 1, 2])
@pytest.mark.parametrize(("shift", "direction"), [(1.0, "remembers"), (-1.0, "over-forgets")])
@pytest.mark.parametrize("multi_label", [False, True])
def test_what_gives_the_images_away_is_named(multi_label: bool, shift: float, direction: str, retrained: int) -> None:
    audited = world(
        1, sizes={**MANY, "forget": 150, "validation": 150}, retrained=retrained, shift=(2, shift, 0),
        multi_label=multi_label,
    )  # fmt: skip
    verdict = _verdict(audited)
    assert (verdict["answer"], verdict["direction"]) == ("different", direction)
    assert ("+" if shift > 0 else "−") in verdict["reason"] or "classifier" in verdict["reason"]


def test_a_yardstick_other_than_a_half_is_what_counts() -> None:
    """The forget set is hard for every model that never saw it; the unlearned one does as they do."""
    audited = world(2, sizes={**MANY, "forget": 1500, "validation": 1500}, retrained=2, shift=(2, -1, -1))
    section = attack_section(audited, FEW)
    assert section["population"]["log_odds"]["models"]["unlearned"]["auc"] < 0.4
    assert verdict_section(section, audited, FEW)["answer"] != "different"
    alone = replace(audited, retrained=[])
    assert _verdict(alone)["answer"] == "different"
    assert _verdict(alone, comparable=False)["answer"] == "not comparable"
    assert _verdict(audited, comparable=False)["answer"] != "not comparable"
    easy = world(2, sizes={**MANY, "forget": 1500, "validation": 1500}, retrained=2, shift=(2, -0.2, -1))
    assert _verdict(easy)["direction"] == "remembers"


def _alike(random: np.random.Generator, kind: str, split: str, logits: np.ndarray) -> np.ndarray:
    """An unlearned model that has all forget images at one probability, in the middle of what others have."""
    if kind != "unlearned" or split != "forget":
        return logits
    return [1.2, 0] + 0.05 * random.normal(size=logits.shape)


def test_over_forgetting_that_only_the_fitted_attack_sees() -> None:
    sizes = {**MANY, "forget": 300, "validation": 300}
    # All images are of the first class, of which every other model has as many below 1.2 as above.
    audited = world(3, sizes=sizes, classes=2, retrained=2, own=_alike)
    first = {s: np.flatnonzero(audited.original[s].labels == 0) for s in ("forget", "validation")}
    audited = rows_of(audited, first)
    section = attack_section(audited, FEW)
    for kind in KINDS:
        assert section["population"][kind]["difference"]["answer"] != "different"
    assert section["population"]["classifier"]["difference"]["low_95"] > 0.1
    section["ratio"] = None
    verdict = verdict_section(section, audited, FEW)
    assert verdict["answer"] == "different"
    assert "classifier" in verdict["reason"]
    main = section["population"]["log_odds"]["difference"]["difference"]
    assert verdict["direction"] == ("remembers" if main > 0 else "over-forgets")


def test_few_images_are_inconclusive_where_the_original_shows() -> None:
    verdict = _verdict(world(0, sizes={"forget": 40, "validation": 40}, shift=(3, 0, 0), retrained=2))
    assert (verdict["answer"], verdict["direction"]) == ("inconclusive", None)
    assert "more images or patients would be needed" in verdict["reason"]
    assert verdict["detectable"] > 0.05


def test_an_attack_that_does_not_see_the_original_is_powerless() -> None:
    verdict = _verdict(world(0, shift=(0, 0, 0), retrained=2))
    assert (verdict["answer"], verdict["direction"]) == ("powerless", None)
    assert "can't tell even the original" in verdict["reason"]
    assert verdict["detectable"] > 0.05


@pytest.mark.parametrize("retrained", [0, 1])
@pytest.mark.parametrize("case", ["one image", "one patient", "one unseen patient"])
def test_one_image_or_one_patient_is_powerless(case: str, retrained: int) -> None:
    audited = world(0, patients=True, retrained=retrained, shift=(9, 9, 0))
    if case == "one image":
        audited = rows_of(audited, {"forget": np.arange(1)})
    elif case == "one patient":
        audited.facts["forget"].people[:] = 3
    else:
        audited.facts["validation"].people[:] = 3
    section = attack_section(audited, FEW)
    verdict = verdict_section(section, audited, FEW)
    assert verdict["answer"] == "powerless"
    assert "fewer than two" in verdict["reason"]
    assert verdict["direction"] is verdict["detectable"] is None
    entry = section["population"]["log_odds"]
    assert 0 <= entry["models"]["unlearned"]["auc"] <= 1
    assert entry["difference"]["answer"] is None
    assert np.isnan(entry["difference"]["low_95"])


# The rules themselves, on figures that were made up.


def _made_up(answers: Mapping[str, tuple[str | None, float, float]], detected: bool) -> dict[str, Any]:
    def entry(answer: str | None, difference: float, p: float) -> dict[str, Any]:
        ends = {"low_95": difference - 0.01, "high_95": difference + 0.01}
        return {"difference": {"answer": answer, "difference": difference, "p": p, "detectable": 0.03, **ends}}

    entries = {name: entry(*values) for name, values in answers.items()}
    single = {name: entries.get(name) for name in ("patient", "ratio", "u_lira")}
    population = {name: found for name, found in entries.items() if name not in single}
    return {"population": population, **single, "sanity": {"original": {"detected": detected}}}


CALM = {"log_odds": ("equivalent", 0.01, 0.5), "loss": ("equivalent", 0.0, 0.9)}


@pytest.mark.parametrize(
    ("change", "detected", "expected"),
    [
        ({}, True, ("equivalent", None)),
        ({}, False, ("powerless", None)),
        ({"patient": ("inconclusive", 0.1, 0.2)}, True, ("inconclusive", None)),
        ({"patient": ("inconclusive", 0.1, 0.2)}, False, ("powerless", None)),
        ({"patient": ("different", 0.2, 0.002)}, True, ("different", "remembers")),
        ({"ratio": ("different", -0.2, 0.002)}, False, ("different", "over-forgets")),
        # 2 % in one of three attacks is what chance does.
        ({"u_lira": ("different", 0.2, 0.02)}, True, ("inconclusive", None)),
        # Surely not 0, and surely small.
        ({"loss": ("equivalent", 0.02, 0.002)}, True, ("equivalent", None)),
        # The fitted attack does not tell which way: the main attack does.
        ({"classifier": ("different", 0.3, 0.002), "log_odds": ("inconclusive", -0.01, 0.5)}, True,
         ("different", "over-forgets")),
        # The strongest attack tells.
        ({"ratio": ("different", 0.3, 0.002), "patient": ("different", -0.2, 0.002)}, True, ("different", "remembers")),
        # What has no interval does not count.
        ({"patient": (None, 0.4, float("nan"))}, True, ("equivalent", None)),
        ({"patient": ("inconclusive", 0.4, float("nan"))}, True, ("inconclusive", None)),
    ],
)  # fmt: skip
def test_the_verdict_follows_its_rules(change: dict, detected: bool, expected: tuple) -> None:
    audited = world(0, retrained=2)
    verdict = verdict_section(_made_up({**CALM, **change}, detected), audited, FEW)
    assert (verdict["answer"], verdict["direction"]) == expected
    alone = replace(audited, retrained=[])
    again = verdict_section(_made_up({**CALM, **change}, detected), alone, FEW)
    assert (again["answer"], again["direction"]) == expected
    never = verdict_section(_made_up({**CALM, **change}, detected), alone, replace(FEW, comparable=False))
    assert (never["answer"], never["direction"]) == ("not comparable", None)


def test_the_attacks_are_not_changed_by_the_verdict() -> None:
    audited = world(0)
    section = attack_section(audited, FEW)
    before = copy.deepcopy(section)
    verdict_section(section, audited, FEW)
    assert _identical(section, before)
