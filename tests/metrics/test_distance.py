"""How far outputs are from the retrained model's, sample by sample."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import norm

from monai_unlearn.metrics import (
    activation_distance,
    agreement,
    forgetting_epsilon,
    forgetting_quality,
    forgetting_score,
    js_divergence,
    klom,
)

pytestmark = pytest.mark.filterwarnings("error")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 5e-324, 1e-300]), st.floats(0, 1))
OUTPUTS: list[Callable] = [js_divergence, activation_distance, agreement]


@st.composite
def _findings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return draw(arrays(np.float64, shape, elements=SHARES)), draw(arrays(np.float64, shape, elements=SHARES))


@st.composite
def _classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows of which some classes may be impossible."""
    rows = []
    for values in draw(_findings()):
        values[:, 0] += values.sum(1) < 0.01
        rows.append(values / values.sum(1, keepdims=True))
    return rows[0], rows[1]


@st.composite
def _scores(draw: st.DrawFn, elements: st.SearchStrategy) -> tuple[np.ndarray, np.ndarray]:
    samples = draw(st.integers(1, 4))
    shapes = [(draw(st.integers(2, 7)), samples) for _ in range(2)]
    return draw(arrays(np.float64, shapes[0], elements=elements)), draw(
        arrays(np.float64, shapes[1], elements=elements)
    )


SCORES = _scores(st.one_of(st.integers(-3, 3).map(float), st.floats(-120, 120, width=16)))


def _outputs(n: int, c: int = 8, seed: int = 0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(0, 3, (n, c)), axis=1)


# Outputs


@PROPERTIES
@given(_classes())
def test_the_divergence_is_the_square_of_scipys_distance(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = rows
    with np.errstate(all="ignore"):  # SciPy's is NaN for almost equal rows, and infinite where all but 0 meets 0
        expected = [np.nan_to_num(jensenshannon(a, b)) ** 2 for a, b in zip(np.maximum(p, 1e-200), q)]
    np.testing.assert_allclose(js_divergence(p, q), expected, rtol=1e-9, atol=1e-14)


@PROPERTIES
@given(_findings())
def test_the_divergence_of_findings_is_the_mean_over_each_as_a_question_of_two_answers(
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    p, q = rows
    expected = np.mean(
        [js_divergence(np.stack([a, 1 - a], 1), np.stack([b, 1 - b], 1)) for a, b in zip(p.T, q.T)], axis=0
    )
    np.testing.assert_allclose(js_divergence(p, q, multi_label=True), expected, rtol=1e-12, atol=1e-15)


@PROPERTIES
@given(_classes(), _findings())
def test_the_divergence_is_symmetric_within_its_range_and_zero_for_equal_rows(
    classes: tuple[np.ndarray, np.ndarray], findings: tuple[np.ndarray, np.ndarray]
) -> None:
    for (p, q), multi_label in ((classes, False), (findings, True)):
        found = js_divergence(p, q, multi_label)
        assert found.dtype == np.float64
        assert ((found >= 0) & (found <= np.log(2))).all()
        np.testing.assert_array_equal(js_divergence(q, p, multi_label), found)
        np.testing.assert_array_equal(js_divergence(p, p.copy(), multi_label), 0)


def test_the_divergence_of_closed_forms() -> None:
    p, q = np.array([[1.0, 0], [1, 0], [0.5, 0.5]]), np.array([[0.0, 1], [0.5, 0.5], [0.5, 0.5]])
    half = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - 0.5 * math.log(2)
    np.testing.assert_allclose(js_divergence(p, q), [math.log(2), half, 0], rtol=1e-14)
    found = js_divergence(np.array([[1.0, 1.0, 0.3]]), np.array([[0.0, 0.5, 0.3]]), multi_label=True)
    np.testing.assert_allclose(found, [(math.log(2) + half) / 3], rtol=1e-14)


@PROPERTIES
@given(_findings())
def test_the_activation_distance_is_the_euclidean_one(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = rows
    expected = [math.dist(a, b) for a, b in zip(p, q)]
    np.testing.assert_allclose(activation_distance(p, q), expected, rtol=1e-12, atol=1e-150)
    np.testing.assert_array_equal(activation_distance(p, p), 0)
    np.testing.assert_array_equal(activation_distance(q, p), activation_distance(p, q))


@PROPERTIES
@given(_findings())
def test_agreement_of_findings_is_counted_by_a_loop(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = rows
    expected = [sum((a > 0.5) == (b > 0.5) for a, b in zip(*pair)) / p.shape[1] for pair in zip(p, q)]
    np.testing.assert_allclose(agreement(p, q, multi_label=True), expected, rtol=1e-14)


@PROPERTIES
@given(_classes())
def test_agreement_of_classes_is_counted_by_a_loop(rows: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = rows
    expected = [float(list(a).index(max(a)) == list(b).index(max(b))) for a, b in zip(p, q)]
    np.testing.assert_array_equal(agreement(p, q), expected)


def test_agreement_where_the_answer_hangs_by_a_hair() -> None:
    p, q = np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[0.6, 0.4], [0.4, 0.6]])
    np.testing.assert_array_equal(agreement(p, q), [1, 0])
    np.testing.assert_array_equal(agreement(p[:1], q[:1], multi_label=True), [0.5])


@pytest.mark.parametrize("figure", OUTPUTS)
def test_a_sample_does_not_depend_on_the_others_or_on_their_number(figure: Callable) -> None:
    p, q = _outputs(40_000), _outputs(40_000, seed=1)
    order = np.random.default_rng(2).permutation(len(p))
    found = figure(p, q)
    np.testing.assert_array_equal(figure(p[order], q[order]), found[order])
    few = order[:20]
    np.testing.assert_array_equal([figure(p[[i]], q[[i]])[0] for i in few], found[few])


@pytest.mark.parametrize("figure", OUTPUTS)
def test_large_sets_need_little_memory(figure: Callable) -> None:
    p, q = _outputs(165_000), _outputs(165_000, seed=1)
    tracemalloc.start()
    try:
        figure(p, q)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < p.nbytes


@pytest.mark.parametrize("figure", OUTPUTS)
def test_no_samples_give_no_figures(figure: Callable) -> None:
    assert figure(np.empty((0, 3)), np.empty((0, 3))).shape == (0,)


@pytest.mark.parametrize("figure", OUTPUTS)
@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        ([[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], r"both be N × C .* got \(1, 2\) and \(2, 2\)\. Give one row"),
        ([[0.5, 0.5]], [[0.2, 0.3, 0.5]], r"got \(1, 2\) and \(1, 3\)"),
        ([0.5, 0.5], [0.5, 0.5], r"got \(2,\) and \(2,\)"),
        (np.empty((3, 0)), np.empty((3, 0)), r"got \(3, 0\)"),
        ([[0.5, 0.5]], [[1.5, -0.5]], r"q should hold probabilities in \[0, 1\], but got 1\.5\. Apply the softmax"),
        ([[-0.5, 0.5]], [[0.5, 0.5]], r"p should hold .* got -0\.5"),
        ([[0.5, 0.5], [np.nan, 0.5]], [[0.5, 0.5]] * 2, r"p should hold .* got nan"),
        ([[0.5, 0.5]], [[np.inf, 0.5]], r"q should hold .* got inf"),
    ],
)
def test_outputs_that_are_no_probabilities_are_refused(figure: Callable, p: list, q: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(np.array(p), np.array(q))


@pytest.mark.parametrize("figure", [js_divergence, agreement])
def test_findings_taken_for_classes_are_refused(figure: Callable) -> None:
    classes, findings = np.array([[0.5, 0.5]]), np.array([[0.9, 0.7]])
    with pytest.raises(
        ValueError, match=r"q should have rows that add up to 1, but got one that is 0\.6 off.*multi_la"
    ):
        figure(classes, findings)
    assert figure(classes, findings, multi_label=True) >= 0
    halves = _outputs(50).astype(np.float16)
    np.testing.assert_array_equal(figure(halves, halves), figure(halves.astype(np.float64), halves))


# KLoM


def _slow_klom(unlearned: np.ndarray, retrained: np.ndarray, bins: int) -> list[float]:
    values = []
    for u, r in zip(unlearned.T, retrained.T):
        u, r = np.clip(u, -100, 100), np.clip(r, -100, 100)
        edges = np.linspace(min(*u, *r), max(*u, *r), bins + 1)
        p, q = (np.histogram(side, bins=edges)[0] / len(side) for side in (u, r))
        q = [max(b, 1e-5) if a > 0 else b for a, b in zip(p, q)]
        values.append(sum(a * math.log(a / (b / sum(q))) for a, b in zip(p, q) if a > 0))
    return values


@PROPERTIES
@given(SCORES, st.sampled_from([1, 2, 5, 20]))
def test_klom_equals_a_slow_loop(scores: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    found = klom(*scores, bins=bins)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, _slow_klom(*scores, bins), rtol=1e-9, atol=1e-12)
    assert ((found >= 0) & (found < 11.6)).all()


@PROPERTIES
@given(SCORES, st.randoms(use_true_random=False))
def test_klom_of_equal_sets_is_zero_and_the_order_of_models_and_samples_is_nothing_to_it(
    scores: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    unlearned, retrained = scores
    models, samples = list(range(len(unlearned))), list(range(unlearned.shape[1]))
    random.shuffle(models)  # type: ignore[attr-defined]
    random.shuffle(samples)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(klom(unlearned, unlearned[models]), 0)
    found = klom(unlearned, retrained)
    np.testing.assert_array_equal(klom(unlearned[models][:, samples], retrained[:, samples]), found[samples])


def test_klom_of_two_bins() -> None:
    unlearned, retrained = np.array([[0.0], [0], [0], [4]]), np.array([[0.0], [1.9], [2.0], [4]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert klom(unlearned, retrained, bins=2)[0] == pytest.approx(expected, rel=1e-12)


def test_klom_of_gaussians_has_the_closed_form_in_its_direction() -> None:
    random = np.random.default_rng(0)
    spread = np.array([1.0, 0.5])
    unlearned = random.normal(np.array([0.5, 0.0]), spread, (100_000, 2))
    retrained = random.normal(0, 1, (100_000, 2))
    np.testing.assert_allclose(klom(unlearned, retrained, bins=40), [0.125, math.log(2) + 0.125 - 0.5], atol=0.01)
    assert klom(retrained, unlearned, bins=40)[1] > 0.7


def test_klom_of_sets_apart_is_bounded_by_the_share_of_an_empty_bin() -> None:
    assert klom(np.full((3, 1), 5.0), np.full((4, 1), -5.0))[0] == pytest.approx(math.log(1e5), abs=1e-4)


def test_klom_ignores_differences_beyond_a_margin_of_100() -> None:
    unlearned, retrained = np.array([[150.0], [2000.0]]), np.array([[101.0], [1e6]])
    assert klom(unlearned, retrained)[0] == 0
    assert klom(-unlearned, retrained)[0] > 11


def test_klom_of_many_samples_is_that_of_each() -> None:
    random = np.random.default_rng(0)
    unlearned, retrained = random.normal(size=(2, 70_000)), random.normal(size=(3, 70_000))
    unlearned[:, ::5] = retrained[:2, ::5] = 0
    found = klom(unlearned, retrained)
    some = np.arange(0, 70_000, 6_999)
    np.testing.assert_array_equal([klom(unlearned[:, [i]], retrained[:, [i]])[0] for i in some], found[some])


@pytest.mark.parametrize("bins", [0, -3])
def test_klom_without_bins_is_refused(bins: int) -> None:
    with pytest.raises(ValueError, match=f"bins should be at least 1, but got {bins}"):
        klom(np.zeros((2, 1)), np.zeros((2, 1)), bins)


# The ε of forgetting


def _slow_epsilon(unlearned: np.ndarray, retrained: np.ndarray, delta: float) -> list[float]:
    """By its definition, over thresholds between scores and beyond them."""
    epsilons = []
    for u, r in zip(unlearned.T.tolist(), retrained.T.tolist()):
        values = sorted({*u, *r})
        thresholds = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values)), math.inf]
        best = 0.0
        for positives, negatives in ((u, r), (r, u)):
            for threshold in thresholds:
                fpr = sum(x > threshold for x in negatives) / len(negatives)
                fnr = sum(not x > threshold for x in positives) / len(positives)
                if fpr == 0 and fnr == 0:
                    best = 50.0
                elif fpr > 0 and fnr > 0:
                    for one, other in ((fpr, fnr), (fnr, fpr)):
                        if 1 - delta - one > 0:
                            best = max(best, math.log(1 - delta - one) - math.log(other))
        narrow, wide = sorted([max(u) - min(u), max(r) - min(r)])
        epsilons.append(50.0 if narrow < wide * 0.01 else min(best, 50.0))
    return epsilons


@PROPERTIES
@given(SCORES, st.sampled_from([0.0, 1e-5, 0.1, 0.4]))
def test_epsilon_equals_a_slow_loop_over_thresholds(scores: tuple[np.ndarray, np.ndarray], delta: float) -> None:
    found = forgetting_epsilon(*scores, delta=delta)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, _slow_epsilon(*scores, delta), rtol=1e-9, atol=1e-12)


@PROPERTIES
@given(SCORES)
def test_epsilon_is_symmetric_zero_for_equal_sets_and_bounded_by_the_number_of_models(
    scores: tuple[np.ndarray, np.ndarray],
) -> None:
    unlearned, retrained = scores
    found = forgetting_epsilon(unlearned, retrained)
    np.testing.assert_array_equal(forgetting_epsilon(retrained, unlearned), found)
    np.testing.assert_array_equal(forgetting_epsilon(unlearned, unlearned[::-1]), 0)
    np.testing.assert_array_equal(forgetting_epsilon(3 - unlearned, 3 - retrained), found)
    most = math.log(max(len(unlearned), len(retrained)))
    assert (((found >= 0) & (found < most)) | (found == 50)).all()
    assert (forgetting_epsilon(unlearned, retrained, delta=0.2) <= found).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, -1.5])
def test_epsilon_of_two_gaussians_is_that_of_the_gaussian_mechanism(shift: float) -> None:
    """With a δ so large that the best threshold lies where there are scores.

    The closed form is Balle and Wang's (arXiv:1805.06530): δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).
    """
    delta, mu = 0.05, abs(shift)
    expected = brentq(
        lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 10, xtol=1e-9
    )
    quantiles = norm.ppf((np.arange(40_000) + 0.5) / 40_000)[:, None]
    assert forgetting_epsilon(shift + quantiles, quantiles, delta)[0] == pytest.approx(expected, abs=0.01)
    random = np.random.default_rng(0)
    unlearned, retrained = random.normal(shift, 1, (40_000, 3)), random.normal(0, 1, (40_000, 3))
    np.testing.assert_allclose(forgetting_epsilon(unlearned, retrained, delta), expected, atol=0.15)


def test_epsilon_by_hand() -> None:
    """At 2.5 one model of four is on the wrong side either way; every other threshold has a rate of 0."""
    unlearned, retrained = np.array([[2.0], [3], [4], [5]]), np.array([[0.0], [1], [1.5], [2.5]])
    assert forgetting_epsilon(unlearned, retrained)[0] == pytest.approx(math.log((0.75 - 1e-5) / 0.25), rel=1e-12)
    assert forgetting_epsilon(np.array([[0.0], [2]]), np.array([[1.0], [3]]))[0] == 0


def test_sets_apart_and_models_that_always_say_the_same_are_told_for_sure() -> None:
    apart = np.array([[0.0, 5.0], [1.0, 6.0]]), np.array([[2.0, 3.0], [2.5, 4.0]])
    np.testing.assert_array_equal(forgetting_epsilon(*apart), 50)
    spread = np.random.default_rng(0).normal(size=(30, 1))
    for same in (0.0, spread.max(), np.median(spread)):
        collapsed = np.full((30, 1), same) + 1e-9 * spread
        assert forgetting_epsilon(collapsed, spread)[0] == forgetting_epsilon(spread, collapsed)[0] == 50
    assert forgetting_epsilon(np.zeros((3, 1)), np.zeros((5, 1)))[0] == 0


@pytest.mark.parametrize(("models", "one_in"), [(2, 3), (3, 10), (5, 126)])
def test_one_distribution_is_told_apart_by_chance_as_often_as_said(models: int, one_in: int) -> None:
    sides = list(itertools.combinations(range(2 * models), models))
    unlearned = np.array(sides, dtype=float).T
    retrained = np.array([[i for i in range(2 * models) if i not in side] for side in sides], dtype=float).T
    assert np.mean(forgetting_epsilon(unlearned, retrained) == 50) == pytest.approx(1 / one_in)


def test_epsilon_of_many_samples_is_that_of_each() -> None:
    random = np.random.default_rng(0)
    unlearned, retrained = random.normal(size=(6, 30_000)), random.normal(0.5, 1, (5, 30_000))
    found = forgetting_epsilon(unlearned, retrained)
    some = np.arange(0, 30_000, 2_999)
    np.testing.assert_array_equal(
        [forgetting_epsilon(unlearned[:, [i]], retrained[:, [i]])[0] for i in some], found[some]
    )


@pytest.mark.parametrize("figure", [klom, forgetting_epsilon])
@pytest.mark.parametrize(
    ("unlearned", "retrained", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), r"models × samples .* got \(2, 3\) and \(2, 4\)\. Give one row for each"),
        (np.zeros(3), np.zeros((2, 3)), r"got \(3,\) and \(2, 3\)"),
        (np.zeros((2, 3, 1)), np.zeros((2, 3)), r"got \(2, 3, 1\)"),
        (np.zeros((1, 3)), np.zeros((2, 3)), r"unlearned should hold .* at least 2 models, but got 1\. Train more"),
        (np.zeros((2, 3)), np.zeros((0, 3)), r"retrained should hold .* at least 2 models, but got 0"),
        (
            np.array([[0.0], [np.nan]]),
            np.zeros((2, 1)),
            r"unlearned should hold finite scores, but got nan\. Leave out",
        ),
        (np.zeros((2, 1)), np.array([[0.0], [-np.inf]]), r"retrained should hold finite scores, but got -inf"),
    ],
)
def test_scores_of_models_that_do_not_fit_are_refused(
    figure: Callable, unlearned: np.ndarray, retrained: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        figure(unlearned, retrained)


@pytest.mark.parametrize("figure", [klom, forgetting_epsilon])
def test_models_without_samples_give_no_figures(figure: Callable) -> None:
    assert figure(np.empty((2, 0)), np.empty((3, 0))).shape == (0,)


@pytest.mark.parametrize("delta", [-0.1, 1.0, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta should be in \[0, 1\), but got"):
        forgetting_epsilon(np.zeros((2, 1)), np.zeros((2, 1)), delta)


@PROPERTIES
@given(st.lists(st.floats(0, 50), min_size=1, max_size=8))
def test_the_quality_halves_with_each_half_of_epsilon(epsilon: list[float]) -> None:
    points = []
    for value in epsilon:
        point, end = 1.0, 0.5
        while value >= end:
            point, end = point / 2, end + 0.5
        points.append(point)
    assert forgetting_quality(np.array(epsilon)) == pytest.approx(sum(points) / len(points), rel=1e-12)


def test_the_quality_runs_from_one_to_nearly_nothing() -> None:
    assert forgetting_quality(np.zeros(4)) == 1
    assert forgetting_quality(np.array([0.0, 0.4999, 0.5, 1.0])) == (1 + 1 + 0.5 + 0.25) / 4
    assert 0 < forgetting_quality(np.array([50.0])) < 1e-20
    assert math.isnan(forgetting_quality(np.array([])))


@pytest.mark.parametrize("bad", [-0.1, 50.1, math.nan, math.inf])
def test_a_quality_of_other_numbers_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"epsilon should be in \[0, 50\], but got {bad}\. Take it from"):
        forgetting_quality(np.array([0.0, bad]))


def test_the_score_weighs_the_quality_by_what_is_left_of_the_accuracies() -> None:
    epsilon = np.array([0.0, 0.6])
    assert forgetting_score(epsilon, (0.9, 1.0), (0.4, 0.8)) == pytest.approx(0.75 * 0.9 * 0.5)
    assert forgetting_score(epsilon, (0.9, 0.9), (0.8, 0.8)) == forgetting_quality(epsilon)
    assert forgetting_score(epsilon, (0.0, 0.9), (0.8, 0.8)) == 0


@pytest.mark.parametrize("missing", [(None, 0.9), (0.9, None), (math.nan, 0.9), (0.9, 0.0)])
def test_a_missing_accuracy_leaves_the_score_undefined(missing: tuple) -> None:
    assert math.isnan(forgetting_score(np.zeros(2), missing, (0.8, 0.8)))
    assert math.isnan(forgetting_score(np.zeros(2), (0.8, 0.8), missing))
    assert math.isnan(forgetting_score(np.array([]), (0.8, 0.8), (0.8, 0.8)))


@pytest.mark.parametrize(("retain", "test", "name"), [((90, 0.9), (1, 1), "retain"), ((1, 1), (0.5, -0.1), "test")])
def test_an_accuracy_in_per_cent_is_refused(retain: tuple, test: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} should hold accuracies in \[0, 1\], but got .* Divide per cent"):
        forgetting_score(np.zeros(2), retain, test)
