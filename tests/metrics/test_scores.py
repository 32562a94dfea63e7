"""Scores of single samples, against slow loops, scikit-learn, many digits and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from monai_unlearn.metrics import finding_log_odds, log_odds, modified_entropy, probabilities, sample_loss

NAN = float("nan")
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
LABELS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.3, 0.5, 0.8, NAN])
LOGITS = st.one_of(st.integers(-2, 2).map(float), st.floats(-30, 30, width=32))
# A single finding, or several, of which some are not known.
FINDINGS = st.tuples(st.integers(1, 4), st.integers(1, 8)).flatmap(
    lambda size: st.lists(
        st.lists(st.tuples(LOGITS, LABELS), min_size=size[0], max_size=size[0]), min_size=size[1], max_size=size[1]
    )
)


@st.composite
def _classes(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    n, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    row = st.lists(LOGITS, min_size=classes, max_size=classes)
    return (
        draw(st.lists(row, min_size=n, max_size=n)),
        draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)),
    )


def _tensors(rows: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(rows, dtype=torch.float64)
    return both[..., 0], both[..., 1]


def _slow(row: list[float], label: int, digits: int = 100) -> tuple[float, float, float]:
    """Log-odds, modified entropy and loss of one sample, by their formulas, with many digits."""
    with localcontext() as context:
        context.prec = digits
        powers = [Decimal(z).exp() for z in row]
        shares = [power / sum(powers) for power in powers]
        rest = sum(share for c, share in enumerate(shares) if c != label)
        entropy = -(1 - shares[label]) * shares[label].ln()
        for c, share in enumerate(shares):
            if c != label:
                entropy -= share * (1 - share).ln()
        return float(shares[label].ln() - rest.ln()), float(entropy), float(-shares[label].ln())


# Classes


@PROPERTIES
@given(_classes())
def test_scores_of_classes_are_those_of_a_slow_loop(case: tuple[list[list[float]], list[int]]) -> None:
    logits, labels = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    expected = np.array([_slow(row, label) for row, label in zip(*case)]).T
    for score, values in zip((log_odds, modified_entropy, sample_loss), expected):
        found = score(logits, labels)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12)


@PROPERTIES
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**31), st.floats(0.1, 8))
def test_scores_of_classes_are_those_of_the_softmax(n: int, classes: int, seed: int, scale: float) -> None:
    random = np.random.RandomState(seed)
    logits, labels = scale * random.randn(n, classes), random.randint(0, classes, n)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for i, (row, label) in enumerate(zip(shares, labels)):
        others = [p for c, p in enumerate(row) if c != label]
        one = torch.from_numpy(logits[i : i + 1]), torch.from_numpy(labels[i : i + 1])
        odds = np.log(row[label]) - np.log(sum(others))
        assert log_odds(*one).item() == pytest.approx(odds, rel=1e-6, abs=1e-8)
        entropy = -(1 - row[label]) * np.log(row[label]) - sum(p * np.log(1 - p) for p in others)
        assert modified_entropy(*one).item() == pytest.approx(entropy, rel=1e-6, abs=1e-8)


@PROPERTIES
@given(_classes())
def test_the_loss_of_classes_is_scikit_learns(case: tuple[list[list[float]], list[int]]) -> None:
    logits, labels = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    shares, classes = softmax(logits.numpy(), axis=1), range(logits.shape[1])
    each = [log_loss([label], share[None], labels=classes) for label, share in zip(case[1], shares)]
    # scikit-learn keeps probabilities 1e-16 away from 0 and 1.
    np.testing.assert_allclose(sample_loss(logits, labels).clamp(max=36), np.minimum(each, 36), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 0.3, 5.0, 18.0, 33.9, 36.5, 37.5, 45.0, 120.0, 300.0])
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("third", [-3.0, 0.0])
def test_scores_of_classes_are_right_to_many_digits_where_probabilities_round_to_one(
    gap: float, label: int, third: float
) -> None:
    row = [gap, 0.0, third]
    logits, labels = torch.tensor([row], dtype=torch.float64), torch.tensor([label])
    expected = _slow(row, label, digits=700)  # 1 − p is that small
    for score, value in zip((log_odds, modified_entropy, sample_loss), expected):
        assert score(logits, labels).item() == pytest.approx(value, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("size", [100.0, 1000.0, 1e6])
def test_log_odds_do_not_saturate(size: float) -> None:
    logits = torch.tensor([[size, 0.0], [size + 1, 0.0], [0.0, size], [size, size]], dtype=torch.float32)
    assert log_odds(logits, torch.tensor([0, 0, 0, 1])).tolist() == [size, size + 1, -size, 0]


@pytest.mark.parametrize("size", [1000.0, 1e6, 1e30])
def test_losses_of_huge_logits_are_finite_and_have_the_right_limits(size: float) -> None:
    """Nothing where the model is sure and right; the gap, and twice the gap, where it is sure and wrong."""
    logits, labels = torch.tensor([[size, 0.0], [0.0, size], [size, size]], dtype=torch.float64), torch.zeros(3).long()
    loss, entropy = sample_loss(logits, labels), modified_entropy(logits, labels)
    np.testing.assert_allclose(loss, [0, size, math.log(2)], rtol=1e-12)
    np.testing.assert_allclose(entropy, [0, 2 * size, math.log(2)], rtol=1e-12)
    truth = torch.tensor([[1.0], [0.0], [1.0]])
    z = torch.tensor([[size], [size], [0.0]], dtype=torch.float64)
    np.testing.assert_allclose(sample_loss(z, truth), [0, size, math.log(2)], rtol=1e-12)
    np.testing.assert_allclose(modified_entropy(z, truth), [0, 2 * size, math.log(2)], rtol=1e-12)
    np.testing.assert_allclose(finding_log_odds(z, truth), [size, -size, 0], rtol=1e-12)


@pytest.mark.parametrize("score", [modified_entropy, sample_loss])
@pytest.mark.parametrize("findings", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_a_surer_right_answer_always_scores_lower(score: Callable, findings: bool, label: int) -> None:
    """Also where its probability rounds to 1: an attack goes by the order alone."""
    gaps = torch.linspace(-20, 60, 161, dtype=torch.float64)
    signed = gaps if label else -gaps
    logits = signed[:, None] if findings else torch.stack([torch.zeros(161, dtype=torch.float64), signed], 1)
    labels = torch.full((161, 1), float(label)) if findings else torch.full((161,), label)
    found = score(logits, labels)
    assert (found.diff() < 0).all()
    assert (found > 0).all()


def test_modified_entropy_takes_each_row_with_its_own_label() -> None:
    """Public code changes the column of *any* row's label in all rows; then a sample's score hangs on its batch."""
    logits, labels = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.5], [-1.0, 0.0, 3.0]]), torch.tensor([0, 2, 1])
    together = modified_entropy(logits, labels)
    alone = [modified_entropy(logits[i : i + 1], labels[i : i + 1]).item() for i in range(3)]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)
    assert together.tolist() == pytest.approx(
        [_slow(row, label)[1] for row, label in zip(logits.tolist(), labels.tolist())], rel=1e-12
    )

    shares = logits.double().softmax(1)
    by_column, log_by_column = shares.clone(), (1 - shares).log()
    by_column[:, labels] = 1 - shares[:, labels]
    log_by_column[:, labels] = shares[:, labels].log()
    assert not np.allclose(-(by_column * log_by_column).sum(1), together, rtol=0.01)


@PROPERTIES
@given(_classes(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("score", [log_odds, modified_entropy, sample_loss])
def test_a_samples_score_depends_on_no_other_sample(
    score: Callable, case: tuple[list[list[float]], list[int]], random: object
) -> None:
    logits, labels = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(score(logits[order], labels[order]), score(logits, labels)[order], rtol=1e-12)


@PROPERTIES
@given(_classes())
def test_a_number_added_to_all_logits_changes_nothing(case: tuple[list[list[float]], list[int]]) -> None:
    logits, labels = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    for score in (log_odds, modified_entropy, sample_loss):
        np.testing.assert_allclose(score(logits + 64, labels), score(logits, labels), rtol=1e-7, atol=1e-12)


def test_a_model_that_knows_nothing_scores_by_the_number_of_classes() -> None:
    for classes in (2, 5, 14):
        logits, labels = torch.zeros(3, classes), torch.tensor([0, 1, classes - 1])
        rest = (classes - 1) / classes
        np.testing.assert_allclose(log_odds(logits, labels), -math.log(classes - 1), atol=1e-12)
        np.testing.assert_allclose(sample_loss(logits, labels), math.log(classes), rtol=1e-12)
        expected = rest * math.log(classes) - rest * math.log(rest)
        np.testing.assert_allclose(modified_entropy(logits, labels), expected, rtol=1e-12)


# Findings


@PROPERTIES
@given(FINDINGS)
def test_the_score_is_the_mean_over_known_findings(rows: list) -> None:
    found = finding_log_odds(*_tensors(rows))
    assert found.dtype == torch.float64
    for row, score in zip(rows, found.tolist()):
        terms = [(2 * y - 1) * z for z, y in row if not math.isnan(y)]
        assert score == pytest.approx(sum(terms) / len(terms) if terms else NAN, rel=1e-9, abs=1e-9, nan_ok=True)


@PROPERTIES
@given(FINDINGS)
def test_loss_and_entropy_of_findings_are_the_mean_over_known_ones(rows: list) -> None:
    losses, entropies = sample_loss(*_tensors(rows)), modified_entropy(*_tensors(rows))
    for row, loss, entropy in zip(rows, losses.tolist(), entropies.tolist()):
        known = [(z, y) for z, y in row if not math.isnan(y)]
        terms = [-y * math.log(expit(z)) - (1 - y) * math.log(expit(-z)) for z, y in known]
        assert loss == pytest.approx(np.mean(terms) if terms else NAN, rel=1e-9, abs=1e-12, nan_ok=True)
        for (z, y), term in zip(known, terms):
            if y in (0, 1) and abs(z) < 15:
                assert term == pytest.approx(log_loss([y], [expit(z)], labels=[0, 1]), rel=1e-6)
        terms = []
        for z, y in known:
            if y != 0.5:
                p = expit(z) if y > 0.5 else expit(-z)  # of the true answer
                wrong = expit(-z) if y > 0.5 else expit(z)
                terms.append(-wrong * math.log(p) - wrong * math.log(p))  # 1 − p_other is p
        assert entropy == pytest.approx(np.mean(terms) if terms else NAN, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("classes", "findings"),
    [(log_odds, finding_log_odds), (modified_entropy, modified_entropy), (sample_loss, sample_loss)],
)
def test_the_score_of_one_finding_is_that_of_two_classes(classes: Callable, findings: Callable) -> None:
    logits, labels = 5 * torch.randn(9, 1, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    two = torch.cat([torch.zeros(9, 1), logits], 1)
    torch.testing.assert_close(findings(logits, labels[:, None].float()), classes(two, labels), rtol=1e-12, atol=1e-15)


def test_half_precision_is_scored_in_double_and_unknown_findings_do_not_count() -> None:
    logits = torch.tensor([[60000.0, 60000.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float16)
    labels = torch.tensor([[1, 1, NAN], [NAN, NAN, NAN]], dtype=torch.float16)
    for score, expected in ((finding_log_odds, 60000), (modified_entropy, 0), (sample_loss, 0)):
        scores = score(logits, labels)
        assert scores[0] == expected
        assert scores[1].isnan()


def test_an_unknown_finding_is_left_out_whatever_its_logit() -> None:
    known, labels = torch.tensor([[1.5, -0.5]]), torch.tensor([[1.0, 0.0]])
    more, more_labels = torch.tensor([[1.5, 1e30, -0.5]]), torch.tensor([[1.0, NAN, 0.0]])
    for score in (finding_log_odds, modified_entropy, sample_loss):
        assert score(more, more_labels).item() == pytest.approx(score(known, labels).item(), rel=1e-12)


# Both


@PROPERTIES
@given(_classes())
def test_probabilities_are_scipys(case: tuple[list[list[float]], list[int]]) -> None:
    logits = torch.tensor(case[0], dtype=torch.float32)
    shares, each = probabilities(logits, multi_label=False), probabilities(logits, multi_label=True)
    assert shares.dtype == each.dtype == torch.float64
    np.testing.assert_allclose(shares, softmax(logits.double().numpy(), axis=1), rtol=1e-12)
    np.testing.assert_allclose(each, expit(logits.double().numpy()), rtol=1e-12)


def test_scores_are_computed_in_double_precision_without_touching_their_input() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float16)
    labels = torch.tensor([0], dtype=torch.int32)
    before = logits.clone()
    assert log_odds(logits, labels).item() == pytest.approx(40 - math.log(2), abs=1e-12)
    assert sample_loss(logits, labels).item() == pytest.approx(2 * math.exp(-40), rel=1e-9)
    assert modified_entropy(logits, labels).item() == pytest.approx(_slow([40.0, 0.0, 0.0], 0)[1], rel=1e-9)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("score", [log_odds, sample_loss, modified_entropy])
@pytest.mark.parametrize(("logits", "labels"), [((3, 1), (3,)), ((3,), (3,)), ((3, 2), (2,)), ((3, 2, 2), (3,))])
def test_classes_of_other_shapes_are_refused(score: Callable, logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits should be B × C with C ≥ 2 and labels B"):
        score(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("score", [finding_log_odds, sample_loss, modified_entropy])
@pytest.mark.parametrize(("logits", "labels"), [((3, 2), (2, 2)), ((3, 2, 2), (3, 2)), ((3,), (3, 1))])
def test_findings_of_other_shapes_are_refused(score: Callable, logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits and labels should both be B × L"):
        score(torch.zeros(logits), torch.zeros(labels))


@pytest.mark.parametrize("score", [log_odds, sample_loss, modified_entropy])
@pytest.mark.parametrize("label", [-1, 2, -100])
def test_a_label_that_is_no_class_is_refused(score: Callable, label: int) -> None:
    """-100 is what PyTorch's own cross entropy leaves out without a word."""
    with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|out of range"):
        score(torch.zeros(1, 2), torch.tensor([label]))


@pytest.mark.parametrize("score", [log_odds, sample_loss, modified_entropy])
def test_logits_that_are_no_numbers_give_no_score(score: Callable) -> None:
    found = score(torch.tensor([[NAN, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert found.isnan().tolist() == [True, False]
