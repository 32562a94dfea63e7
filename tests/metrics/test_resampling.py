"""The bootstrap, against slow loops that make the same draws, and its intervals' coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from scipy.stats.mstats import mquantiles

from monai_unlearn.metrics import group_numbers, interval, resampled_counts, resampled_sums, resampling, two_sided_p

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=80)
NAMES = st.lists(st.sampled_from(["b", "a", "patient 10", "patient 9", ""]), max_size=20)


@PROPERTIES
@given(NAMES)
def test_groups_are_numbered_as_they_appear(names: list[str]) -> None:
    numbers: dict[str, int] = {}
    expected = [numbers.setdefault(name, len(numbers)) for name in names]
    found = group_numbers(np.array(names, dtype=object), len(names))
    assert found.tolist() == expected
    renamed = np.array([f"{9 - numbers[name]}" for name in names])
    assert group_numbers(renamed, len(names)).tolist() == expected


def test_without_groups_each_sample_is_its_own() -> None:
    assert group_numbers(None, 4).tolist() == [0, 1, 2, 3]
    assert group_numbers(np.array([7.5, -1.0, 7.5]), 3).tolist() == [0, 1, 0]


@pytest.mark.parametrize("groups", [[0, 1], [0, 1, 2, 3]])
def test_groups_of_other_samples_are_refused(groups: list[int]) -> None:
    with pytest.raises(ValueError, match=f"groups should name the group of each of 3 samples, but got {len(groups)}"):
        group_numbers(np.array(groups), 3)


@PROPERTIES
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 25), st.integers(0, 99))
def test_pieces_hold_the_same_draws_whatever_their_size(groups: int, resamples: int, rows: int, seed: int) -> None:
    pieces = list(resampled_counts(groups, resamples, np.random.default_rng(seed), rows))
    assert all(len(piece) == rows for piece in pieces[:-1])
    counts = np.concatenate(pieces)
    drawn = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    np.testing.assert_array_equal(counts, [[list(row).count(g) for g in range(groups)] for row in drawn])
    np.testing.assert_array_equal(counts, np.concatenate(list(resampled_counts(groups, resamples, _random(seed)))))


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_many_groups_come_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CELLS", 1000)
    assert [len(piece) for piece in resampled_counts(300, 7, _random(0))] == [3, 3, 1]
    assert [len(piece) for piece in resampled_counts(3000, 2, _random(0))] == [1, 1]


@PROPERTIES
@given(st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(0, 9), st.data())
def test_sums_are_those_of_a_loop_over_the_same_draws(
    n: int, columns: int, grouped: bool, seed: int, data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) if grouped else None
    values = np.random.default_rng(n).normal(size=(n, columns))
    found = resampled_sums(values, None if groups is None else np.array(groups), 6, seed)

    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups if groups is not None else range(n)):
        members.setdefault(group, []).append(row)
    in_order = list(members.values())
    drawn = np.random.default_rng(seed).integers(len(in_order), size=(6, len(in_order)))
    expected = [[sum(values[i, k] for g in row for i in in_order[g]) for k in range(columns)] for row in drawn]
    assert found.shape == (6, columns)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_all_columns_are_resampled_alike() -> None:
    """So differences between models, and ratios to the number of samples, are paired."""
    x = np.random.default_rng(0).normal(size=40)
    sums = resampled_sums(np.column_stack([x, x, 3 * x + 2, np.ones(40)]), None, 50, 0)
    np.testing.assert_array_equal(sums[:, 0], sums[:, 1])
    np.testing.assert_allclose(sums[:, 2], 3 * sums[:, 0] + 2 * sums[:, 3], atol=1e-10)
    np.testing.assert_array_equal(sums[:, 3], 40)
    # A column's sums don't depend on which others there are.
    np.testing.assert_allclose(resampled_sums(x[:, None], None, 50, 0), sums[:, :1], atol=1e-10)


def test_groups_are_drawn_whole() -> None:
    groups = np.array([0, 0, 0, 0, 1, 2, 2])
    sums = resampled_sums(np.eye(7), groups, 200, 0)
    np.testing.assert_array_equal(sums[:, 0:3], sums[:, 1:4])
    np.testing.assert_array_equal(sums[:, 5], sums[:, 6])
    np.testing.assert_array_equal(sums[:, [0, 4, 5]].sum(1), 3)
    assert len(np.unique(sums.sum(1))) > 5  # the number of samples varies


def test_copies_that_are_grouped_add_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    copied = resampled_sums(np.repeat(x, 5, axis=0), np.repeat(np.arange(30), 5), 100, 3)
    np.testing.assert_allclose(copied, 5 * resampled_sums(x, None, 100, 3), atol=1e-10)


def test_sums_have_the_mean_and_the_variance_of_draws_with_replacement() -> None:
    x, resamples = np.random.default_rng(0).exponential(size=25), 20_000
    sums = resampled_sums(x[:, None], None, resamples, 1)[:, 0]
    spread = math.sqrt(25 * x.var())
    assert sums.mean() == pytest.approx(x.sum(), abs=4 * spread / math.sqrt(resamples))
    assert sums.std() == pytest.approx(spread, rel=0.03)


def test_the_seed_alone_decides_and_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    x = np.arange(20.0)[:, None]
    one, two, other = (resampled_sums(x, None, 9, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("groups", [None, np.zeros(0)])
def test_no_sample_sums_to_nothing(groups: np.ndarray | None) -> None:
    np.testing.assert_array_equal(resampled_sums(np.zeros((0, 2)), groups, 3, 0), np.zeros((3, 2)))


def test_no_resample_has_no_sum() -> None:
    assert resampled_sums(np.ones((4, 2)), None, 0, 0).shape == (0, 2)


# Intervals and p-values

VALUES = st.lists(st.one_of(st.integers(-4, 4).map(float), st.floats(-3, 3)), min_size=1, max_size=120).map(np.array)


@PROPERTIES
@given(VALUES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_scipys(values: np.ndarray, level: float) -> None:
    low, high = interval(values, level)
    expected = mquantiles(values, [(1 - level) / 2, (1 + level) / 2], alphap=0, betap=0)
    np.testing.assert_allclose([low, high], expected, atol=1e-12)
    mirrored = interval(-values, level)
    np.testing.assert_allclose(mirrored, [-high, -low], atol=1e-12)


def test_the_interval_widens_with_its_level_and_is_a_point_where_nothing_varies() -> None:
    values = np.random.default_rng(0).normal(size=500)
    ends = [interval(values, level) for level in (0.5, 0.9, 0.99)]
    assert ends[2][0] < ends[1][0] < ends[0][0] < ends[0][1] < ends[1][1] < ends[2][1]
    assert interval(np.full(7, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("resamples", [39, 200])
def test_few_resamples_do_not_make_the_interval_too_short(resamples: int) -> None:
    """A value that is drawn as the resamples are falls outside in one of twenty cases, however few they are."""
    random, draws = np.random.default_rng(0), 6000
    values = random.exponential(size=(draws, resamples + 1))
    outside = sum(not low <= row[0] <= high for row in values for low, high in [interval(row[1:])])
    low, high = binom.interval(0.999, draws, 0.05)
    assert low <= outside <= high


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    n, draws, level = 60, 600, 0.9
    random = np.random.default_rng(3)
    covered = 0
    for seed in range(draws):
        means = resampled_sums(random.normal(1.5, 1, (n, 1)), None, 199, seed)[:, 0] / n
        low, high = interval(means, level)
        covered += low <= 1.5 <= high
    low, high = binom.interval(0.999, draws, level)
    assert low <= covered <= high


@PROPERTIES
@given(VALUES)
def test_the_p_value_is_that_of_a_loop(values: np.ndarray) -> None:
    below, above = sum(1 for x in values if x <= 0), sum(1 for x in values if x >= 0)
    found = two_sided_p(values)
    assert found == pytest.approx(min(1, 2 * (1 + min(below, above)) / (1 + len(values))))
    assert two_sided_p(-values) == found
    assert 2 / (1 + len(values)) <= found <= 1 or found == 1


@PROPERTIES
@given(VALUES.filter(lambda values: len(values) >= 20), st.sampled_from([0.5, 0.8, 0.9, 0.95]), st.floats(-3, 3))
def test_the_p_value_is_below_the_level_where_the_interval_excludes_zero(
    values: np.ndarray, level: float, shift: float
) -> None:
    """Up to the grid of 2 / (R + 1): between two neighbouring resamples the interval's end is interpolated."""
    values = values + shift
    p = two_sided_p(values)
    low, high = interval(values, level)
    excludes = low > 0 or high < 0
    if p < 1 - level - 1e-9:
        assert excludes
    if excludes and p > 2 / (1 + len(values)):
        assert p <= 1 - level + 2 / (1 + len(values)) + 1e-9


def test_resamples_by_the_thousand_give_p_values_and_intervals_that_agree() -> None:
    random = np.random.default_rng(0)
    agree = 0
    for _ in range(400):
        values = random.normal(random.normal(0, 2), 1, 1000)
        low, high = interval(values)
        agree += (low > 0 or high < 0) == (two_sided_p(values) < 0.05)
    assert agree == 400


def test_without_a_difference_small_p_values_are_as_rare_as_they_say() -> None:
    random, draws = np.random.default_rng(1), 4000
    values = random.normal(size=(draws, 200))
    p = np.array([two_sided_p(row[1:] - row[0]) for row in values])
    for level in (0.05, 0.2, 0.5):
        low, high = binom.interval(0.999, draws, level)
        assert low <= (p <= level + 1e-9).sum() <= high


def test_no_difference_in_any_resample_is_no_evidence() -> None:
    assert two_sided_p(np.zeros(1000)) == 1
    assert two_sided_p(np.ones(999)) == two_sided_p(-np.ones(999)) == pytest.approx(2 / 1000)


@pytest.mark.parametrize("undefined", [0, 1, 100, 101, 1000])
def test_interval_and_p_value_are_undefined_where_too_many_resamples_are(undefined: int) -> None:
    values = np.random.default_rng(0).normal(2, 1, 1000)
    values[:undefined] = math.nan
    if undefined <= 100:
        assert interval(values) == interval(values[undefined:])
        assert two_sided_p(values) == two_sided_p(values[undefined:])
    else:
        assert np.isnan(interval(values)).all()
        assert math.isnan(two_sided_p(values))


def test_no_resample_gives_neither() -> None:
    assert np.isnan(interval(np.zeros(0))).all()
    assert math.isnan(two_sided_p(np.zeros(0)))
