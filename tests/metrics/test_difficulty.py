"""The score of samples for a model that is already trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.metrics import el2n

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=40)
LOGITS = st.floats(-30, 30, width=32)


def _rows(columns: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(LOGITS, min_size=columns, max_size=columns), min_size=1, max_size=6)


@PROPERTIES
@given(st.integers(1, 5).flatmap(_rows), st.integers(0, 4))
def test_score_of_classes_equals_a_slow_loop(logits: list[list[float]], label: int) -> None:
    labels = [(label + i) % len(logits[0]) for i in range(len(logits))]
    slow = []
    for z, y in zip(logits, labels):
        total = sum(math.exp(value - max(z)) for value in z)
        p = [math.exp(value - max(z)) / total for value in z]
        slow.append(math.sqrt(sum((p[c] - (c == y)) ** 2 for c in range(len(z)))))
    scores = el2n(torch.tensor(logits), torch.tensor(labels))
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.numpy(), slow, rtol=1e-9, atol=1e-12)
    assert ((scores >= 0) & (scores <= math.sqrt(2) + 1e-12)).all()


@PROPERTIES
@given(_rows(3), st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.25, float("nan")]), min_size=3, max_size=3))
def test_score_of_findings_equals_a_slow_loop(logits: list[list[float]], labels: list[float]) -> None:
    slow = []
    for z in logits:
        errors = [(1 / (1 + math.exp(-logit)) - y) ** 2 for logit, y in zip(z, labels) if not math.isnan(y)]
        slow.append(math.sqrt(sum(errors) / len(errors)) if errors else math.nan)
    scores = el2n(torch.tensor(logits), torch.tensor([labels] * len(logits)))
    np.testing.assert_allclose(scores.numpy(), slow, rtol=1e-9, atol=1e-12)


def test_score_runs_from_sure_and_right_to_sure_and_wrong() -> None:
    logits = torch.tensor([[99.0, 0, 0], [3, 0, 0], [0, 0, 0], [-3, 0, 0], [-99, 99, 0]])
    scores = el2n(logits, torch.zeros(5, dtype=torch.long))
    assert (scores.diff() > 0).all()
    assert scores[0] < 1e-12
    assert float(scores[-1]) == pytest.approx(math.sqrt(2))
    findings = el2n(torch.tensor([[99.0, -99], [-99, 99]]), torch.tensor([[1.0, 0], [1, 0]]))
    assert findings.tolist() == pytest.approx([0, 1], abs=1e-12)


def test_half_precision_is_computed_in_float64() -> None:
    logits = torch.tensor([[4.0, -3, 1.5]])
    labels = torch.tensor([0])
    assert float(el2n(logits.half(), labels)) == pytest.approx(float(el2n(logits, labels)), rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 3), (4, 2), r"one shape, but got \(4, 3\) and \(4, 2\)"),
        ((4, 3), (5,), r"B × C and labels B, but got \(4, 3\) and \(5,\)"),
        ((4, 3, 2, 2), (4,), r"B × C and labels B, but got \(4, 3, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits: tuple, labels: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        el2n(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
