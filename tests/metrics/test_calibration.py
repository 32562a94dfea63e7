"""Brier score and calibration, against slow loops and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from monai_unlearn.metrics import brier, calibration_error, reliability

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
BINS = st.integers(1, 20)
# Whole tenths among them, which lie on the ends of bins.
CHANCE = st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda tenth: tenth / 10))


@st.composite
def _classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    weights = draw(st.lists(st.lists(st.integers(0, 10), min_size=classes, max_size=classes), min_size=n, max_size=n))
    weights = np.array(weights, dtype=float) + np.eye(1, classes)
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return weights / weights.sum(1, keepdims=True), np.array(labels)


@st.composite
def _findings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    size = shape[0] * shape[1]
    chances = draw(st.lists(CHANCE, min_size=size, max_size=size))
    labels = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.3, 0.5, NAN]), min_size=size, max_size=size))
    return np.array(chances).reshape(shape), np.array(labels).reshape(shape)


def _slow_bins(confidence: list[float], right: list[float], bins: int) -> list[tuple[float, float, int]]:
    ends = [end / bins for end in range(1, bins)] + [math.inf]
    found = []
    for start, end in zip([-math.inf, *ends], ends):
        rows = [i for i, c in enumerate(confidence) if start < c <= end]
        if rows:
            mean = sum(confidence[i] for i in rows) / len(rows)
            found.append((mean, sum(right[i] for i in rows) / len(rows), len(rows)))
    return found


def _compare(probabilities: np.ndarray, labels: np.ndarray, slow: list[tuple[float, float, int]], bins: int) -> None:
    found = reliability(probabilities, labels, bins)
    assert list(found) == ["confidence", "accuracy", "n"]
    expected = np.array(slow).reshape(-1, 3).T
    for values, truth in zip(found.values(), expected):
        np.testing.assert_allclose(values, truth, atol=1e-12)
    n = sum(row[2] for row in slow)
    error = sum(row[2] * abs(row[1] - row[0]) for row in slow) / n if n else NAN
    assert calibration_error(probabilities, labels, bins) == pytest.approx(error, abs=1e-12, nan_ok=True)


@PROPERTIES
@given(_classes(), BINS)
def test_figures_of_classes_equal_a_slow_loop(data: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    probabilities, labels = data
    rows = probabilities.tolist()
    slow = [sum((p - (c == y)) ** 2 for c, p in enumerate(row)) for row, y in zip(rows, labels.tolist())]
    scores = brier(probabilities, labels)
    np.testing.assert_allclose(scores, slow, atol=1e-12)
    assert ((scores >= 0) & (scores <= 2)).all()
    confidence = [max(row) for row in rows]
    right = [float(row.index(max(row)) == y) for row, y in zip(rows, labels.tolist())]
    _compare(probabilities, labels, _slow_bins(confidence, right, bins), bins)


@PROPERTIES
@given(_findings(), BINS)
def test_figures_of_findings_equal_a_slow_loop_over_the_known_ones(
    data: tuple[np.ndarray, np.ndarray], bins: int
) -> None:
    probabilities, labels = data
    slow = []
    for row, truth in zip(probabilities.tolist(), labels.tolist()):
        errors = [(p - y) ** 2 for p, y in zip(row, truth) if not math.isnan(y)]
        slow.append(sum(errors) / len(errors) if errors else NAN)
    np.testing.assert_allclose(brier(probabilities, labels), slow, atol=1e-12)
    pairs = [(p, y) for p, y in zip(probabilities.ravel().tolist(), labels.ravel().tolist()) if not math.isnan(y)]
    _compare(probabilities, labels, _slow_bins([p for p, _ in pairs], [y for _, y in pairs], bins), bins)


@PROPERTIES
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_two_classes_have_twice_the_score_of_scikit_learn_and_one_finding_has_it(rows: list) -> None:
    chance, labels = np.array([p for p, _ in rows]), np.array([y for _, y in rows])
    expected = brier_score_loss(labels, chance, pos_label=1)
    two = np.stack([1 - chance, chance], 1)
    assert brier(two, labels).mean() == pytest.approx(2 * expected, abs=1e-12)
    assert brier(chance[:, None], labels[:, None]).mean() == pytest.approx(expected, abs=1e-12)


@PROPERTIES
@given(_classes(), BINS, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(data: tuple, bins: int, random: object) -> None:
    probabilities, labels = data
    order = list(range(len(labels)))
    random.shuffle(order)
    found = calibration_error(probabilities[order], labels[order], bins)
    assert found == pytest.approx(calibration_error(probabilities, labels, bins), abs=1e-12)
    np.testing.assert_array_equal(brier(probabilities[order], labels[order]), brier(probabilities, labels)[order])


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_a_model_that_is_right_as_often_as_it_is_sure_has_no_error(bins: int) -> None:
    probabilities = np.repeat([[0.75, 0.25], [0.5, 0.5]], 4, axis=0)
    labels = np.array([0, 0, 0, 1, 0, 0, 1, 1])
    assert calibration_error(probabilities, labels, bins) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("labels", "error", "score"), [([0, 0], 0.0, 0.0), ([1, 1], 1.0, 2.0), ([0, 1], 0.5, 1.0)])
def test_a_model_that_is_always_sure(labels: list[int], error: float, score: float) -> None:
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert calibration_error(probabilities, np.array(labels)) == error
    assert brier(probabilities, np.array(labels)).mean() == score


def test_a_bin_holds_its_upper_end_and_the_first_one_nought() -> None:
    probabilities = np.array([[0.0], [0.1], [0.2], [0.2000001], [1.0]])
    found = reliability(probabilities, np.ones((5, 1)), bins=5)
    assert found["n"].tolist() == [3, 1, 1]


def test_what_is_drawn_from_its_own_probabilities_is_nearly_calibrated_and_sharpened_it_is_not() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 20_000)
    labels = (probabilities.cumsum(1) < generator.random((20_000, 1))).sum(1)
    assert calibration_error(probabilities, labels) < 0.02
    sharpened = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    assert calibration_error(sharpened, labels) > 0.1
    assert brier(sharpened, labels).mean() > brier(probabilities, labels).mean()


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [(np.empty((0, 3)), np.empty(0, dtype=int)), (np.empty((0, 2)), np.empty((0, 2))), ([[0.3, 0.6]], [[NAN, NAN]])],
    ids=["no image of classes", "no image with findings", "nothing known"],
)
def test_without_anything_known_there_is_no_figure(probabilities: np.ndarray, labels: np.ndarray) -> None:
    assert math.isnan(calibration_error(probabilities, labels))
    assert [len(values) for values in reliability(probabilities, labels).values()] == [0, 0, 0]
    scores = brier(probabilities, labels)
    assert scores.shape == (len(labels),)
    assert np.isnan(scores).all()


def test_inputs_are_left_as_they_were() -> None:
    probabilities, labels = np.array([[0.2, 0.8]]), np.array([[1.0, NAN]])
    before = probabilities.copy(), labels.copy()
    for figure in (brier, calibration_error):
        figure(probabilities, labels)
        figure(probabilities, np.array([1]))
    np.testing.assert_array_equal(probabilities, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("figure", [brier, calibration_error, reliability])
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([0.5, 0.5], [0, 1], r"N × C and labels N, or both N × L, but got \(2,\) and \(2,\)"),
        ([[0.5, 0.5]], [0, 1], r"but got \(1, 2\) and \(2,\)"),
        ([[0.5, 0.5]], [[0.0]], r"but got \(1, 2\) and \(1, 1\)"),
        ([[3.0, -2.0]], [0], r"in \[0, 1\], but are in \[-2.0, 3.0\]. Put the network's outputs through softmax"),
        ([[NAN, 0.5]], [0], r"probabilities should be in \[0, 1\], but are in \[nan, nan\]"),
        ([[0.9, 0.9]], [0], "sum to 1 for each sample"),
        ([[0.5, 0.5]], [2], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [-1], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [NAN], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [0.5], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [[2.0, NAN]], r"labels should be in \[0, 1\], or NaN .* but are in \[2.0, 2.0\]"),
    ],
)
def test_what_can_not_be_right_is_refused(figure: Callable, probabilities: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(np.array(probabilities), np.array(labels))


@pytest.mark.parametrize("figure", [calibration_error, reliability])
def test_no_bins_are_refused(figure: Callable) -> None:
    with pytest.raises(ValueError, match="bins should be at least 1, but got 0"):
        figure(np.array([[0.5, 0.5]]), np.array([0]), bins=0)
