"""Matched unseen images: the forget set's shares of each stratum, from the selection half alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from monai_unlearn.data import (
    BatchedImages,
    ImageData,
    LabeledImages,
    Split,
    make_loader,
    make_split,
    matched_loader,
    matched_rows,
)
from monai_unlearn.data.matched import _quotas
from monai_unlearn.metrics import matching_weights

NAN = float("nan")


def part(labels, **columns) -> LabeledImages:
    """Images without a picture, whose pixels tell their position."""
    labels = np.asarray(labels)
    images = (np.arange(len(labels)) % 256).astype(np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    return LabeledImages(images, labels, pd.DataFrame(columns))


def world(forget, selection, named=(), ours=None, theirs=None, names=("a", "b", "c")):
    """Data and split with these labels to forget and to select on, in between others that do not count."""
    forget, selection = np.asarray(forget), np.asarray(selection)
    other = forget[:1].repeat(7, 0)

    def around(values, last):
        return np.concatenate([values, last])

    columns = {name: around(values, np.asarray(values)[:1].repeat(7)) for name, values in (ours or {}).items()}
    theirs = {name: around(values, np.asarray(values)[:1].repeat(7)) for name, values in (theirs or {}).items()}
    data = ImageData(
        "world",
        tuple(names),
        part(around(forget, other), **columns),
        part(around(selection, other), **theirs),
        None,
    )
    n, m = len(forget), len(selection)
    split = Split(
        forget=np.arange(n),
        retain=np.arange(n, n + 7),
        selection=np.arange(m),
        validation=np.arange(m, m + 7),
        test=np.arange(m, m + 7),
        unit="image",
        request={},
        named_columns=tuple(named),
        key="",
        key_is_kept=False,
    )
    return data, split


CLASSES = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(CLASSES, CLASSES, st.integers(0, 5))
def test_each_class_has_the_forget_sets_share_of_as_many_rows_as_are_comparable(forget, selection, seed) -> None:
    assume(set(forget) & set(selection))
    common = [label for label in forget if label in selection]
    assume(len(common) >= len(forget) / 2)
    data, split = world(forget, selection)
    rows = matched_rows(data, split, min_samples=0.01, seed=seed)
    assert set(rows) <= set(split.selection)
    assert (np.diff(rows) >= 0).all()
    assert len(rows) == sum(label in forget for label in selection)
    drawn, wanted, there = Counter(data.validation.labels[rows].tolist()), Counter(common), Counter(selection)
    for label in range(3):
        assert abs(drawn[label] - len(rows) * wanted[label] / len(common)) < 1
        times = [int((rows == row).sum()) for row in np.flatnonzero(np.asarray(selection) == label)]
        if times and wanted[label]:  # as often as each other, but for one
            assert max(times) - min(times) <= 1
            assert sum(times) == drawn[label]
            assert (max(times) <= 1) is (drawn[label] <= there[label])


@settings(deadline=None, derandomize=True, max_examples=80)
@given(CLASSES, CLASSES)
def test_a_mean_over_the_rows_is_that_with_the_audits_weights(forget, selection) -> None:
    assume(set(forget) <= set(selection))
    data, split = world(forget, selection)
    rows = matched_rows(data, split, min_samples=0.01)
    weights = matching_weights(np.asarray(forget), np.asarray(selection))[1]
    classes = np.asarray(selection)
    for label in range(3):  # a figure that depends on the class alone
        by_weights = weights[classes == label].sum() / weights.sum()
        assert abs((classes[rows] == label).mean() - by_weights) < 1 / len(rows) + 1e-12


def test_the_same_classes_give_each_selected_image_once() -> None:
    data, split = world([0, 1, 2] * 10, [2, 1, 0] * 6)
    assert matched_rows(data, split).tolist() == list(range(18))


def test_the_seed_decides_the_draw() -> None:
    data, split = world([0] * 9 + [1], [0, 1] * 30)
    drawn = [matched_rows(data, split, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_are_those_of_the_selection_half_and_of_no_other() -> None:
    data, split = world([0, 1] * 20, [0, 1] * 20)
    odd = replace(split, selection=np.arange(1, 40, 3))
    assert set(matched_rows(data, odd)) <= set(range(1, 40, 3))


def test_findings_are_matched_by_their_number() -> None:
    def labels(*numbers):
        rows = np.zeros((len(numbers), 5))
        for row, number in zip(rows, numbers):
            row[:number] = 1
        rows[:, 4] = NAN  # not known: not counted
        return rows

    forget, selection = labels(*[0] * 10 + [1] * 30 + [4] * 10), labels(*[0, 1, 2, 3, 4] * 10)
    data, split = world(forget, selection, names=("a", "b", "c", "d", "e"))
    rows = matched_rows(data, split)
    numbers = np.minimum(np.nansum(data.validation.labels[rows], axis=1), 3)
    assert Counter(numbers.tolist()) == {0: 8, 1: 24, 3: 8}  # of 40 that are comparable; none with two


def test_named_columns_are_matched_too() -> None:
    forget, selection = [0] * 20, [0] * 40
    ours = {"sex": ["F"] * 20, "site": ["x", "y"] * 10}
    theirs = {"sex": ["F", "M"] * 20, "site": ["x"] * 10 + ["y"] * 30}
    data, split = world(forget, selection, ["sex", "site"], ours, theirs)
    table = data.validation.attributes.iloc[matched_rows(data, split)]
    assert set(table["sex"]) == {"F"}
    assert dict(table["site"].value_counts()) == {"x": 10, "y": 10}
    unnamed = replace(split, named_columns=())
    assert set(data.validation.attributes.iloc[matched_rows(data, unnamed)]["sex"]) == {"F", "M"}


def test_a_column_of_many_numbers_is_cut_into_fifths() -> None:
    ages = np.linspace(20, 80, 40)
    data, split = world([0] * 40, [0] * 40, ["age"], {"age": 60 + ages / 4}, {"age": ages})
    drawn = data.validation.attributes["age"].iloc[matched_rows(data, split)]
    assert drawn.min() > 50
    assert drawn.mean() > 65


@pytest.mark.parametrize(
    ("forget", "selection", "message"),
    [
        ([0] * 20, [0] * 9 + [1] * 30, r"worth at least 10 in number, but of 39 images 9 .*worth 9\.0\. Use more"),
        ([0] * 20, [1] * 30, r"of 30 images 0 are comparable to 0% .*None is of: class a\."),
        ([0] * 5 + [1] * 15, [0] * 30, r"30 are comparable to 25% of the forget set.*None is of: class b\."),
        ([0] * 10 + [1] * 10, [0] * 100 + [1], r"of 101 images 101 are comparable to 100% .*worth 4\.0\."),
    ],
    ids=["few", "none", "other", "one_repeated"],
)
def test_too_few_comparable_images_raise(forget, selection, message) -> None:
    with pytest.raises(ValueError, match=message):
        matched_rows(*world(forget, selection))


def test_ten_images_are_enough() -> None:
    assert len(matched_rows(*world([0] * 20, [0] * 10 + [1] * 30))) == 10


def test_missing_strata_of_a_small_part_are_named_in_the_log(caplog) -> None:
    data, split = world([0] * 18 + [2] * 2, [0, 1] * 20, ["sex"], {"sex": ["F"] * 20}, {"sex": ["F"] * 40})
    with caplog.at_level("INFO", logger="monai_unlearn"):
        assert len(matched_rows(data, split)) == 20
    assert "10 % of the forget set have none that is comparable. None is of: class c, sex F." in caplog.text


def test_a_column_that_validation_images_lack_raises() -> None:
    """Easy and hard images: whoever retrains does not answer them as often as others of their class."""
    data, split = world([0] * 20, [0] * 40, ["difficulty"], {"difficulty": np.linspace(0, 1, 20)}, {})
    with pytest.raises(ValueError, match="goes by difficulty, which the validation images do not have"):
        matched_rows(data, split)


@pytest.mark.parametrize("value", [0, -1, NAN])
def test_min_samples_that_is_no_positive_number_raises(value) -> None:
    with pytest.raises(ValueError, match="min_samples should be greater than 0"):
        matched_rows(*world([0] * 20, [0] * 20), min_samples=value)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 300))
def test_quotas_add_up_and_are_nearest(counts, total) -> None:
    assume(sum(counts))
    share = np.array(counts) / sum(counts)
    quotas = _quotas(share, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - share * total) < 1).all()
    assert (quotas[share == 0] == 0).all()


def test_the_loader_gives_the_rows_as_the_given_one_would() -> None:
    data, split = world([0] * 9 + [1], [0, 1] * 30)
    loader = make_loader(BatchedImages(data.validation), batch_size=8)
    batches = list(matched_loader(loader, data, split, seed=3))
    rows = matched_rows(data, split, seed=3)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == rows.tolist()
    assert max(len(batch["index"]) for batch in batches) == 8
    whole = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), whole[torch.as_tensor(rows)])


def test_a_loader_of_other_images_is_refused() -> None:
    data, split = world([0] * 20, [0] * 20)
    with pytest.raises(ValueError, match="should be one of the 27 validation images in batches, but has 12 images"):
        matched_loader(make_loader(BatchedImages(part([0] * 12)), batch_size=8), data, split)


def test_a_real_split_is_matched() -> None:
    generator = np.random.default_rng(0)
    train, validation = (
        part(generator.integers(3, size=n), patient=[f"P{name}{i // 2}" for i in range(n)], sex=["F", "M"] * (n // 2))
        for name, n in (("t", 120), ("v", 120))
    )
    train = LabeledImages(np.arange(480).reshape(120, 2, 2).astype(np.float64) / 480, train.labels, train.attributes)
    data = ImageData("world", ("a", "b", "c"), train, validation, None)
    split = make_split(data, forget_fraction=0.3)
    rows = matched_rows(data, split)
    shares = [np.bincount(labels, minlength=3) / len(labels) for labels in (
        data.train.labels[split.forget], data.validation.labels[rows])]  # fmt: skip
    assert np.abs(shares[0] - shares[1]).max() < 1 / len(rows) + 1e-12
    assert not set(rows) & set(split.validation)


def test_a_long_list_of_missing_strata_is_cut_short() -> None:
    data, split = world([0] * 8, [1] * 20, ["age"], {"age": np.arange(8)}, {"age": [50] * 20})
    with pytest.raises(ValueError, match=r"None is of: class a, age 0; .*; class a, age 4; and 3 more\. Use more"):
        matched_rows(data, split)
