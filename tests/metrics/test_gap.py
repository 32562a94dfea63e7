"""The distance to the retrained model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.metrics import average_gap

PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


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
