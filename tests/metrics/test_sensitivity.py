"""Sensitivity at a fixed specificity, against scikit-learn's ROC curve."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_curve

from monai_unlearn.metrics import false_negatives, sensitivity_at_specificity, threshold_at_specificity

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=100)
SPECIFICITY = st.one_of(st.floats(0.001, 1), st.integers(1, 20).map(lambda part: part / 20))
# A few whole scores, so that ties are common.
SCORE = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
ROWS = st.lists(st.tuples(SCORE, st.sampled_from([0.0, 1.0, 0.0, 1.0, 0.2, 0.9, 0.5, NAN])), min_size=1, max_size=30)


def _arrays(rows: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows]), np.array([label for _, label in rows])


def _both_known(present: np.ndarray) -> np.ndarray:
    return ~np.isnan(present) & (present != 0.5)


@PROPERTIES
@given(ROWS, SPECIFICITY)
def test_it_is_the_best_point_of_the_roc_curve(rows: list, specificity: float) -> None:
    scores, present = _arrays(rows)
    known = _both_known(present)
    truth = present[known] > 0.5
    assume(0 < truth.sum() < len(truth))
    fpr, tpr, _ = roc_curve(truth, scores[known], drop_intermediate=False)
    expected = tpr[fpr <= 1 - specificity + 1e-12].max()
    assert sensitivity_at_specificity(scores, present, specificity) == pytest.approx(expected, abs=1e-12)


@PROPERTIES
@given(ROWS, SPECIFICITY)
def test_the_threshold_is_the_lowest_that_reaches_it(rows: list, specificity: float) -> None:
    scores, present = _arrays(rows)
    negatives = scores[present < 0.5]
    assume(len(negatives))
    threshold = threshold_at_specificity(scores, present, specificity)
    assert math.isfinite(threshold)
    assert np.mean(negatives < threshold) >= specificity
    assert np.mean(negatives < np.nextafter(threshold, -np.inf)) < specificity


@PROPERTIES
@given(ROWS, SPECIFICITY, st.floats(-5, 5))
def test_those_missed_and_those_found_are_all_that_have_it(rows: list, specificity: float, threshold: float) -> None:
    scores, present = _arrays(rows)
    expected = [score < threshold and label > 0.5 for score, label in rows]
    missed = false_negatives(scores, present, threshold)
    assert missed.dtype == bool
    assert missed.tolist() == expected
    positives = int((present > 0.5).sum())
    own = threshold_at_specificity(scores, present, specificity)
    assume(positives and not math.isnan(own))
    share = 1 - false_negatives(scores, present, own).sum() / positives
    assert share == pytest.approx(sensitivity_at_specificity(scores, present, specificity), abs=1e-12)


@PROPERTIES
@given(ROWS, SPECIFICITY, st.randoms(use_true_random=False))
def test_neither_order_nor_scale_nor_unknown_samples_matter(rows: list, specificity: float, random: object) -> None:
    found = sensitivity_at_specificity(*_arrays(rows), specificity)
    more = [*rows, (1e9, NAN), (-1e9, 0.5)]
    random.shuffle(more)
    scores, present = _arrays(more)
    for others in (scores, 4 * scores):  # by a power of two, so that nothing rounds
        assert sensitivity_at_specificity(others, present, specificity) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize("n", [10, 100, 30])
def test_a_specificity_that_is_a_share_of_the_samples_needs_no_more_than_them(n: int) -> None:
    """.55 · 100 is more than 55 in floating point, and 1 − .9 less than .1."""
    scores, present = np.arange(n + 1.0), np.zeros(n + 1)
    for below in range(1, n + 1):
        assert threshold_at_specificity(scores[:n], present[:n], below / n) == pytest.approx(below - 1)
    scores, present[-1] = np.append(np.arange(n), 0.9 * n - 0.5), 1
    assert sensitivity_at_specificity(scores, present, 0.9) == 1
    assert sensitivity_at_specificity(scores, present, 0.9 + 0.01 / n) == 0


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.99])
def test_two_gaussians_have_the_sensitivity_of_the_closed_form(specificity: float) -> None:
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(1.5, 1, 50_000), generator.normal(0, 1, 50_000)])
    present = np.arange(100_000) < 50_000
    expected = norm.cdf(1.5 - norm.ppf(specificity))
    assert sensitivity_at_specificity(scores, present, specificity) == pytest.approx(expected, abs=0.015)
    assert threshold_at_specificity(scores, present, specificity) == pytest.approx(norm.ppf(specificity), abs=0.05)


def test_a_threshold_of_one_model_is_applied_to_another() -> None:
    present = np.array([True, True, False, False])
    threshold = threshold_at_specificity(np.array([3.0, 2.0, 1.0, 0.0]), present, 1)
    assert false_negatives(np.array([3.0, 0.5, 9.0, 9.0]), present, threshold).tolist() == [False, True, False, False]


@pytest.mark.parametrize(("specificity", "expected"), [(1.0, 0.0), (0.01, 0.0)])
def test_constant_scores_find_nothing(specificity: float, expected: float) -> None:
    assert sensitivity_at_specificity(np.full(6, 0.3), np.arange(6) < 3, specificity) == expected


@pytest.mark.parametrize("present", [[0.0, 0.0], [1.0, 1.0], [NAN, NAN], [0.5, 1.0], []])
def test_with_one_side_only_it_is_undefined(present: list[float]) -> None:
    scores = np.arange(len(present), dtype=float)
    assert math.isnan(sensitivity_at_specificity(scores, np.array(present)))
    absent = any(label < 0.5 for label in present)
    assert math.isnan(threshold_at_specificity(scores, np.array(present))) == (not absent)
    assert len(false_negatives(scores, np.array(present), 0.0)) == len(present)


FIGURES = [
    sensitivity_at_specificity,
    threshold_at_specificity,
    lambda scores, present: false_negatives(scores, present, 0.0),
]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("scores", "present", "message"),
    [
        ([0.0, 1.0], [1.0], r"should both have shape N, but got \(2,\) and \(1,\)"),
        ([[0.0, 1.0]], [[1.0, 0.0]], "should both have shape N"),
        ([NAN, 1.0], [1.0, 0.0], "scores should be finite, but 1 of 2 are not"),
        ([math.inf, 1.0], [1.0, 0.0], "scores should be finite, but 1 of 2 are not"),
        ([0.0, 1.0], [2.0, 0.0], r"present should be in \[0, 1\]"),
    ],
)
def test_what_can_not_be_right_is_refused(figure: Callable, scores: list, present: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(np.array(scores), np.array(present))


@pytest.mark.parametrize("figure", FIGURES[:2])
@pytest.mark.parametrize("specificity", [0, -0.1, 1.1, NAN, 90])
def test_a_specificity_is_a_share(figure: Callable, specificity: float) -> None:
    with pytest.raises(ValueError, match=r"specificity should be in \(0, 1\], but got"):
        figure(np.array([0.0, 1.0]), np.array([0.0, 1.0]), specificity)


def test_a_threshold_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold should be a number, but got nan"):
        false_negatives(np.array([0.0, 1.0]), np.array([0.0, 1.0]), NAN)
