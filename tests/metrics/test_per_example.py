"""Attacks that set a sample's score against its own scores under other models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from monai_unlearn.metrics import lira_scores, pairwise_ratio_scores, ratio_scores

pytestmark = pytest.mark.filterwarnings("error")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
LOG_P = st.one_of(st.integers(-4, 0).map(float), st.floats(-30, 0))


@st.composite
def _log_p(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    k, n = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return draw(arrays(np.float64, n, elements=LOG_P)), draw(arrays(np.float64, (k, n), elements=LOG_P))


@st.composite
def _shadow(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and two sets of shadow models, some of which do not belong to a sample's side."""
    n = draw(st.integers(1, 5))
    score = st.integers(-60, 60).map(lambda x: x / 8)  # equal scores have a variance of exactly 0
    sides = [
        draw(arrays(np.float64, (draw(st.integers(0, 6)), n), elements=st.one_of(score, st.just(math.nan))))
        for _ in range(2)
    ]
    return draw(arrays(np.float64, n, elements=score)), sides[0], sides[1]


# The ratio


@PROPERTIES
@given(_log_p())
def test_the_ratio_is_that_of_probabilities(case: tuple[np.ndarray, np.ndarray]) -> None:
    log_p, references = case
    found = ratio_scores(log_p, references)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.log(np.exp(log_p) / np.exp(references).mean(0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("models", [1, 5])
def test_a_model_that_does_as_its_references_has_a_ratio_of_one(models: int) -> None:
    log_p = -np.random.default_rng(0).exponential(size=50)
    np.testing.assert_allclose(ratio_scores(log_p, np.tile(log_p, (models, 1))), 0, atol=1e-14)


def test_the_ratio_neither_underflows_nor_saturates() -> None:
    log_p, references = np.array([-4000.0, -1e-18]), np.array([[-4001.0, -2e-18], [-4001.0, -2e-18]])
    np.testing.assert_allclose(ratio_scores(log_p, references), [1, 1e-18], atol=1e-15)


def test_what_is_hard_for_every_model_does_not_hide_a_member() -> None:
    """Members are a little more probable than under the references, but far less than easy non-members."""
    random = np.random.default_rng(0)
    hard = random.exponential(5, size=400) + 1
    is_member = np.arange(400) < 200
    references = -hard + random.normal(0, 0.1, (3, 400))
    log_p = -hard + 0.5 * is_member
    assert roc_auc_score(is_member, log_p) < 0.6
    assert roc_auc_score(is_member, ratio_scores(log_p, references)) > 0.99


@PROPERTIES
@given(_log_p(), st.integers(1, 6), st.sampled_from([0.3, 1.0, 1.7]), st.data())
def test_pairwise_scores_equal_a_loop_over_all_pairs(
    case: tuple[np.ndarray, np.ndarray], size: int, gamma: float, data: st.DataObject
) -> None:
    population = data.draw(arrays(np.float64, size, elements=LOG_P))
    population_references = data.draw(arrays(np.float64, (len(case[1]), size), elements=LOG_P))
    x, z = ratio_scores(*case), ratio_scores(population, population_references)
    expected = [sum(one - other >= np.log(gamma) for other in z) / size for one in x]
    np.testing.assert_array_equal(pairwise_ratio_scores(*case, population, population_references, gamma), expected)


def test_a_population_scored_against_itself_is_uniform() -> None:
    log_p = -np.random.default_rng(0).exponential(size=200)
    found = pairwise_ratio_scores(log_p, np.full((2, 200), -1.0), log_p, np.full((2, 200), -1.0))
    np.testing.assert_allclose(np.sort(found), np.arange(1, 201) / 200)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(log_p))


def test_pairwise_scores_by_hand() -> None:
    nothing = np.zeros((1, 4))
    population = np.log([0.1, 0.2, 0.4, 0.8])
    scores = [pairwise_ratio_scores(np.log([0.4]), nothing[:, :1], population, nothing, g)[0] for g in (0.4, 1, 3, 9)]
    assert scores == [1, 0.75, 0.25, 0]


GOOD = np.full(3, -1.0), np.full((2, 3), -1.0)


@pytest.mark.parametrize(
    ("log_p", "references", "message"),
    [
        (GOOD[0], np.zeros((2, 4)), r"log_p should be N and reference_log_p models × N, but got \(3,\) and \(2, 4\)"),
        (GOOD[0], np.zeros(3), r"got \(3,\) and \(3,\)\. Give one row for each reference model"),
        (GOOD[0][:, None], GOOD[1], r"got \(3, 1\)"),
        (GOOD[0], np.zeros((0, 3)), r"reference_log_p should have at least one model, but got none\. Train one"),
        (np.array([-1.0, np.nan, 0]), GOOD[1], r"log_p should hold finite log-prob.* got nan\. Take them from log_s"),
        (np.array([-1.0, 0.2, 0]), GOOD[1], r"log_p should hold .* at most 0, but got 0\.2"),
        (GOOD[0], np.full((2, 3), -np.inf), r"reference_log_p should hold finite log-probabilities.* got -inf"),
    ],
)
def test_values_that_are_no_log_probabilities_are_refused(
    log_p: np.ndarray, references: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_scores(log_p, references)
    with pytest.raises(ValueError, match=message):
        pairwise_ratio_scores(log_p, references, *GOOD)


@pytest.mark.parametrize(
    ("population", "references", "message"),
    [
        (np.empty(0), np.empty((2, 0)), r"at least one sample under the same .* got \(2, 0\) and \(2, 3\)\. Run each"),
        (GOOD[0], GOOD[1][:1], r"same reference models as reference_log_p, but got \(1, 3\) and \(2, 3\)"),
        (GOOD[0], np.zeros((2, 4)), r"population_log_p should be N and population_reference_log_p models × N"),
        (GOOD[0] + 2, GOOD[1], r"population_log_p should hold .* at most 0, but got 1\.0"),
    ],
)
def test_populations_that_do_not_fit_are_refused(population: np.ndarray, references: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairwise_ratio_scores(*GOOD, population, references)


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf])
def test_a_gamma_that_is_no_ratio_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma should be a finite number above 0, but got {gamma}"):
        pairwise_ratio_scores(*GOOD, *GOOD, gamma)


# U-LiRA


def _slow_lira(scores: np.ndarray, sides: list[np.ndarray], min_models: int = 2) -> list[float]:
    known = [[[x for x in column if not math.isnan(x)] for column in side.T] for side in sides]
    pooled = []
    for columns in known:
        squares = [sum((x - np.mean(column)) ** 2 for x in column) for column in columns if column]
        freedom = sum(len(column) - 1 for column in columns if column)
        pooled.append(sum(squares) / freedom if freedom else 0.0)
    found = []
    for score, *columns in zip(scores, *known):
        if min(map(len, columns)) < min_models:
            found.append(math.nan)
            continue
        own = min(map(len, columns)) >= 32
        variances = [np.var(column, ddof=1) if own else rest for column, rest in zip(columns, pooled)]
        logs = [
            norm.logpdf(score, np.mean(column), math.sqrt(max(variance, 1e-12)))
            for column, variance in zip(columns, variances)
        ]
        found.append(expit(logs[0] - logs[1]))
    return found


@PROPERTIES
@given(_shadow(), st.integers(2, 4))
def test_few_shadow_models_equal_a_slow_loop(case: tuple[np.ndarray, np.ndarray, np.ndarray], min_models: int) -> None:
    scores, *sides = case
    found = lira_scores(scores, *sides, min_models=min_models)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, _slow_lira(scores, sides, min_models), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(lira_scores(scores, *sides[::-1], min_models=min_models), 1 - found, atol=1e-12)


def _shadow_models(models: int, n: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each sample is in a random half of the models, and has a mean, an effect and a spread of its own."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, n)
    scores = random.normal(random.normal(0, 3, n), spread, (models + 1, n))
    is_in = random.random((models, n)) < 0.5
    effect = random.exponential(1, n)
    return scores[0], np.where(is_in, scores[1:] + effect, np.nan), np.where(is_in, np.nan, scores[1:])


@pytest.mark.parametrize("models", [16, 64, 90])
def test_few_or_many_shadow_models_equal_a_slow_loop(models: int) -> None:
    """With 64, some samples have 32 models on both sides and the others have not."""
    scores, *sides = _shadow_models(models)
    own = [min((~np.isnan(side[:, i])).sum() for side in sides) >= 32 for i in range(len(scores))]
    assert 0 < sum(own) < len(own) if models == 64 else all(own) == (models == 90)
    np.testing.assert_allclose(lira_scores(scores, *sides), _slow_lira(scores, sides), rtol=1e-9, atol=1e-15)


def test_two_known_gaussians_have_the_score_of_the_closed_form() -> None:
    """N(1, 1) against N(0, 1): the densities' ratio is exp(x − ½)."""
    quantiles = norm.ppf((np.arange(4000) + 0.5) / 4000)[:, None] + np.zeros(5)
    x = np.linspace(-4, 4, 5)
    np.testing.assert_allclose(lira_scores(x, quantiles + 1, quantiles), expit(x - 0.5), atol=1e-3)
    narrow = norm.pdf(x, 0, 0.5) / (norm.pdf(x, 0, 0.5) + norm.pdf(x))
    np.testing.assert_allclose(lira_scores(x, quantiles / 2, quantiles), narrow, atol=1e-3)


def test_equal_sides_tell_nothing_and_no_shift_or_scale_matters() -> None:
    scores, *sides = _shadow_models(12)
    np.testing.assert_array_equal(lira_scores(scores, sides[0], sides[0][::-1])[:3], 0.5)
    found = lira_scores(scores, *sides)
    np.testing.assert_allclose(lira_scores(5 - 3 * scores, *(5 - 3 * side for side in sides)), found, rtol=1e-9)


def test_far_off_and_constant_scores_stay_in_range() -> None:
    scores = np.array([1e6, -1e6, 0.0, 0.0, 1.0])
    sides = np.array([[1.0] * 5, [2.0] * 5]), np.array([[-1.0] * 5, [-2.0] * 5])
    np.testing.assert_array_equal(lira_scores(scores, *sides)[:3], [1, 0, 0.5])
    constant = np.ones((3, 5)), np.zeros((3, 5))
    np.testing.assert_array_equal(lira_scores(scores, *constant), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(lira_scores(scores, constant[0], constant[0]), 0.5)
    # A difference of one standard deviation at the smallest variance, 10⁻¹².
    np.testing.assert_allclose(lira_scores(np.zeros(5), np.zeros((2, 5)), np.full((2, 5), 1e-6)), expit(0.5))


def test_a_sample_whose_few_models_happen_to_agree_is_not_taken_for_certain() -> None:
    scores, *sides = _shadow_models(16)
    for side, value in zip(sides, (0.0, 0.5)):
        side[~np.isnan(side[:, 0]), 0] = value
    scores[0] = 0.5
    assert 0.1 < lira_scores(scores, *sides)[0] < 0.5


def test_samples_with_too_few_models_have_no_score() -> None:
    scores = np.zeros(4)
    inside = np.array([[1.0, 1, 1, np.nan], [2, np.nan, 2, np.nan], [3, np.nan, 3, np.nan]])
    outside = np.array([[0.0, 0, 0, 0], [1, 1, np.nan, 1], [2, 2, np.nan, 2]])
    np.testing.assert_array_equal(np.isnan(lira_scores(scores, inside, outside)), [False, True, True, True])
    assert np.isnan(lira_scores(scores, inside, outside, min_models=4)).all()
    assert np.isnan(lira_scores(scores, np.empty((0, 4)), outside)).all()
    assert lira_scores(np.empty(0), np.empty((3, 0)), np.empty((2, 0))).shape == (0,)


def test_a_sample_is_recognised_by_its_own_shadow_models_where_a_population_attack_sees_nothing() -> None:
    random = np.random.default_rng(0)
    is_member = np.arange(600) < 300
    difficulty = random.normal(0, 5, 600)
    draw = [difficulty + random.normal(0, 0.4, (rows, 600)) for rows in (1, 8, 8)]
    scores = draw[0][0] + is_member
    assert roc_auc_score(is_member, scores) < 0.6
    found = roc_auc_score(is_member, lira_scores(scores, draw[1] + 1, draw[2]))
    # At best that of two Gaussians 1 apart; eight models a side blur the means a little.
    assert norm.cdf(1 / 0.4 / math.sqrt(2)) - 0.05 < found <= 1


@pytest.mark.parametrize(
    ("scores", "inside", "outside", "message"),
    [
        (np.zeros(3), np.zeros((2, 4)), np.zeros((2, 3)), r"but got \(3,\), \(2, 4\) and \(2, 3\)\. Give one row"),
        (np.zeros(3), np.zeros((2, 3)), np.zeros(3), r"but got \(3,\), \(2, 3\) and \(3,\)"),
        (np.zeros((3, 1)), np.zeros((2, 3)), np.zeros((2, 3)), r"but got \(3, 1\)"),
        (
            np.array([0.0, np.nan]),
            np.zeros((2, 2)),
            np.zeros((2, 2)),
            r"scores should be finite, but got nan\. Leave out",
        ),
        (
            np.zeros(2),
            np.full((2, 2), np.inf),
            np.zeros((2, 2)),
            r"in_scores should be finite or NaN, but got inf\. Le",
        ),
        (np.zeros(2), np.zeros((2, 2)), np.full((2, 2), -np.inf), r"out_scores should be finite or NaN, but got -inf"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    scores: np.ndarray, inside: np.ndarray, outside: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lira_scores(scores, inside, outside)


@pytest.mark.parametrize("min_models", [1, 0])
def test_one_shadow_model_is_not_enough(min_models: int) -> None:
    with pytest.raises(ValueError, match=f"min_models should be at least 2, but got {min_models}"):
        lira_scores(np.zeros(2), np.zeros((2, 2)), np.zeros((2, 2)), min_models)
