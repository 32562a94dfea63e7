"""AUROC and accuracy of findings that are not all known, and the AUROC's error, against slow loops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from ignite.metrics import EpochMetric
from sklearn.metrics import roc_auc_score

from monai_unlearn.metrics import auroc_influence, auroc_per_finding, known_accuracy, mean_auroc

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=40)
LABELS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.3, 0.5, 0.8, NAN])
# A few whole logits, so that ties and zeros are common.
ROWS = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda size: st.lists(
        st.lists(st.tuples(st.integers(-2, 2).map(float), LABELS), min_size=size[0], max_size=size[0]),
        min_size=size[1],
        max_size=size[1],
    )
)


def _tensors(rows: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(rows)
    return both[..., 0], both[..., 1]


def _mann_whitney(logits: list[float], labels: list[float]) -> float:
    pairs = [
        (z > other) + (z == other) / 2
        for z, y in zip(logits, labels)
        if y > 0.5
        for other, absent in zip(logits, labels)
        if absent < 0.5
    ]
    return sum(pairs) / len(pairs) if pairs else NAN


@PROPERTIES
@given(ROWS)
def test_the_auroc_of_each_finding_is_that_of_a_loop_over_pairs(rows: list) -> None:
    logits, labels = _tensors(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = auroc_per_finding(logits, labels)
        mean = mean_auroc(logits, labels)
    expected = [_mann_whitney(z, y) for z, y in zip(logits.T.tolist(), labels.T.tolist())]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    defined = [auroc for auroc in expected if not math.isnan(auroc)]
    assert mean == pytest.approx(np.mean(defined) if defined else NAN, nan_ok=True)


@PROPERTIES
@given(ROWS)
def test_the_accuracy_is_that_of_a_loop_over_known_findings(rows: list) -> None:
    right = [(z > 0) == (y > 0.5) for row in rows for z, y in row if not math.isnan(y) and y != 0.5]
    expected = sum(right) / len(right) if right else NAN
    assert known_accuracy(*_tensors(rows)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("figure", [mean_auroc, known_accuracy])
@pytest.mark.parametrize("findings", [1, 3])
def test_it_serves_as_the_function_of_an_ignite_metric(figure: Callable, findings: int) -> None:
    logits, labels = torch.randn(20, findings), torch.randint(2, (20, findings)).float()
    labels[:5, 0] = NAN
    engine = Engine(lambda engine, rows: (logits[rows], labels[rows]))
    EpochMetric(figure, check_compute_fn=False).attach(engine, "figure")
    found = engine.run(torch.arange(20).split(6)).metrics["figure"]
    assert found == figure(logits, labels)
    assert 0 <= found <= 1


def test_one_finding_may_come_without_its_axis() -> None:
    logits, labels = torch.randn(20), (torch.arange(20) % 2).float()
    assert auroc_per_finding(logits, labels) == auroc_per_finding(logits[:, None], labels[:, None])
    assert known_accuracy(logits, labels) == known_accuracy(logits[:, None], labels[:, None])


@pytest.mark.parametrize("figure", [auroc_per_finding, mean_auroc, known_accuracy])
@pytest.mark.parametrize(
    ("logits", "labels"), [((3, 2), (3,)), ((3, 1), (3,)), ((3, 2), (2, 2)), ((3, 2, 2), (3, 2, 2))]
)
def test_other_shapes_are_refused(figure: Callable, logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits and labels should both be B × L"):
        figure(torch.zeros(logits), torch.zeros(labels))


# The AUROC's error


def _placements(scores: np.ndarray, present: np.ndarray) -> np.ndarray:
    """For each pair of a sample with the finding and one without: whether it is in order, ties counting half."""
    return np.array([[(x > y) + (x == y) / 2 for y in scores[~present]] for x in scores[present]], dtype=float)


def _delong(scores: list[np.ndarray], present: np.ndarray) -> np.ndarray:
    """Covariances of the AUROCs of several models on the same samples, by DeLong's formulas."""
    pairs = [_placements(one, present) for one in scores]
    with_finding, without = ([p.mean(axis) for p in pairs] for axis in (1, 0))
    n, m = pairs[0].shape
    return np.atleast_2d(np.cov(with_finding)) / n + np.atleast_2d(np.cov(without)) / m


def _obuchowski(scores: np.ndarray, present: np.ndarray, groups: np.ndarray) -> float:
    """Variance of the AUROC where samples come in groups, without the finite-sample factors."""
    pairs = _placements(scores, present)
    auroc, (n, m) = pairs.mean(), pairs.shape
    variance = 0.0
    for group in np.unique(groups):
        ours, theirs = groups[present] == group, groups[~present] == group
        x = sum(row.mean() - auroc for row in pairs[ours]) / n
        y = sum(column.mean() - auroc for column in pairs.T[theirs]) / m
        variance += x**2 + y**2 + 2 * x * y
    return variance


def _variance(contributions: np.ndarray, groups: np.ndarray | None = None) -> float:
    if groups is not None:
        contributions = np.array([contributions[groups == group].sum() for group in np.unique(groups)])
    return float((contributions**2).sum())


@st.composite
def _samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two models, of which many are tied, with at least two samples of either kind."""
    present = [True, True, False, False, *draw(st.lists(st.booleans(), max_size=20))]
    score = st.lists(st.integers(-3, 3).map(float), min_size=len(present), max_size=len(present)).map(np.array)
    return draw(score), draw(score), np.array(draw(st.permutations(present)))


@PROPERTIES
@given(_samples())
def test_the_auroc_is_scikit_learns_and_its_variance_delongs(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    *scores, present = case
    covariance = _delong(scores, present)
    found = [auroc_influence(one, present) for one in scores]
    for i, (auroc, contributions) in enumerate(found):
        assert auroc == pytest.approx(roc_auc_score(present, scores[i]), abs=1e-12)
        assert _variance(contributions) == pytest.approx(covariance[i, i], abs=1e-12)
        assert contributions.sum() == pytest.approx(0, abs=1e-12)
    # Contributions add up sample by sample: the difference, and the mean, of two models.
    difference, mean = found[0][1] - found[1][1], (found[0][1] + found[1][1]) / 2
    assert _variance(difference) == pytest.approx(np.array([1, -1]) @ covariance @ [1, -1], abs=1e-12)
    assert _variance(mean) == pytest.approx(np.array([0.5, 0.5]) @ covariance @ [0.5, 0.5], abs=1e-12)


@PROPERTIES
@given(_samples(), st.data())
def test_the_variance_over_groups_is_obuchowskis(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    scores, _, present = case
    groups = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(present), max_size=len(present))))
    auroc, contributions = auroc_influence(scores, present, groups)
    assert auroc == auroc_influence(scores, present)[0]
    plain = auroc_influence(scores, present)[1]
    for side in (present, ~present):
        size, groups_there = side.sum(), len(np.unique(groups[side]))
        if groups_there == 1:
            assert np.isnan(contributions[side]).all()
            return
        factor = math.sqrt((size - 1) / size * groups_there / (groups_there - 1))
        np.testing.assert_allclose(contributions[side], factor * plain[side], atol=1e-12)
        contributions[side] *= math.sqrt((groups_there - 1) / groups_there)
    assert _variance(contributions, groups) == pytest.approx(_obuchowski(scores, present, groups), abs=1e-12)


def _drawn(seed: int, n: int = 150, m: int = 250) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    present = random.permutation(np.repeat([True, False], [n, m]))
    one = random.normal(present * 1.0, 1).round(1)
    return one, one + random.normal(0, 0.5, n + m), present


def test_copies_of_a_sample_add_nothing_when_they_are_grouped() -> None:
    scores, _, present = _drawn(0)
    people = np.arange(len(scores))
    auroc, contributions = auroc_influence(scores, present)
    copied = auroc_influence(*(np.repeat(part, 7) for part in (scores, present, people)))
    assert copied[0] == pytest.approx(auroc, abs=1e-12)
    assert _variance(copied[1], np.repeat(people, 7)) == pytest.approx(_variance(contributions), rel=1e-12)
    assert _variance(copied[1]) < _variance(contributions) / 6


def test_the_error_is_that_of_a_bootstrap() -> None:
    """Alone, paired and by patient; both resample positives and negatives as they fall."""
    *scores, present = _drawn(1)
    groups = np.arange(len(present)) // 2
    scores = [one + 0.8 * np.random.default_rng(2).normal(size=len(present))[groups] for one in scores]
    found = [auroc_influence(one, present, groups) for one in scores]
    random = np.random.default_rng(3)
    drawn = []
    for _ in range(1500):
        rows = (2 * random.integers(len(groups) // 2, size=len(groups) // 2)[:, None] + [0, 1]).ravel()
        drawn.append([auroc_influence(one[rows], present[rows])[0] for one in scores])
    spread = np.std(drawn, axis=0), np.std(np.diff(drawn, axis=1))
    for (_, contributions), expected in zip(found, spread[0]):
        assert math.sqrt(_variance(contributions, groups)) == pytest.approx(expected, rel=0.08)
    difference = found[0][1] - found[1][1]
    assert math.sqrt(_variance(difference, groups)) == pytest.approx(spread[1], rel=0.08)


def test_the_order_of_samples_does_not_matter_and_identical_models_do_not_differ() -> None:
    scores, _, present = _drawn(4)
    order = np.random.default_rng(0).permutation(len(scores))
    auroc, contributions = auroc_influence(scores, present)
    shuffled = auroc_influence(scores[order], present[order])
    assert shuffled[0] == pytest.approx(auroc, abs=1e-14)
    np.testing.assert_allclose(shuffled[1], contributions[order], atol=1e-15)
    mirrored = auroc_influence(-scores, present)
    assert mirrored[0] == pytest.approx(1 - auroc, abs=1e-12)
    np.testing.assert_allclose(mirrored[1], -contributions, atol=1e-15)
    np.testing.assert_array_equal(auroc_influence(np.exp(scores), present)[1], contributions)


@pytest.mark.parametrize("present", [[], [True, True], [False]])
def test_without_both_kinds_there_is_no_auroc(present: list[bool]) -> None:
    auroc, contributions = auroc_influence(np.arange(len(present), dtype=float), np.array(present))
    assert math.isnan(auroc)
    np.testing.assert_array_equal(contributions, np.zeros(len(present)))


def test_the_error_of_a_single_sample_or_patient_is_not_known() -> None:
    scores, present = np.array([1.0, 0.5, 2.0, 0.0]), np.array([True, False, False, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auroc, contributions = auroc_influence(scores, present)
        by_patient = auroc_influence(scores, np.array([True, True, False, False]), np.array(["a", "a", "b", "c"]))
    assert auroc == pytest.approx(2 / 3)
    np.testing.assert_array_equal(np.isnan(contributions), present)
    np.testing.assert_array_equal(np.isnan(by_patient[1]), [True, True, False, False])
