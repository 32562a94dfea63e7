"""The loss of findings that are not all known, against a loop in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monai_unlearn.loss import MaskedBCEWithLogitsLoss

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=25)


def _batch(seed: int, n: int, findings: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels of which some are soft and about a third unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, findings, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (n, findings), generator=generator).double() / 4
    labels[torch.rand(n, findings, generator=generator) < 0.35] = NAN
    return logits.to(dtype).requires_grad_(), labels.to(dtype)


def _loop(logits: torch.Tensor, labels: torch.Tensor, pos_weight: list[float] | None = None) -> float:
    """The sum over the samples, one number after the other."""
    total = 0.0
    for row, truth in zip(logits.tolist(), labels.tolist()):
        weights = [1.0] * len(row) if pos_weight is None else pos_weight
        losses = [
            w * y * math.log1p(math.exp(-z)) + (1 - y) * math.log1p(math.exp(z))
            for z, y, w in zip(row, truth, weights)
            if not math.isnan(y)
        ]
        total += sum(losses) / len(losses) if losses else 0.0
    return total


@PROPERTIES
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans())
def test_it_equals_a_loop_over_the_known_findings(seed: int, n: int, findings: int, mean: bool, weighted: bool) -> None:
    logits, labels = _batch(seed, n, findings)
    pos_weight = [0.5 + i for i in range(findings)] if weighted else None
    loss = MaskedBCEWithLogitsLoss("mean" if mean else "sum", pos_weight)(logits, labels)
    expected = _loop(logits, labels, pos_weight) / (n if mean else 1)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@PROPERTIES
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_its_gradient_is_that_of_each_sample_alone_and_zero_where_nothing_is_known(
    seed: int, n: int, findings: int
) -> None:
    logits, labels = _batch(seed, n, findings)
    loss = MaskedBCEWithLogitsLoss("sum")
    loss(logits, labels).backward()
    for i in range(n):
        known = ~labels[i].isnan()
        expected = torch.where(known, logits[i].sigmoid() - labels[i], 0) / max(int(known.sum()), 1)
        torch.testing.assert_close(logits.grad[i], expected.detach(), rtol=1e-10, atol=1e-14)
        assert (logits.grad[i][~known] == 0).all()


def test_with_everything_known_it_is_pytorchs() -> None:
    logits, labels = _batch(0, 6, 4)
    labels = labels.nan_to_num(0.5)
    for pos_weight in (None, torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)):
        expected = nn.BCEWithLogitsLoss(pos_weight=pos_weight)(logits, labels)
        torch.testing.assert_close(MaskedBCEWithLogitsLoss(pos_weight=pos_weight)(logits, labels), expected)


def test_the_mean_is_over_all_samples_so_that_batches_add_up() -> None:
    logits, labels = _batch(1, 9, 3)
    labels[:4] = NAN
    loss = MaskedBCEWithLogitsLoss()
    parts = sum(len(some) * loss(some, truth) for some, truth in zip(logits.split(2), labels.split(2)))
    torch.testing.assert_close(parts / 9, loss(logits, labels))


def test_a_batch_of_which_nothing_is_known_has_no_loss_and_no_gradient() -> None:
    logits = torch.tensor([[1.0, -torch.inf], [torch.nan, 5.0]], requires_grad=True)
    loss = MaskedBCEWithLogitsLoss()(logits, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 2))


def test_a_logit_of_an_unknown_finding_does_not_reach_the_gradient_even_if_it_overflowed() -> None:
    logits = torch.tensor([[1.0, torch.inf], [2.0, torch.nan]], requires_grad=True)
    MaskedBCEWithLogitsLoss()(logits, torch.tensor([[1.0, NAN], [0.0, NAN]])).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = _batch(2, 5, 3, dtype)
    loss = MaskedBCEWithLogitsLoss("sum", [1.0, 2.0, 3.0])(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_loop(logits.double(), labels.double(), [1, 2, 3]), rel=1e-5)
    (65536 * loss).backward()  # as a loss scaler does
    assert logits.grad.isfinite().all()


def test_it_works_under_automatic_mixed_precision() -> None:
    layer = nn.Linear(4, 3)
    labels = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = MaskedBCEWithLogitsLoss()(layer(torch.ones(2, 4)), labels)
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert (layer.weight.grad[1] == 0).all()
    assert (layer.weight.grad[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_whole_labels_of_any_type_do(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0], [0, 0]]).to(dtype)
    assert MaskedBCEWithLogitsLoss()(torch.zeros(2, 2), labels).item() == pytest.approx(math.log(2))


def test_nothing_is_changed_in_place() -> None:
    logits, labels = _batch(3, 4, 2)
    before = copy.deepcopy((logits.detach(), labels))
    MaskedBCEWithLogitsLoss()(logits, labels)
    assert torch.equal(logits.detach(), before[0])
    torch.testing.assert_close(labels, before[1], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "labels"), [((3, 2), (3,)), ((3,), (3,)), ((3, 1), (3, 2)), ((3, 2), (2, 3)), ((3, 2, 2), (3, 2, 2))]
)
def test_other_shapes_are_refused(logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits and labels should both be B × L"):
        MaskedBCEWithLogitsLoss()(torch.zeros(logits), torch.zeros(labels))


@pytest.mark.parametrize("label", [-1.0, 1.01, math.inf, 255.0])
def test_labels_outside_their_range_are_refused(label: float) -> None:
    with pytest.raises(ValueError, match=r"labels should lie in \[0, 1\]"):
        MaskedBCEWithLogitsLoss()(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [NAN, label]]))


@pytest.mark.parametrize("reduction", ["none", "average", None])
def test_another_reduction_is_refused(reduction: str) -> None:
    with pytest.raises(ValueError, match="reduction should be mean or sum"):
        MaskedBCEWithLogitsLoss(reduction)


@pytest.mark.parametrize("pos_weight", [[0.0], [-1.0, 2.0], [math.nan], [[1.0]], 2.0])
def test_a_weight_that_is_none_is_refused(pos_weight: object) -> None:
    with pytest.raises(ValueError, match="pos_weight should hold one positive number a finding"):
        MaskedBCEWithLogitsLoss(pos_weight=pos_weight)


def test_weights_for_another_number_of_findings_are_refused() -> None:
    with pytest.raises(ValueError, match="one number for each of the 3 findings, but holds 1"):
        MaskedBCEWithLogitsLoss(pos_weight=[2.0])(torch.zeros(2, 3), torch.zeros(2, 3))
