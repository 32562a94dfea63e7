"""Groups of samples and the tests between them, against enumeration."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monai_unlearn.metrics import age_bands, groups_of, holm, largest_difference, permutation_test

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
VALUE = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3), st.just(NAN))
GROUP = st.sampled_from(["a", "b", "c", ""])
SAMPLES = st.lists(st.tuples(VALUE, GROUP), max_size=12)


def _arrays(samples: list[tuple[float, str]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([value for value, _ in samples], dtype=float), np.array([group for _, group in samples], dtype=str)


# Age bands


@pytest.mark.parametrize(
    ("age", "band"),
    [
        (0, "0-17"),
        (17.9, "0-17"),
        (18, "18-39"),
        (39, "18-39"),
        (40, "40-59"),
        (60.0, "60-79"),
        (79.99, "60-79"),
        (80, "80+"),
        (150, "80+"),
        (151, ""),
        (-1, ""),
        (NAN, ""),
        (math.inf, ""),
        (None, ""),
        (pd.NA, ""),
        ("", ""),
        (" nan", ""),
        ("45", "40-59"),
        ("45.5", "40-59"),
        (" 045Y ", "40-59"),
        ("045y", "40-59"),
        ("000D", "0-17"),
        ("216M", "18-39"),
        ("215M", "0-17"),
        ("999W", "18-39"),
        ("999Y", ""),
        ("18-39", "18-39"),
        ("90+", "90+"),
        ("adult", "adult"),
    ],
)
@pytest.mark.parametrize("kind", [pd.Series, lambda values: np.array(values, dtype=object)], ids=["series", "array"])
def test_each_age_is_in_its_band(age: object, band: str, kind: Callable) -> None:
    found = age_bands(kind([age, "018Y"]))
    assert found.tolist() == [band, "18-39"]
    assert found.dtype.kind == "U"


@PROPERTIES
@given(st.lists(st.integers(0, 150), min_size=1), st.sampled_from([int, float, str, lambda age: f"{age:03d}Y"]))
def test_bands_of_whole_years_are_those_of_pandas_in_whatever_form_they_come(ages: list[int], form: Callable) -> None:
    names = ["0-17", "18-39", "40-59", "60-79", "80+"]
    expected = pd.cut(ages, [0, 18, 40, 60, 80, 151], right=False, labels=names).astype(str).tolist()
    assert age_bands(np.array([form(age) for age in ages])).tolist() == expected
    assert age_bands(age_bands(np.array(ages))).tolist() == expected


def test_no_ages_have_no_bands() -> None:
    assert age_bands(np.array([])).tolist() == []
    assert age_bands(pd.Series([], dtype=float)).tolist() == []


# Groups of a column


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["F", "M ", None, "F", "M", ""], ["F", "M", "", "F", "M", ""]),
        (["F", "F", "M", "F"], ["F", "F", "", "F"]),
        ([1.0, 2.0, NAN, 1.0, 2.0], ["1", "2", "", "1", "2"]),
        ([1.5, 1.5, math.inf, 2], ["1.5", "1.5", "", ""]),
        ([True, False, True, False], ["True", "False", "True", "False"]),
        (["01", "2", "01", "2"], ["01", "2", "01", "2"]),
        (["n/a", "NaN", "NA", " "], ["", "", "", ""]),
        ([[1], [1], {2}, None], ["[1]", "[1]", "", ""]),
        ([], []),
    ],
)
def test_few_values_are_groups_of_their_own(column: list, expected: list[str]) -> None:
    for kind in (pd.Series(column, dtype=object), pd.Series(column) if column else pd.Series([], dtype=float)):
        found = groups_of(kind)
        assert found is not None
        assert found.tolist() == expected
        assert found.dtype.kind == "U"


def test_other_types_of_pandas_are_taken_too() -> None:
    expected = ["a", "", "a"]
    assert groups_of(pd.Series(["a", None, "a"], dtype="category")).tolist() == expected
    assert groups_of(pd.Series(["a", None, "a"], dtype="string")).tolist() == expected
    assert groups_of(pd.Series([3, None, 3], dtype="Int64")).tolist() == ["3", "", "3"]
    assert groups_of(np.array(["a", "", "a"])).tolist() == expected
    days = pd.to_datetime(pd.Series(["2020-01-01", None, "2020-01-01"]))
    assert groups_of(days).tolist() == ["2020-01-01 00:00:00", "", "2020-01-01 00:00:00"]


def test_groups_that_are_too_small_are_none() -> None:
    column = np.array(["a"] * 5 + ["b"] * 4 + ["c"])
    assert set(groups_of(column, min_size=5).tolist()) == {"a", ""}
    assert set(groups_of(column, min_size=1).tolist()) == {"a", "b", "c"}
    assert set(groups_of(column, min_size=6).tolist()) == {""}


@pytest.mark.parametrize("form", [float, str, int])
def test_many_numbers_become_thirds(form: Callable) -> None:
    column = np.random.default_rng(0).permutation(30)
    found = groups_of(pd.Series([form(number) for number in column] + [None]))
    names = np.repeat(["lowest third", "middle third", "highest third"], 10)
    assert found.tolist() == [*names[column], ""]


@PROPERTIES
@given(st.lists(st.integers(0, 40).map(float), min_size=1, max_size=60), st.integers(1, 12))
def test_thirds_are_in_order_and_equal_numbers_stay_together(numbers: list[float], most: int) -> None:
    found = groups_of(np.array(numbers), min_size=1, max_groups=most)
    assert found is not None
    if len(set(numbers)) <= most:
        assert found.tolist() == [str(int(number)) for number in numbers]
        return
    rank = {"lowest third": 0, "middle third": 1, "highest third": 2}
    for (one, third), (two, other) in itertools.combinations(zip(numbers, found.tolist()), 2):
        if one <= two:
            assert rank[third] <= rank[other]
        if one >= two:
            assert rank[third] >= rank[other]


def test_a_column_of_many_words_such_as_ids_is_no_grouping() -> None:
    column = [f"patient{i // 2}" for i in range(26)]
    assert groups_of(np.array(column)) is None
    assert groups_of(np.array([*column[:24], "", ""])) is not None
    assert groups_of(np.array(column), max_groups=13) is not None
    assert groups_of(np.array([*range(50), "x"], dtype=object)) is None
    assert groups_of(pd.Series([[i] for i in range(20)])) is None


# The largest difference


def _slow_difference(values: list[float], groups: list[str]) -> float:
    means = []
    for name in {group for group in groups if group}:
        own = [value for value, group in zip(values, groups) if group == name and not math.isnan(value)]
        if len(own) > 1:
            means.append(sum(own) / len(own))
    return max(means) - min(means) if len(means) > 1 else NAN


@PROPERTIES
@given(SAMPLES)
def test_the_difference_is_that_of_a_loop(samples: list) -> None:
    values, groups = _arrays(samples)
    highest, lowest, difference = largest_difference(values, groups)
    expected = _slow_difference(values.tolist(), groups.tolist())
    assert difference == pytest.approx(expected, abs=1e-9, nan_ok=True)
    if math.isnan(difference):
        assert (highest, lowest) == ("", "")
    else:
        assert highest != lowest
        gap = np.nanmean(values[groups == highest]) - np.nanmean(values[groups == lowest])
        assert gap == pytest.approx(difference, abs=1e-9)
        assert difference >= 0


def test_names_of_the_difference() -> None:
    values = np.array([1.0, 3, 5, 5, 0, 0, 99, NAN, 99])
    groups = np.array(["F", "F", "M", "M", "X", "X", "alone", "alone", ""])
    assert largest_difference(values, groups) == ("M", "X", 5.0)
    assert largest_difference(values[:4] > 2, groups[:4].astype(object)) == ("M", "F", 0.5)
    assert largest_difference(np.ones(4), groups[:4]) == ("F", "M", 0.0)


# The permutation test


def _all_assignments(groups: list[str], clusters: list[int]) -> Iterator[list[str]]:
    """Every way to give clusters of one group each other's group and to permute groups within each other cluster."""
    rows: dict[int, list[int]] = {}
    for row, cluster in enumerate(clusters):
        rows.setdefault(cluster, []).append(row)
    whole = [own for own in rows.values() if len({groups[row] for row in own}) == 1]
    mixed = [own for own in rows.values() if len({groups[row] for row in own}) > 1]
    for names in itertools.permutations([groups[own[0]] for own in whole]):
        for parts in itertools.product(*(itertools.permutations([groups[row] for row in own]) for own in mixed)):
            found = list(groups)
            for own, name in zip(whole, names):
                for row in own:
                    found[row] = name
            for own, part in zip(mixed, parts):
                for row, name in zip(own, part):
                    found[row] = name
            yield found


def _plain_difference(values: list[float], groups: list[str]) -> float:
    means = [np.mean([v for v, g in zip(values, groups) if g == name]) for name in set(groups)]
    return max(means) - min(means)


def _close(p: float, exact: float, permutations: int) -> bool:
    return abs(p - exact) < 4.5 * math.sqrt(exact * (1 - exact) / permutations) + 2 / permutations


@pytest.mark.parametrize(
    ("values", "groups", "clusters"),
    [
        ([3, 2.5, 2, 0.5, 1, 0], "aaabbb", [0, 1, 2, 3, 4, 5]),
        ([3, 2.5, 2, 0.5, 1, 0, 5, 4], "aaabbbab", [0, 0, 1, 2, 2, 3, 4, 5]),
        ([3, 2.5, 2, 0.5, 1, 0, 5, 4], "aabbabab", [0, 0, 1, 1, 2, 2, 3, 3]),  # two of one group, two of both
        ([9, 1, 8, 2, 7, 3.5], "ababab", [0, 0, 1, 1, 2, 2]),  # all of both: a test within patients
        ([1, 1, 0, 0, 1, 0, 1], "aabbccc", [0, 1, 2, 3, 4, 5, 5]),
        ([1, 0, 1, 0, 5, 5], "aabbcc", [0, 1, 2, 3, 4, 5]),
        ([4, 1, 1, 3, 0, 0, 2], "aaabbbc", [0, 0, 0, 1, 2, 3, 4]),  # c is alone and left out
        ([1, 2, 3, 4], "aabb", [0, 0, 1, 1]),  # one patient each: nothing can be shown
    ],
)
def test_the_p_value_is_that_of_all_permutations(values: list, groups: str, clusters: list) -> None:
    rows = [row for row, name in enumerate(groups) if groups.count(name) > 1]
    kept = [float(values[row]) for row in rows], [groups[row] for row in rows], [clusters[row] for row in rows]
    observed = _plain_difference(kept[0], kept[1])
    found = [_plain_difference(kept[0], other) for other in _all_assignments(kept[1], kept[2])]
    exact = float(np.mean(np.array(found) >= observed - 1e-9))
    ids = np.array([f"P{cluster}" for cluster in clusters])
    p = permutation_test(np.array(values, dtype=float), np.array(list(groups)), ids, permutations=3000)
    assert _close(p, exact, 3000)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (3, 2, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_without_clusters_it_is_that_of_scipy(sizes: tuple[int, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [generator.normal(0.5 * group, 1, size) for group, size in enumerate(sizes)]

    def spread(*parts: np.ndarray, axis: int) -> np.ndarray:
        means = np.stack([part.mean(axis=axis) for part in parts])
        return means.max(0) - means.min(0)

    exact = stats.permutation_test(parts, spread, n_resamples=np.inf, alternative="greater", vectorized=True)
    groups = np.repeat(list("abc")[: len(sizes)], sizes)
    p = permutation_test(np.concatenate(parts), groups, permutations=3000)
    assert _close(p, float(exact.pvalue), 3000)


def _patients(generator: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Twenty patients with one to five images each that resemble each other; the group has no effect."""
    sizes = generator.integers(1, 6, 20)
    clusters = np.repeat(np.arange(20), sizes)
    values = generator.normal(0, 1, 20)[clusters] + 0.3 * generator.normal(0, 1, len(clusters))
    own = generator.permutation(np.arange(20) % 2)[clusters]
    groups = np.where(generator.random(len(clusters)) < 0.3, 1 - own, own) if kind == "several" else own
    return values, np.array(["a", "b"])[groups], clusters


@pytest.mark.parametrize("kind", ["one", "several"])
def test_the_rate_of_false_alarms_is_nominal_although_images_of_a_patient_resemble_each_other(kind: str) -> None:
    generator = np.random.default_rng(0)
    draws = [_patients(generator, kind) for _ in range(300)]
    alarms = sum(permutation_test(*draw, permutations=99) <= 0.05 for draw in draws)
    assert stats.binom.ppf(0.001, 300, 0.05) <= alarms <= stats.binom.ppf(0.999, 300, 0.05)
    if kind == "one":
        naive = sum(permutation_test(values, groups, permutations=99) <= 0.05 for values, groups, _ in draws)
        assert naive > 2 * stats.binom.ppf(0.999, 300, 0.05)


@pytest.mark.parametrize("kind", ["one", "several"])
def test_an_effect_of_the_group_is_seen(kind: str) -> None:
    values, groups, clusters = _patients(np.random.default_rng(1), kind)
    assert permutation_test(values + 3 * (groups == "a"), groups, clusters, permutations=999) <= 0.01


@PROPERTIES
@given(SAMPLES, st.booleans(), st.randoms(use_true_random=False))
def test_neither_order_nor_shift_nor_samples_left_out_matter(samples: list, clustered: bool, random: object) -> None:
    rows = [(value, group, i // 2) for i, (value, group) in enumerate(samples)]
    more = [*rows, (1e3, "", 99), (NAN, "a", 99), (1e3, "alone", 0)]
    random.shuffle(more)
    found = []
    for some in (rows, more):
        values, groups = _arrays([row[:2] for row in some])
        clusters = np.array([row[2] for row in some]) if clustered else None
        found.append(permutation_test(values, groups, clusters, permutations=19))
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    assert math.isnan(found[0]) == math.isnan(_slow_difference(*(column.tolist() for column in _arrays(samples))))
    assert math.isnan(found[0]) or found[0] * 20 in range(1, 21)


def test_constant_values_differ_in_nothing() -> None:
    groups = np.array(["a", "b"] * 10)
    assert permutation_test(np.full(20, 0.1), groups, permutations=50) == 1
    assert permutation_test(np.full(20, 0.1), groups, np.arange(20) // 4, permutations=50) == 1


def test_the_smallest_p_value_is_one_in_all_permutations_and_the_seed_decides() -> None:
    values, groups = np.arange(40.0), np.array(["a"] * 20 + ["b"] * 20)
    assert permutation_test(values, groups, permutations=99) == 0.01
    noise = np.random.default_rng(0).normal(size=40)
    assert permutation_test(noise, groups, seed=3) == permutation_test(noise, groups, seed=3)
    assert len({permutation_test(noise, groups, seed=seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("clusters", [None, np.arange(47_000) // 3])
def test_memory_does_not_grow_with_the_permutations(clusters: np.ndarray | None) -> None:
    generator = np.random.default_rng(0)
    values, groups = generator.random(47_000), np.array(list("abcd"))[generator.integers(4, size=47_000)]
    tracemalloc.start()
    permutation_test(values, groups, clusters, permutations=150)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # a table of all permutations would have 56 MB


# Holm


@PROPERTIES
@given(st.lists(st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.just(0.02), st.just(NAN)), max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if Bonferroni's test rejects each set of hypotheses that has it."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    expected = [NAN] * len(p_values)
    for size in range(1, len(known) + 1):
        for some in itertools.combinations(known, size):
            together = min(1.0, size * min(p_values[i] for i in some))
            for i in some:
                expected[i] = together if math.isnan(expected[i]) else max(expected[i], together)
    np.testing.assert_allclose(holm(np.array(p_values)), expected, atol=1e-15)


def test_holm_of_an_example_by_hand() -> None:
    found = holm(np.array([0.01, 0.04, NAN, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, 0.06, NAN, 0.06, 0.02])


# What can not be right


@pytest.mark.parametrize("p_values", [[-0.1, 0.5], [1.1], [math.inf]])
def test_p_values_outside_their_range_are_refused(p_values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"p_values should be in \[0, 1\] or NaN, but got"):
        holm(np.array(p_values))


@pytest.mark.parametrize("figure", [largest_difference, permutation_test])
@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([1.0, 2.0], ["a"], r"should both have shape N, but got \(2,\) and \(1,\)"),
        ([[1.0], [2.0]], [["a"], ["b"]], "should both have shape N"),
        ([1.0, math.inf], ["a", "b"], "values should be finite"),
    ],
)
def test_what_can_not_be_compared_is_refused(figure: Callable, values: list, groups: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(np.array(values), np.array(groups))


def test_clusters_and_permutations_that_do_not_fit_are_refused() -> None:
    values, groups = np.arange(4.0), np.array(list("aabb"))
    with pytest.raises(ValueError, match="cluster of each of 4 samples, but got 3"):
        permutation_test(values, groups, np.arange(3))
    with pytest.raises(ValueError, match="permutations should be at least 1, but got 0"):
        permutation_test(values, groups, permutations=0)
