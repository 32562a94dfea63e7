"""The distance to the retrained model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.metrics import average_gap, indiscernibility, retention_deviation, tug_of_war

PROPERTIES = settings(deadline=None, derandomize=True)
PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)
THREE = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


def test_it_is_the_mean_absolute_difference_in_percentage_points() -> None:
    assert average_gap([0.9, 0.5, 0.7, 0.4], [0.8, 0.6, 0.7, 0.5]) == pytest.approx((10 + 10 + 0 + 10) / 4)


@settings(deadline=None, derandomize=True)
@given(PAIRS)
def test_it_is_a_distance(pairs: list[tuple[float, float]]) -> None:
    one, two = zip(*pairs)
    gap = average_gap(one, two)
    assert gap is not None
    assert 0 <= gap <= 100 + 1e-9
    assert average_gap(two, one) == gap
    assert average_gap(one, one) == 0
    assert (gap == 0) == (one == two)


@pytest.mark.parametrize(("one", "two"), [([0.5, None], [0.5, 0.5]), ([0.5, 0.5], [None, 0.5])])
def test_a_missing_figure_leaves_it_undefined(one: list, two: list) -> None:
    assert average_gap(one, two) is None


@pytest.mark.parametrize(("one", "two"), [([], []), ([0.5], []), ([0.5], [0.5, 0.5])])
def test_other_figures_are_refused(one: list, two: list) -> None:
    with pytest.raises(ValueError, match="same figures, but got"):
        average_gap(one, two)


def test_tug_of_war_is_the_product_over_the_three_accuracies() -> None:
    assert tug_of_war([0.9, 0.5, 0.7], [0.8, 0.75, 0.7]) == pytest.approx(0.9 * 0.75 * 1)
    assert tug_of_war([0.0, 0.5, 0.7], [1.0, 0.5, 0.7]) == 0


@PROPERTIES
@given(THREE, THREE)
def test_tug_of_war_is_symmetric_and_one_for_equal_accuracies_alone(one: tuple, two: tuple) -> None:
    found = tug_of_war(one, two)
    assert found is not None
    assert 0 <= found <= 1
    assert tug_of_war(two, one) == found
    assert tug_of_war(one, one) == 1
    furthest = max(abs(a - b) for a, b in zip(one, two))
    assert (1 - furthest) ** 3 - 1e-12 <= found <= 1 - furthest + 1e-12


def test_retention_deviation_adds_up_what_is_gained_and_what_is_lost() -> None:
    assert retention_deviation([0.9, 0.4], [1.0, 0.8]) == pytest.approx(0.1 + 0.5)
    assert retention_deviation([0.8], [0.4]) == pytest.approx(1)
    assert retention_deviation([0.0, 0.3, 0.5], [0.5, 0.3, 0.5]) == 1


@PROPERTIES
@given(PAIRS)
def test_retention_deviation_is_zero_for_equal_accuracies(pairs: list[tuple[float, float]]) -> None:
    one, two = zip(*pairs)
    found = retention_deviation(one, two)
    assert (found is None) == (0 in two)
    if found is not None:
        assert found == pytest.approx(sum(abs(a - b) / b for a, b in pairs), rel=1e-9, abs=1e-12)
        assert retention_deviation(two, two) == 0


@pytest.mark.parametrize("figure", [tug_of_war, retention_deviation])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_accuracy_leaves_both_undefined(figure: object, missing: float | None) -> None:
    whole, holed = [0.5, 0.6, 0.7], [0.5, missing, 0.7]
    assert figure(whole, holed) is None  # type: ignore[operator]
    assert figure(holed, whole) is None  # type: ignore[operator]
    assert figure(holed, holed) is None  # type: ignore[operator]


def test_a_retrained_model_without_a_right_answer_leaves_the_deviation_undefined() -> None:
    assert retention_deviation([0.5, 0.0], [0.5, 0.0]) is None


@pytest.mark.parametrize("figure", [tug_of_war, retention_deviation])
@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ([0.5, 0.5, 0.5], [0.5, 0.5], r"same accuracies, but got 3 and 2\. Give those on the same splits"),
        ([0.5, 90, 0.5], [0.5, 0.5, 0.5], r"unlearned should be in \[0, 1\], but got 90.*Divide per cent"),
        ([0.5, 0.5, 0.5], [None, 0.5, -0.1], r"retrained should be in \[0, 1\], but got -0\.1"),
    ],
)
def test_accuracies_that_do_not_fit_are_refused(figure: object, one: list, two: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(one, two)  # type: ignore[operator]


def test_tug_of_war_needs_three_accuracies_and_retention_deviation_one() -> None:
    with pytest.raises(ValueError, match=r"unlearned should hold 3 accuracies, but got 2\. Give those on forget"):
        tug_of_war([0.5, 0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="same accuracies, but got 0 and 0"):
        retention_deviation([], [])


@PROPERTIES
@given(st.floats(0, 1))
def test_indiscernibility_does_not_care_which_way_round_the_attack_is(auc: float) -> None:
    found = indiscernibility(auc)
    assert found is not None
    assert 0 <= found <= 1
    assert found == pytest.approx(2 * min(auc, 1 - auc), abs=1e-12)


def test_indiscernibility_at_its_ends() -> None:
    assert [indiscernibility(auc) for auc in (0.0, 0.25, 0.5, 1.0)] == [0, 0.5, 1, 0]
    assert indiscernibility(None) is None
    assert indiscernibility(math.nan) is None
    with pytest.raises(ValueError, match=r"auc should be in \[0, 1\], but got 50"):
        indiscernibility(50)
