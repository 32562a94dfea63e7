"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from monai_unlearn.report.numbers import change, count, counted, interval, number, percent, seconds, signed, size


@pytest.mark.parametrize("show", [percent, number, count, seconds, size, interval, change])
def test_what_is_undefined_is_a_dash(show: Callable[[None], str]) -> None:
    assert show(None) == "–"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.12345), "12.3"),
        (number(-0.5), "−0.50"),
        (number(0.0123, 3), "0.012"),
        (count(26900), "26,900"),
        (counted(1, "image"), "1 image"),
        (counted(0, "image"), "0 images"),
        (counted(1234, "image"), "1,234 images"),
        (seconds(1234.56), "1,234.6"),
        (size(0), "0 MiB"),
        (size(2**30 - 2**20), "1,023 MiB"),
        (size(2**30), "1.0 GiB"),
        (signed(0.0204), "+2.0"),
        (signed(-0.0204), "−2.0"),
        (signed(0.0004), "0.0"),
        (signed(-0.0004), "0.0"),
        (signed(-0.126, 1, 2), "−0.13"),
        (interval({"auc": 0.5, "low": 0.4, "high": 0.6}), "0.50 (0.40 to 0.60)"),
        (interval({"auc": 0.5, "low": None, "high": 0.6}), "0.50 (too few for an interval)"),
        (interval({"auc": None, "low": 0.4, "high": 0.6}), "–"),
        (change({"difference": 0.05, "low": -0.01, "high": 0.11}), "+5.0 (−1.0 to +11.0)"),
        (change({"difference": 0.05, "low": None, "high": 0.11}), "+5.0"),
        (change({"difference": None, "low": 0.1, "high": 0.11}), "–"),
        (
            change({"difference": 0.02, "low_90": 0.01, "high_90": 0.03}, 1, 2, "low_90 high_90"),
            "+0.02 (+0.01 to +0.03)",
        ),
    ],
)
def test_numbers_are_written_in_one_way(shown: str, expected: str) -> None:
    assert shown == expected
