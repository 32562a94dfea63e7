"""The population attack, against scikit-learn, closed forms and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, mannwhitneyu, norm
from sklearn.metrics import roc_auc_score

from monai_unlearn.metrics import attack_auc, attack_auc_interval, detectable_difference, log_odds

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=100)
# A few whole numbers, so that ties are common.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30).map(np.array)


@PROPERTIES
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**31), st.floats(0.1, 8))
def test_log_odds_are_those_of_the_softmax(n: int, classes: int, seed: int, scale: float) -> None:
    random = np.random.RandomState(seed)
    logits, labels = scale * random.randn(n, classes), random.randint(0, classes, n)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    true = shares[np.arange(n), labels]
    others = np.array([sum(p for c, p in enumerate(row) if c != label) for row, label in zip(shares, labels)])
    found = log_odds(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, np.log(true) - np.log(others), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [100.0, 1000.0, 1e6])
def test_log_odds_do_not_saturate(size: float) -> None:
    logits = torch.tensor([[size, 0.0], [size + 1, 0.0], [0.0, size], [size, size]], dtype=torch.float32)
    assert log_odds(logits, torch.tensor([0, 0, 0, 1])).tolist() == [size, size + 1, -size, 0]


def test_log_odds_are_computed_in_double_precision_without_touching_their_input() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float16)
    labels = torch.tensor([0], dtype=torch.int32)
    before = logits.clone()
    assert log_odds(logits, labels).item() == pytest.approx(40 - math.log(2), abs=1e-12)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "labels"), [((3, 1), (3,)), ((3,), (3,)), ((3, 2), (2,)), ((3, 2), (3, 1)), ((3, 2, 2), (3,))]
)
def test_logits_and_labels_of_other_shapes_are_refused(logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="logits should be B × C with C ≥ 2 and labels B"):
        log_odds(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@PROPERTIES
@given(SCORES, SCORES)
def test_the_auc_is_scikit_learns_and_swapping_mirrors_it(members: np.ndarray, others: np.ndarray) -> None:
    auc = attack_auc(members, others)
    truth = np.repeat([1, 0], [len(members), len(others)])
    assert auc == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])), abs=1e-12)
    assert attack_auc(others, members) == pytest.approx(1 - auc, abs=1e-12)
    assert auc == pytest.approx(np.mean([(m > o) + (m == o) / 2 for m in members for o in others]), abs=1e-12)


@PROPERTIES
@given(SCORES, SCORES)
def test_only_the_order_of_the_scores_matters(members: np.ndarray, others: np.ndarray) -> None:
    assert attack_auc(np.exp(members), np.exp(others)) == attack_auc(members, others)


def test_a_higher_score_means_a_member() -> None:
    assert attack_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert attack_auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0
    assert attack_auc(np.zeros(4), np.zeros(7)) == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_two_gaussians_have_the_auc_of_the_closed_form(shift: float) -> None:
    random = np.random.default_rng(0)
    n = 20_000
    found = attack_auc(random.normal(shift, 1, n), random.normal(0, 1, n))
    assert found == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=5 * math.sqrt(1 / (6 * n)))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_without_samples_there_is_no_auc(n: int, m: int) -> None:
    assert math.isnan(attack_auc(np.zeros(n), np.zeros(m)))


def _draw(seed: int, n: int = 40, m: int = 50, shift: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(shift, 1, n), random.normal(0, 1, m)


def test_the_interval_is_that_of_a_loop_over_resampled_scores() -> None:
    members, others = _draw(0, 15, 12)
    members, others = members.round(), others.round()
    generator = np.random.default_rng(4)
    aucs = []
    for _ in range(200):
        drawn = [scores[generator.integers(len(scores), size=len(scores))] for scores in (members, others)]
        aucs.append(attack_auc(*drawn))
    found = attack_auc_interval(members, others, level=0.8, resamples=200, seed=4)
    np.testing.assert_allclose(found, np.quantile(aucs, [0.1, 0.9]), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_estimate_and_widens_with_its_level(seed: int) -> None:
    members, others = _draw(seed)
    low, high = attack_auc_interval(members, others)
    assert 0 <= low < attack_auc(members, others) < high <= 1
    wide = attack_auc_interval(members, others, level=0.99)
    assert wide[0] < low < high < wide[1]
    more = attack_auc_interval(*_draw(seed, 400, 500))
    assert more[1] - more[0] < 0.6 * (high - low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    shift, draws, level = 0.8, 150, 0.9
    truth = norm.cdf(shift / math.sqrt(2))
    intervals = [attack_auc_interval(*_draw(seed, 60, 60, shift), level=level, resamples=200) for seed in range(draws)]
    covered = sum(low <= truth <= high for low, high in intervals)
    low, high = binom.interval(0.999, draws, level)
    assert low <= covered <= high


def test_the_same_seed_gives_the_same_interval_and_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    one, two, other = (attack_auc_interval(*_draw(0), seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one != other
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_copies_of_an_image_add_nothing_when_they_are_grouped_by_patient() -> None:
    members, others = _draw(2)
    plain = attack_auc_interval(members, others)
    copies = [np.repeat(scores, 9) for scores in (members, others)]
    patients = [np.repeat([f"{side}{i:03d}" for i in range(n)], 9) for side, n in (("m", 40), ("v", 50))]
    grouped = attack_auc_interval(*copies, *patients)
    naive = attack_auc_interval(*copies)
    np.testing.assert_allclose(grouped, plain, atol=1e-12)
    assert grouped[1] - grouped[0] > 2 * (naive[1] - naive[0])


def test_groups_may_be_given_for_one_side_only() -> None:
    members, others = _draw(2)
    alone = np.arange(40)
    assert attack_auc_interval(members, others, alone) == attack_auc_interval(members, others)
    assert attack_auc_interval(members, others, None, np.arange(50)) == attack_auc_interval(members, others)


@pytest.mark.parametrize(
    ("members", "others", "groups"),
    [
        ([1.0], [0.0, 1.0], (None, None)),
        ([1.0, 2.0], [0.0], (None, None)),
        ([], [0.0, 1.0], (None, None)),
        ([1.0, 2.0], [], (None, None)),
        ([1.0, 2.0], [0.0, 1.0], (np.array(["a", "a"]), None)),
        ([1.0, 2.0], [0.0, 1.0], (None, np.array(["a", "a"]))),
    ],
)
def test_one_sample_or_one_patient_gives_no_interval(members: list, others: list, groups: tuple) -> None:
    assert np.isnan(attack_auc_interval(np.array(members), np.array(others), *groups)).all()


def test_separated_scores_give_a_degenerate_interval() -> None:
    assert attack_auc_interval(np.array([5.0, 6.0, 7.0]), np.array([0.0, 1.0])) == (1, 1)
    assert attack_auc_interval(np.zeros(3), np.zeros(3)) == (0.5, 0.5)


def test_samples_without_a_score_are_left_out_with_their_groups() -> None:
    members, others = _draw(3)
    groups = [np.arange(len(scores)) // 3 for scores in (members, others)]
    known = [np.arange(len(scores)) % 4 > 0 for scores in (members, others)]
    known[0][:3] = False  # a patient without any
    holed = [np.where(keep, scores, np.nan) for keep, scores in zip(known, (members, others))]
    kept = [scores[keep] for keep, scores in zip(known, (members, others))]
    kept_groups = [group[keep] for keep, group in zip(known, groups)]
    assert attack_auc(*holed) == attack_auc(*kept)
    assert attack_auc_interval(*holed, *groups) == attack_auc_interval(*kept, *kept_groups)
    assert attack_auc_interval(*holed) == attack_auc_interval(*kept)


def test_scores_of_which_none_is_known_give_no_figure() -> None:
    nothing, something = np.full(4, np.nan), np.arange(4.0)
    assert math.isnan(attack_auc(nothing, something))
    assert np.isnan(attack_auc_interval(something, nothing)).all()


@pytest.mark.parametrize(("n", "m"), [(31, 52), (5, 400), (1000, 1000)])
def test_the_detectable_difference_is_where_the_rank_test_turns_significant(n: int, m: int) -> None:
    """Found by shifting ranks until SciPy's test, without its correction for continuity, says 5 %."""
    random = np.random.default_rng(0)
    members, others = random.permutation(n) / n, random.permutation(m) / m
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        p = mannwhitneyu(members + middle, others, method="asymptotic", use_continuity=False).pvalue
        low, high = (middle, high) if p > 0.05 else (low, middle)
    found = attack_auc(members + high, others) - 0.5
    assert found == pytest.approx(detectable_difference(n, m), abs=1.5 / min(n, m))


def test_more_samples_show_smaller_differences_and_none_show_nothing() -> None:
    assert detectable_difference(100, 100) > detectable_difference(200, 100) > detectable_difference(200, 200)
    assert detectable_difference(7, 9) == detectable_difference(9, 7)
    assert detectable_difference(1, 1) == pytest.approx(0.98)
    assert math.isnan(detectable_difference(0, 5))
    assert math.isnan(detectable_difference(5, 0))


def test_unmoved_scores_exceed_the_detectable_difference_in_one_of_twenty_draws() -> None:
    random = np.random.default_rng(1)
    n, m, draws = 25, 40, 800
    beyond = sum(
        abs(attack_auc(random.normal(size=n), random.normal(size=m)) - 0.5) > detectable_difference(n, m)
        for _ in range(draws)
    )
    low, high = binom.interval(0.999, draws, 0.05)
    assert low <= beyond <= high
