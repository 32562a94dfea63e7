"""The population attack, against scikit-learn, closed forms and slow loops, and how often it raises a false alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, mannwhitneyu, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc as area
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from monai_unlearn.metrics import (
    AttackFigures,
    Sides,
    attack,
    attack_auc,
    attack_figures,
    attack_roc,
    cross_fitted_scores,
    detectable_difference,
    interval,
    matching_weights,
    resampled_counts,
)

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=100)
FEWER = settings(PROPERTIES, max_examples=40)
NAN = float("nan")
TPR = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}
FIGURES = ["auc", "balanced_accuracy", *TPR]
# A few whole numbers, so that ties are common.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30).map(np.array)
STRATA = st.lists(st.sampled_from("abcd"), min_size=1, max_size=30).map(np.array)


def _draw(seed: int, n: int = 40, m: int = 50, shift: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(shift, 1, n), random.normal(0, 1, m)


def _equal(one: AttackFigures, other: AttackFigures) -> None:
    assert list(one.values) == list(other.values) == FIGURES
    assert list(one.resampled) == list(other.resampled)
    for name in one.values:
        np.testing.assert_allclose(one.values[name], other.values[name], atol=1e-12)
    for name in one.resampled:
        np.testing.assert_allclose(one.resampled[name], other.resampled[name], atol=1e-12)


# The AUC alone


@PROPERTIES
@given(SCORES, SCORES)
def test_the_auc_is_scikit_learns_and_swapping_mirrors_it(members: np.ndarray, others: np.ndarray) -> None:
    auc = attack_auc(members, others)
    truth = np.repeat([1, 0], [len(members), len(others)])
    assert auc == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])), abs=1e-12)
    assert attack_auc(others, members) == pytest.approx(1 - auc, abs=1e-12)
    assert auc == pytest.approx(np.mean([(m > o) + (m == o) / 2 for m in members for o in others]), abs=1e-12)


@PROPERTIES
@given(SCORES, SCORES)
def test_only_the_order_of_the_scores_matters(members: np.ndarray, others: np.ndarray) -> None:
    assert attack_auc(np.exp(members), np.exp(others)) == attack_auc(members, others)


def test_a_higher_score_means_a_member() -> None:
    assert attack_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert attack_auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0
    assert attack_auc(np.zeros(4), np.zeros(7)) == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_two_gaussians_have_the_auc_of_the_closed_form(shift: float) -> None:
    random = np.random.default_rng(0)
    n = 20_000
    found = attack_auc(random.normal(shift, 1, n), random.normal(0, 1, n))
    assert found == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=5 * math.sqrt(1 / (6 * n)))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_without_samples_there_is_no_auc(n: int, m: int) -> None:
    assert math.isnan(attack_auc(np.zeros(n), np.zeros(m)))


def test_samples_without_a_score_are_left_out() -> None:
    members, others = _draw(3)
    known = [np.arange(len(scores)) % 4 > 0 for scores in (members, others)]
    holed = [np.where(keep, scores, NAN) for keep, scores in zip(known, (members, others))]
    assert attack_auc(*holed) == attack_auc(members[known[0]], others[known[1]])
    assert math.isnan(attack_auc(np.full(4, NAN), others))
    assert math.isnan(attack_auc(members, np.full(4, NAN)))


# Matching and the ROC curve


@PROPERTIES
@given(STRATA, STRATA)
def test_matched_non_members_have_the_members_shares_of_each_stratum(ours: np.ndarray, theirs: np.ndarray) -> None:
    members, others = matching_weights(ours, theirs)
    assert members.tolist() == [float(stratum in theirs) for stratum in ours]
    assert others.tolist() == pytest.approx([(ours == stratum).sum() / (theirs == stratum).sum() for stratum in theirs])
    assert others.sum() == pytest.approx(members.sum())
    for stratum in "abcd":
        assert others[theirs == stratum].sum() == pytest.approx(members[ours == stratum].sum())
    if set(theirs) == {theirs[0]} and set(ours) == set(theirs):
        np.testing.assert_allclose(others, len(ours) / len(theirs))


@PROPERTIES
@given(SCORES, SCORES, st.data())
def test_the_roc_curve_is_scikit_learns(members: np.ndarray, others: np.ndarray, data: st.DataObject) -> None:
    weights = None
    if data.draw(st.booleans()):
        weights = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(others), max_size=len(others)))) / 3
    truth, scores = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    weighted = np.concatenate([np.ones(len(members)), np.ones(len(others)) if weights is None else weights])
    fpr, tpr, _ = roc_curve(truth, scores, sample_weight=weighted, drop_intermediate=False)
    found = attack_roc(members, others, weights)
    np.testing.assert_allclose(found[0], fpr, atol=1e-12)
    np.testing.assert_allclose(found[1], tpr, atol=1e-12)
    assert found[0][0] == found[1][0] == 0
    assert found[0][-1] == found[1][-1] == 1
    expected = roc_auc_score(truth, scores, sample_weight=weighted)
    assert area(*found) == pytest.approx(expected, abs=1e-12)


# Figures, one by one


def _slow_figures(
    members: np.ndarray, others: np.ndarray, strata: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, float]:
    """AUC and true positive rates by scikit-learn, each sample weighted; NaN where nobody is matched."""
    ours, theirs = np.ones(len(members)), np.ones(len(others))
    if strata is not None:
        ours, theirs = matching_weights(*strata)
    if not ours.any() or not theirs.any():
        return dict.fromkeys(("auc", *TPR), NAN)
    truth, scores = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    weights = np.concatenate([ours, theirs])
    kept = weights > 0
    fpr, tpr, _ = roc_curve(truth[kept], scores[kept], sample_weight=weights[kept], drop_intermediate=False)
    found = {"auc": roc_auc_score(truth[kept], scores[kept], sample_weight=weights[kept])}
    for name, rate in TPR.items():
        # A rounding error must not forbid the rate itself.
        found[name] = tpr[fpr <= rate + 1e-9].max() if (theirs > 0).sum() >= round(1 / rate) else NAN
    return found


@PROPERTIES
@given(SCORES, SCORES, st.booleans(), st.data())
def test_figures_of_few_samples_are_scikit_learns(
    members: np.ndarray, others: np.ndarray, matched: bool, data: st.DataObject
) -> None:
    """With ties, and with strata of which one side has none."""
    strata = None
    if matched:
        of = [st.lists(st.sampled_from("abcd"), min_size=len(side), max_size=len(side)) for side in (members, others)]
        strata = np.array(data.draw(of[0])), np.array(data.draw(of[1]))
    sides = Sides() if strata is None else Sides(None, None, *strata)
    found = attack_figures(members[None], others[None], sides, resamples=0).values
    for name, expected in _slow_figures(members, others, strata).items():
        assert found[name].shape == (1,)
        assert found[name][0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@FEWER
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([99, 100, 137, 200, 999, 1000, 1850]), st.booleans())
def test_true_positive_rates_at_low_false_positive_rates_are_scikit_learns(
    seed: int, n: int, m: int, ties: bool
) -> None:
    random = np.random.default_rng(seed)
    members, others = random.normal(1.5, 1, n), random.normal(0, 1, m)
    if ties:
        members, others = members.round(1), others.round(1)
    strata = random.integers(3, size=n), random.integers(4, size=m)
    for chosen in (None, strata):
        sides = Sides() if chosen is None else Sides(None, None, *chosen)
        found = attack_figures(members[None], others[None], sides, resamples=0).values
        for name, expected in _slow_figures(members, others, chosen).items():
            assert found[name][0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_threshold_with_just_the_rate_is_allowed_however_weights_are_rounded() -> None:
    """One per cent of the non-members of each stratum, and no more, score above all members."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        kinds = random.integers(2, 6)
        sizes = 100 * (1 + random.multinomial(100 - kinds, np.ones(kinds) / kinds))
        others = np.concatenate([1 + random.random(size) - (np.arange(size) >= size // 100) for size in sizes])
        theirs = np.repeat(np.arange(kinds), sizes)
        ours = np.concatenate([np.arange(kinds), random.integers(kinds, size=31)])
        sides = Sides(None, None, ours, theirs)
        for score, expected in ((1.0, 1), (np.sort(others)[:-100].max() - 1e-9, 0)):
            found = attack_figures(np.full((1, len(ours)), score), others[None], sides, resamples=0)
            assert found.values["tpr_at_1_percent"][0] == expected


def test_non_members_that_match_nobody_do_not_count_for_a_low_rate() -> None:
    random = np.random.default_rng(0)
    members, others = random.normal(1, 1, 50), random.normal(0, 1, 500)
    theirs = np.repeat(["a", "b"], [90, 410])
    found = attack_figures(members[None], others[None], Sides(None, None, np.repeat(["a"], 50), theirs)).values
    assert math.isnan(found["tpr_at_1_percent"][0])
    assert found["auc"][0] == pytest.approx(attack_auc(members, others[:90]))


def _folds(groups: tuple[np.ndarray, np.ndarray], seed: int) -> list[np.ndarray]:
    """Five folds of whole groups on each side, from the seed."""
    random = np.random.default_rng(seed)
    return [random.permutation(len(np.unique(group)))[group] % 5 for group in groups]


def _slow_guesses(
    members: np.ndarray,
    others: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    groups: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> list[np.ndarray]:
    """For each fold try every threshold between two scores of the other folds, and apply the best to the fold."""
    folds = _folds(groups, seed)
    guesses = [np.full(len(members), NAN), np.full(len(others), NAN)]
    for fold in range(5):
        fit = [part != fold for part in folds]
        if not weights[0][fit[0]].any() or not weights[1][fit[1]].any():
            continue
        values = np.unique(np.concatenate([members[fit[0]], others[fit[1]]]))
        best = None
        for threshold in [*((values[1:] + values[:-1]) / 2)[::-1], values[0]]:
            hits, alarms = (
                np.average(scores[rows] >= threshold, weights=weight[rows])
                for scores, rows, weight in zip((members, others), fit, weights)
            )
            if best is None or hits - alarms > best[0] + 1e-12:
                best = hits - alarms, threshold
        # Above all scores there is none to try: as good as below all of them.
        for guess, scores, rows in zip(guesses, (members, others), fit):
            guess[~rows] = scores[~rows] >= best[1]
    return guesses


def _balanced_accuracy(guesses: list[np.ndarray], weights: tuple[np.ndarray, np.ndarray]) -> float:
    if any(np.isnan(guess).any() for guess in guesses):
        return NAN
    truth, kept = np.repeat([1, 0], [len(side) for side in guesses]), np.concatenate(weights) > 0
    return balanced_accuracy_score(
        truth[kept], np.concatenate(guesses)[kept], sample_weight=np.concatenate(weights)[kept]
    )


@st.composite
def _attacks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...] | None]:
    """Scores of two attacks, numbers of groups in order of appearance, and strata or none."""
    n, m, seed = draw(st.integers(2, 14)), draw(st.integers(2, 14)), draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    members, others = random.normal(0.7, 1, (2, n)).round(draw(st.integers(0, 3))), random.normal(0, 1, (2, m)).round(1)
    groups = tuple(
        np.sort(random.integers(max(1, size // 2), size=size)) if draw(st.booleans()) else np.arange(size)
        for size in (n, m)
    )
    groups = tuple(np.unique(group, return_inverse=True)[1] for group in groups)
    strata = None
    if draw(st.booleans()):
        strata = random.choice(["a", "b", "c"], n), random.choice(["a", "b"], m)
    return members, others, groups, strata


@FEWER
@given(_attacks(), st.integers(0, 5))
def test_all_figures_and_their_resamples_are_those_of_a_slow_loop(case: tuple, seed: int) -> None:
    """The same draws of whole groups, written out sample by sample and weighted anew."""
    members, others, groups, strata = case
    n, m = members.shape[1], others.shape[1]
    sides = Sides(*groups, *(strata or (None, None)))
    found = attack_figures(members, others, sides, resamples=5, seed=seed)

    def weights_of(rows: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if strata is None:
            return np.ones(len(rows[0])), np.ones(len(rows[1]))
        return matching_weights(strata[0][rows[0]], strata[1][rows[1]])

    everyone = np.arange(n), np.arange(m)
    whole = weights_of(everyone)
    guesses = [_slow_guesses(*pair, whole, groups, seed) for pair in zip(members, others)]

    def figures(rows: tuple[np.ndarray, np.ndarray], k: int) -> dict[str, float]:
        chosen = None if strata is None else (strata[0][rows[0]], strata[1][rows[1]])
        expected = _slow_figures(members[k][rows[0]], others[k][rows[1]], chosen)
        weights = weights_of(rows)
        usable = weights[0].any() and weights[1].any()
        drawn = [guess[row] for guess, row in zip(guesses[k], rows)]
        undefined = any(np.isnan(guess).any() for guess in guesses[k])
        expected["balanced_accuracy"] = NAN if undefined or not usable else _balanced_accuracy(drawn, weights)
        return expected

    for k in range(2):
        for name, expected in figures(everyone, k).items():
            assert found.values[name][k] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    sizes = [len(np.unique(group)) for group in groups]
    if min(sizes) < 2 or not whole[0].any():
        assert found.resampled == {}
        return
    seeds = np.random.SeedSequence(seed).spawn(2)
    counts = [
        np.concatenate(list(resampled_counts(size, 5, np.random.default_rng(s)))).astype(int)
        for size, s in zip(sizes, seeds)
    ]
    for r in range(5):
        rows = tuple(np.repeat(np.arange(len(group)), side[r][group]) for group, side in zip(groups, counts))
        for k in range(2):
            for name, expected in figures(rows, k).items():
                if name in TPR:  # whether it is defined depends on the samples themselves, not on the draw
                    expected = NAN
                assert found.resampled[name][r, k] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("matched", [False, True])
def test_resampled_true_positive_rates_are_those_of_a_slow_loop(matched: bool) -> None:
    random = np.random.default_rng(5)
    members, others = random.normal(1.5, 1, 80).round(2), random.normal(0, 1, 1200).round(2)
    groups = np.sort(random.integers(30, size=80)), np.sort(random.integers(400, size=1200))
    groups = tuple(np.unique(group, return_inverse=True)[1] for group in groups)
    strata = (random.integers(3, size=80), random.integers(3, size=1200)) if matched else None
    found = attack_figures(members[None], others[None], Sides(*groups, *(strata or (None, None))), 20, seed=2).resampled
    seeds = np.random.SeedSequence(2).spawn(2)
    counts = [
        next(resampled_counts(int(group.max()) + 1, 20, np.random.default_rng(s))).astype(int)
        for group, s in zip(groups, seeds)
    ]
    for r in range(20):
        rows = [np.repeat(np.arange(len(group)), side[r][group]) for group, side in zip(groups, counts)]
        chosen = None if strata is None else (strata[0][rows[0]], strata[1][rows[1]])
        expected = _slow_figures(members[rows[0]], others[rows[1]], chosen)
        assert expected["tpr_at_1_percent"] > expected["tpr_at_0.1_percent"]
        for name, value in expected.items():
            assert found[name][r, 0] == pytest.approx(value, abs=1e-12)


def test_resamples_come_in_pieces_without_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    members, others = np.stack([_draw(0)[0]] * 2), np.stack([_draw(0)[1]] * 2)
    sides = Sides(np.arange(40) // 2, None, np.arange(40) % 3, np.arange(50) % 3)
    whole = attack_figures(members, others, sides, resamples=23)
    monkeypatch.setattr(attack, "CELLS", 500)
    _equal(attack_figures(members, others, sides, resamples=23), whole)


# What they mean


def test_identical_models_do_not_differ_in_any_resample() -> None:
    members, others = _draw(0)
    sides = Sides(np.arange(40) // 3, np.arange(50) // 4, np.arange(40) % 3, np.arange(50) % 3)
    found = attack_figures(np.stack([members, members + 5]), np.stack([others, others + 5]), sides, 200)
    for name in ("auc", "balanced_accuracy"):
        np.testing.assert_array_equal(found.values[name][0], found.values[name][1])
        np.testing.assert_array_equal(found.resampled[name][:, 0], found.resampled[name][:, 1])
        assert found.resampled[name].std() > 0


def test_attacks_are_resampled_alike_whatever_their_company() -> None:
    one, two = _draw(0), _draw(1)
    both = attack_figures(np.stack([one[0], two[0]]), np.stack([one[1], two[1]]), resamples=50)
    for k, alone in enumerate((one, two)):
        found = attack_figures(alone[0][None], alone[1][None], resamples=50)
        for name in ("auc", "balanced_accuracy"):
            np.testing.assert_array_equal(found.resampled[name][:, 0], both.resampled[name][:, k])


def test_swapping_sides_or_the_sign_mirrors_the_auc() -> None:
    members, others = _draw(1)
    sides = Sides(np.arange(40) // 3, np.arange(50) // 4)
    found = attack_figures(members[None], others[None], sides, 100)
    swapped = attack_figures(others[None], members[None], Sides(sides.non_member_groups, sides.member_groups), 100)
    assert swapped.values["auc"][0] == pytest.approx(1 - found.values["auc"][0], abs=1e-12)
    negative = attack_figures(-members[None], -others[None], sides, 100)
    np.testing.assert_allclose(negative.resampled["auc"], 1 - found.resampled["auc"], atol=1e-12)
    low, high = interval(found.resampled["auc"][:, 0])
    np.testing.assert_allclose(interval(negative.resampled["auc"][:, 0]), [1 - high, 1 - low], atol=1e-12)


def test_separated_and_constant_scores_by_hand() -> None:
    separated = attack_figures(np.arange(5.0, 25)[None], np.arange(-200.0, 0)[None], resamples=20)
    constant = attack_figures(np.zeros((1, 20)), np.zeros((1, 200)), resamples=20)
    for figures, expected in ((separated, [1, 1, 1]), (constant, [0.5, 0.5, 0])):
        for name, value in zip(("auc", "balanced_accuracy", "tpr_at_1_percent"), expected):
            assert figures.values[name].tolist() == [value]
            np.testing.assert_array_equal(figures.resampled[name], value)
        assert math.isnan(figures.values["tpr_at_0.1_percent"][0])


def test_copies_of_an_image_add_nothing_when_they_are_grouped_by_patient() -> None:
    members, others = _draw(2)
    strata = np.arange(40) % 2, np.arange(50) % 2
    plain = attack_figures(members[None], others[None], Sides(None, None, *strata))
    copies = [np.repeat(part, 9) for part in (members, others, *strata)]
    patients = [np.repeat([f"{side}{i:03d}" for i in range(n)], 9) for side, n in (("m", 40), ("v", 50))]
    grouped = attack_figures(copies[0][None], copies[1][None], Sides(*patients, *copies[2:]))
    for name in ("auc", "balanced_accuracy"):
        np.testing.assert_allclose(grouped.values[name], plain.values[name], atol=1e-12)
        np.testing.assert_allclose(grouped.resampled[name], plain.resampled[name], atol=1e-12)
    naive = attack_figures(copies[0][None], copies[1][None], Sides(None, None, *copies[2:]))
    assert grouped.resampled["auc"].std() > 2 * naive.resampled["auc"].std()


def test_what_members_were_chosen_by_tells_nothing_once_non_members_are_matched_by_it() -> None:
    """Scores depend on the class alone, and members are mostly of one."""
    random = np.random.default_rng(0)
    ours, theirs = random.choice(3, 300, p=[0.8, 0.1, 0.1]), random.choice(3, 500)
    members, others = 2.0 * ours + random.normal(size=300), 2.0 * theirs + random.normal(size=500)
    plain = attack_figures(members[None], others[None], resamples=200)
    matched = attack_figures(members[None], others[None], Sides(None, None, ours, theirs), 200)
    assert plain.values["auc"][0] < 0.35
    low, high = interval(matched.resampled["auc"][:, 0], 0.99)
    assert low < 0.5 < high
    assert matched.values["balanced_accuracy"][0] == pytest.approx(0.5, abs=0.07)


def test_no_sample_fits_its_own_threshold() -> None:
    """On noise the balanced accuracy is ½ on average, where thresholds tried on what they were fitted on find more.

    So do those of folds that split patients whose images all score the same.
    """
    found: dict[str, list[float]] = {"images": [], "patients": [], "split patients": [], "fitted": []}
    for seed in range(200):
        members, others = _draw(seed, 7, 9, 0)
        people = np.repeat(np.arange(7), 8), np.repeat(np.arange(9), 8)
        copies = members[people[0]][None], others[people[1]][None]
        for name, (ours, theirs), sides in (
            ("images", (members[None], others[None]), None),
            ("patients", copies, Sides(*people)),
            ("split patients", copies, None),
        ):
            values = attack_figures(ours, theirs, sides, 0, seed).values
            found[name].append(values["balanced_accuracy"][0])
        fpr, tpr = attack_roc(members, others)
        found["fitted"].append((tpr - fpr).max() / 2 + 0.5)
    for name in ("images", "patients"):
        assert np.mean(found[name]) == pytest.approx(0.5, abs=3.3 * np.std(found[name]) / math.sqrt(200))
    assert np.mean(found["split patients"]) > 0.6
    assert np.mean(found["fitted"]) > 0.6


def test_what_is_undefined_is_not_a_number() -> None:
    nothing = attack_figures(np.zeros((2, 0)), np.zeros((2, 5)))
    unmatched = attack_figures(np.ones((2, 3)), np.zeros((2, 4)), Sides(None, None, np.zeros(3), np.ones(4)))
    for found in (nothing, attack_figures(np.zeros((2, 5)), np.zeros((2, 0))), unmatched):
        assert list(found.values) == FIGURES
        assert all(np.isnan(value).all() and value.shape == (2,) for value in found.values.values())
        assert found.resampled == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("n", "m", "groups"),
    [
        (1, 9, (None, None)),
        (9, 1, (None, None)),
        (1, 1, (None, None)),
        (4, 9, (np.array(["a"] * 4), None)),
        (4, 9, (None, np.zeros(9))),
    ],
)
def test_one_sample_or_one_patient_has_an_auc_but_no_interval(n: int, m: int, groups: tuple) -> None:
    members, others = _draw(0, n, m)
    found = attack_figures(members[None], others[None], Sides(*groups))
    assert found.values["auc"][0] == attack_auc(members, others)
    assert math.isnan(found.values["balanced_accuracy"][0])  # there is nobody to fit its threshold on
    assert found.resampled == {}


@pytest.mark.filterwarnings("error")
def test_a_stratum_that_a_resample_misses_has_no_figure_there() -> None:
    """One non-member of the only common stratum: it is left out of a third of the resamples, too many to say."""
    sides = Sides(None, None, np.repeat(["a", "b"], [5, 15]), np.repeat(["a", "c"], [1, 29]))
    found = attack_figures(*(side[None] for side in _draw(0, 20, 30)), sides, 300)
    share = np.isnan(found.resampled["auc"]).mean()
    assert share == pytest.approx((29 / 30) ** 30, abs=0.12)
    assert np.isnan(interval(found.resampled["auc"][:, 0])).all()
    assert not np.isnan(found.values["auc"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member_strata": np.zeros(2), "non_member_strata": np.zeros(4)}, "strata should be those of 3 members and 4"),
        ({"member_strata": np.zeros(3), "non_member_strata": np.zeros(5)}, "but are 3 and 5"),
        ({"member_groups": np.zeros(2)}, "groups should name the group of each of 3 samples, but got 2"),
        ({"non_member_groups": np.zeros(5)}, "groups should name the group of each of 4 samples, but got 5"),
    ],
)
def test_sides_of_other_samples_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack_figures(np.zeros((1, 3)), np.zeros((1, 4)), Sides(**change))


@pytest.mark.parametrize("side", [0, 1])
def test_scores_that_are_no_numbers_are_refused(side: int) -> None:
    scores = [np.zeros((2, 4)), np.zeros((2, 5))]
    scores[side][1, 2] = NAN
    with pytest.raises(ValueError, match=r"scores should be numbers, but some are NaN\. Leave out samples"):
        attack_figures(*scores)


def test_the_same_seed_gives_the_same_figures_and_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    sides = [side[None] for side in _draw(0)]
    one, two, other = (attack_figures(*sides, resamples=30, seed=seed) for seed in (0, 0, 1))
    _equal(one, two)
    assert (one.resampled["auc"] != other.resampled["auc"]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_members_and_non_members_are_resampled_on_their_own() -> None:
    """The same draws for both sides, where both have as many samples, would tie them together."""
    scores = np.random.default_rng(0).normal(size=60)
    found = attack_figures(scores[None], scores[None], resamples=2000).resampled["auc"][:, 0]
    assert found.std() == pytest.approx(math.sqrt(121 / (12 * 60 * 60)), rel=0.1)


# How often intervals hold the truth, and raise a false alarm


def test_intervals_cover_the_closed_form_as_often_as_they_say() -> None:
    """Two Gaussians, with their AUC and their true positive rate at 1 % false positives."""
    shift, draws, level = 1.5, 240, 0.9
    truth = {"auc": norm.cdf(shift / math.sqrt(2)), "tpr_at_1_percent": norm.sf(norm.isf(0.01) - shift)}
    covered = dict.fromkeys(truth, 0)
    for seed in range(draws):
        members, others = _draw(seed, 120, 1000, shift)
        found = attack_figures(members[None], others[None], resamples=200, seed=seed).resampled
        for name, value in truth.items():
            low, high = interval(found[name][:, 0], level)
            covered[name] += low <= value <= high
    low, high = binom.interval(0.999, draws, level)
    for hits in covered.values():
        assert low <= hits <= high


def test_intervals_of_a_paired_difference_cover_it_as_often_as_they_say() -> None:
    """Two models whose scores go together, on patients with several images each."""
    draws, level, covered = 240, 0.9, 0
    truth = norm.cdf(1 / math.sqrt(2 * 2.25)) - norm.cdf(0.5 / math.sqrt(2 * 2.25))
    for seed in range(draws):
        random = np.random.default_rng(seed)
        rows = []
        for patients, member in ((50, True), (70, False)):
            people = np.repeat(np.arange(patients), random.integers(1, 6, size=patients))
            common = random.normal(size=patients)[people] + random.normal(0, 1, len(people))
            noise = random.normal(0, 0.5, (2, len(people)))
            rows.append((common + noise + member * np.array([[1.0], [0.5]]), people))
        found = attack_figures(rows[0][0], rows[1][0], Sides(rows[0][1], rows[1][1]), 200, seed).resampled["auc"]
        low, high = interval(found[:, 0] - found[:, 1], level)
        covered += low <= truth <= high
    low, high = binom.interval(0.999, draws, level)
    assert low <= covered <= high


@pytest.mark.parametrize("kind", ["images", "patients", "classes", "patients and classes"])
def test_held_out_samples_raise_as_many_false_alarms_as_they_should(kind: str) -> None:
    """Both sides are drawn from one pool of unseen samples: neither attack, nor their difference, should find any."""
    random, draws = np.random.default_rng(1), 500
    people = np.arange(400)
    if "patients" in kind:
        sizes = random.integers(1, 8, size=100)
        people = np.repeat(np.arange(100), sizes)
    n = len(people)
    common = random.standard_t(4, size=people.max() + 1)[people] + ("patients" in kind) * random.normal(size=n)
    scores = common + random.normal(0, 0.5, (2, n))
    classes = None
    if "classes" in kind:
        classes = random.choice(4, n, p=[0.55, 0.25, 0.15, 0.05])
        scores = scores + 0.7 * classes
    alarms = np.zeros(2, dtype=int)
    for seed in range(draws):
        order = random.permutation(people.max() + 1)
        quarter = len(order) // 4
        forget, unseen = (np.isin(people, part) for part in (order[:quarter], order[quarter : 5 * quarter // 2]))
        strata = (None, None) if classes is None else (classes[forget], classes[unseen])
        sides = Sides(people[forget], people[unseen], *strata)
        found = attack_figures(scores[:, forget], scores[:, unseen], sides, 200, seed).resampled["auc"]
        for k, (values, nothing) in enumerate(((found[:, 0], 0.5), (found[:, 0] - found[:, 1], 0))):
            low, high = interval(values)
            alarms[k] += not low <= nothing <= high
    low, high = binom.interval(0.999, draws, 0.05)
    assert all(low <= count <= high for count in alarms)


# Attacks that are fitted


def _sides_of(kind: str, n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray, Sides]:
    random = np.random.default_rng(seed)
    groups = (np.arange(n), np.arange(m)) if kind == "plain" else (np.arange(n) // 3, np.arange(m) // 2)
    strata = (random.integers(3, size=n), random.integers(2, size=m)) if kind == "strata" else (None, None)
    return random.normal(0.4, 1, (n, 3)), random.normal(0, 1, (m, 3)), Sides(*groups, *strata)


@pytest.mark.parametrize("kind", ["plain", "grouped", "strata"])
def test_fitted_scores_are_those_of_a_slow_loop(kind: str) -> None:
    """For each fold a logistic regression on the others, or those before; its values as ranks among what it saw."""
    ours, theirs, sides = _sides_of(kind, 31, 44, 1)
    found = np.concatenate(cross_fitted_scores(ours, theirs, sides, seed=3))
    x, truth = np.concatenate([ours, theirs]), np.repeat([1, 0], [31, 44])
    folds = np.concatenate(_folds((sides.member_groups, sides.non_member_groups), 3))
    weights = np.concatenate(sides.weights(31, 44))
    expected = np.full(75, NAN)
    for i in range(75):
        seen = folds < folds[i]
        if not seen.any():
            continue
        scaled = (x - x[seen].mean(0)) / x[seen].std(0)
        weight = np.where(truth == 1, weights / weights[seen & (truth == 1)].sum(), 0)
        weight = np.where(truth == 0, weights / weights[seen & (truth == 0)].sum(), weight) * seen.sum() / 2
        model = LogisticRegression(max_iter=1000).fit(scaled[seen], truth[seen], sample_weight=weight[seen])
        values = scaled @ model.coef_[0] + model.intercept_[0]
        expected[i] = np.mean(values[seen] < values[i])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(found).sum() == np.sum(folds == 0)


def test_a_fitted_attack_finds_nothing_in_noise() -> None:
    """However many features there are to fit, and with whole patients in a fold, whose images are alike."""
    aucs: dict[str, list[float]] = {"many": [], "patients": [], "split patients": []}
    for seed in range(30):
        random = np.random.default_rng(seed)
        ours, theirs = random.normal(size=(30, 15)), random.normal(size=(40, 15))
        people = np.repeat(np.arange(30), 4), np.repeat(np.arange(40), 4)
        copies = ours[people[0]], theirs[people[1]]
        found = [("many", (ours, theirs), Sides()), ("patients", copies, Sides(*people))]
        for name, features, sides in [*found, ("split patients", copies, Sides())][: 3 if seed < 5 else 2]:
            aucs[name].append(attack_auc(*cross_fitted_scores(*features, sides, seed)))
    for name in ("many", "patients"):
        assert np.mean(aucs[name]) == pytest.approx(0.5, abs=3.3 * np.std(aucs[name]) / math.sqrt(30))
    assert np.mean(aucs["split patients"]) > 0.6


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, 2.5])
def test_a_fitted_attack_on_shifted_scores_has_the_auc_of_the_closed_form(shift: float) -> None:
    """Whichever way they are shifted: lower scores of members, over-forgetting, are as telling."""
    members, others = _draw(0, 2500, 3500, shift)
    found = attack_auc(*cross_fitted_scores(members[:, None], others[:, None]))
    assert found == pytest.approx(norm.cdf(abs(shift) / math.sqrt(2)), abs=0.02)
    if shift < 0:
        assert attack_auc(members, others) < 0.3


def test_a_fitted_attack_sees_scores_that_vary_less() -> None:
    """The members' scores are neither higher nor lower, but all alike; a second kind of score shows it."""
    random = np.random.default_rng(0)
    members, others = random.normal(0, 0.3, 600), random.normal(0, 1, 800)
    assert attack_auc(members, others) == pytest.approx(0.5, abs=0.05)
    features = [np.column_stack([side, np.abs(side)]) for side in (members, others)]
    assert attack_auc(*cross_fitted_scores(*features)) > 0.7


def test_a_fitted_attack_does_not_tell_members_by_what_they_are_matched_by() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.choice(2, 400, p=[0.9, 0.1]), random.choice(2, 600)
    features = [(3.0 * side + random.normal(size=len(side)))[:, None] for side in (ours, theirs)]
    matched = Sides(None, None, ours, theirs)
    weights = np.concatenate(matched.weights(400, 600))
    truth = np.repeat([1, 0], [400, 600])
    scores = np.concatenate(cross_fitted_scores(*features, matched))
    scored = ~np.isnan(scores)
    auc = roc_auc_score(truth[scored], scores[scored], sample_weight=weights[scored])
    assert auc == pytest.approx(0.5, abs=0.06)
    assert attack_auc(*cross_fitted_scores(*features)) > 0.65


def test_a_fitted_attack_raises_as_many_false_alarms_as_it_should() -> None:
    """Fitted on the folds before; where samples help to score each other, there are three times as many."""
    draws, alarms, aucs = 500, 0, []
    for seed in range(draws):
        random = np.random.default_rng(seed)
        ours, theirs = random.normal(size=(40, 2)), random.normal(size=(50, 2))
        scores = cross_fitted_scores(ours, theirs, seed=seed)
        kept = [side[None, ~np.isnan(side)] for side in scores]
        found = attack_figures(*kept, resamples=200, seed=seed)
        low, high = interval(found.resampled["auc"][:, 0])
        alarms += not low <= 0.5 <= high
        aucs.append(found.values["auc"][0])
    assert np.mean(aucs) == pytest.approx(0.5, abs=3.3 * np.std(aucs) / math.sqrt(draws))
    low, high = binom.interval(0.999, draws, 0.05)
    assert low <= alarms <= high


@pytest.mark.parametrize(
    ("n", "m", "groups"),
    [
        (0, 3, (None, None)),
        (3, 0, (None, None)),
        (0, 0, (None, None)),
        (1, 5, (None, None)),
        (5, 1, (None, None)),
        (5, 5, (np.zeros(5), None)),
        (5, 5, (None, np.array(["a"] * 5))),
    ],
)
def test_nothing_can_be_fitted_on_one_sample_or_one_patient(n: int, m: int, groups: tuple) -> None:
    found = cross_fitted_scores(np.ones((n, 2)), np.zeros((m, 2)), Sides(*groups))
    assert [len(side) for side in found] == [n, m]
    assert all(np.isnan(side).all() for side in found)


def test_few_samples_and_constant_features_are_fitted_as_far_as_they_go() -> None:
    for n, m in ((2, 2), (2, 30), (3, 7)):
        found = cross_fitted_scores(np.ones((n, 2)), np.ones((m, 2)))
        assert [len(side) for side in found] == [n, m]
        known = np.concatenate(found)
        assert (known[~np.isnan(known)] == 0).all()
    unmatched = Sides(None, None, np.zeros(4), np.ones(6))
    found = cross_fitted_scores(np.ones((4, 1)), np.zeros((6, 1)), unmatched)
    assert all(np.isnan(side).all() for side in found)


# The smallest difference


@pytest.mark.parametrize(("n", "m"), [(31, 52), (5, 400), (1000, 1000)])
def test_the_detectable_difference_is_where_the_rank_test_turns_significant(n: int, m: int) -> None:
    """Found by shifting ranks until SciPy's test, without its correction for continuity, says 5 %."""
    random = np.random.default_rng(0)
    members, others = random.permutation(n) / n, random.permutation(m) / m
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        p = mannwhitneyu(members + middle, others, method="asymptotic", use_continuity=False).pvalue
        low, high = (middle, high) if p > 0.05 else (low, middle)
    found = attack_auc(members + high, others) - 0.5
    assert found == pytest.approx(detectable_difference(n, m), abs=1.5 / min(n, m))


def test_more_samples_show_smaller_differences_and_none_show_nothing() -> None:
    assert detectable_difference(100, 100) > detectable_difference(200, 100) > detectable_difference(200, 200)
    assert detectable_difference(7, 9) == detectable_difference(9, 7)
    assert detectable_difference(1, 1) == pytest.approx(0.98)
    assert math.isnan(detectable_difference(0, 5))
    assert math.isnan(detectable_difference(5, 0))


def test_unmoved_scores_exceed_the_detectable_difference_in_one_of_twenty_draws() -> None:
    random = np.random.default_rng(1)
    n, m, draws = 25, 40, 800
    beyond = sum(
        abs(attack_auc(random.normal(size=n), random.normal(size=m)) - 0.5) > detectable_difference(n, m)
        for _ in range(draws)
    )
    low, high = binom.interval(0.999, draws, 0.05)
    assert low <= beyond <= high
