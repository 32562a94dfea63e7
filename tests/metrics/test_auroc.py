"""AUROC and accuracy of findings that are not all known, against a slow loop."""

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

from monai_unlearn.metrics import auroc_per_finding, finding_log_odds, known_accuracy, log_odds, mean_auroc

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


@PROPERTIES
@given(ROWS)
def test_the_score_is_the_mean_over_known_findings(rows: list) -> None:
    found = finding_log_odds(*_tensors(rows))
    assert found.dtype == torch.float64
    for row, score in zip(rows, found.tolist()):
        terms = [(2 * y - 1) * z for z, y in row if not math.isnan(y)]
        assert score == pytest.approx(sum(terms) / len(terms) if terms else NAN, abs=1e-6, nan_ok=True)


def test_the_score_of_one_finding_is_that_of_two_classes() -> None:
    logits, labels = torch.randn(9, 1), torch.arange(9) % 2
    two = torch.cat([torch.zeros(9, 1), logits], 1)
    torch.testing.assert_close(finding_log_odds(logits, labels[:, None].float()), log_odds(two, labels))


def test_half_precision_is_scored_in_double_and_unknown_findings_do_not_count() -> None:
    logits = torch.tensor([[60000.0, 60000.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float16)
    labels = torch.tensor([[1, 1, NAN], [NAN, NAN, NAN]], dtype=torch.float16)
    scores = finding_log_odds(logits, labels)
    assert scores[0] == 60000
    assert scores[1].isnan()


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


@pytest.mark.parametrize("figure", [auroc_per_finding, mean_auroc, known_accuracy, finding_log_odds])
@pytest.mark.parametrize(
    ("logits", "labels"), [((3, 2), (3,)), ((3, 1), (3,)), ((3, 2), (2, 2)), ((3, 2, 2), (3, 2, 2))]
)
def test_other_shapes_are_refused(figure: Callable, logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits and labels should both be B × L"):
        figure(torch.zeros(logits), torch.zeros(labels))
