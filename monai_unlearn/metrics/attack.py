"""A population attack: can forget samples be told from samples that were never trained on?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from monai_unlearn.metrics.resampling import CELLS, group_numbers, resampled_counts

__all__ = [
    "AttackFigures",
    "Sides",
    "attack_auc",
    "attack_figures",
    "attack_roc",
    "cross_fitted_scores",
    "detectable_difference",
    "matching_weights",
]

FOLDS = 5
RATES = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}


def attack_auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Probability that a member scores higher than a non-member, ties counting half.

    Samples that have no score (NaN: no known finding) are left out.

    Args:
        members: scores of the forget samples, the positive class.
        non_members: scores of samples never trained or tuned on.

    Returns:
        A value in [0, 1]; NaN if either is empty.
    """
    members, non_members = members[~np.isnan(members)], non_members[~np.isnan(non_members)]
    n, m = len(members), len(non_members)
    if not n or not m:
        return float("nan")
    ranks = rankdata(np.concatenate([members, non_members]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def matching_weights(member_strata: np.ndarray, non_member_strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights by which non-members have the members' shares of each stratum (class, sex, …).

    Args:
        member_strata: stratum of each of n members.
        non_member_strata: stratum of each of m non-members.

    Returns:
        Weights of the members, 1 or, where no non-member is of their stratum, 0; and of the non-members, which sum
        to the number of members that are left.
    """
    strata, numbers = np.unique(np.concatenate([member_strata, non_member_strata]), return_inverse=True)
    ours, theirs = numbers[: len(member_strata)], numbers[len(member_strata) :]
    members, others = (np.bincount(side, minlength=len(strata)) for side in (ours, theirs))
    factor = np.divide(members, others, out=np.zeros(len(strata)), where=others > 0)
    return (others[ours] > 0).astype(np.float64), factor[theirs]


def attack_roc(
    members: np.ndarray, non_members: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at each threshold, from (0, 0) to (1, 1).

    Args:
        members: scores of n members, finite.
        non_members: scores of m non-members, finite.
        weights: weights of the non-members; by default equal.
    """
    values, place = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    shares = []
    for places, weight in ((place[len(members) :], weights), (place[: len(members)], None)):
        total = np.bincount(places, weights=weight, minlength=len(values))[::-1].cumsum()
        shares.append(np.concatenate([[0.0], total / total[-1]]))
    return shares[0], shares[1]


@dataclass(frozen=True)
class Sides:
    """Whom an attack compares: members with non-members of the same strata, in whole groups.

    Args:
        member_groups: group (patient) of each of n members; None: each its own.
        non_member_groups: the same of m non-members.
        member_strata: stratum of each member, by which non-members are matched; None: no matching.
        non_member_strata: the same of the non-members.
    """

    member_groups: np.ndarray | None = None
    non_member_groups: np.ndarray | None = None
    member_strata: np.ndarray | None = None
    non_member_strata: np.ndarray | None = None

    def weights(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Matching weights of n members and m non-members; 1 each without strata."""
        if self.member_strata is None or self.non_member_strata is None:
            return np.ones(n), np.ones(m)
        return matching_weights(self.member_strata, self.non_member_strata)


@dataclass(frozen=True)
class AttackFigures:
    """Figures of K attacks on the same samples, and of the same R bootstrap resamples of them.

    Attributes:
        values: K values each of ``auc``, ``balanced_accuracy``, ``tpr_at_1_percent`` and ``tpr_at_0.1_percent``.
        resampled: the same, R × K each, by name; empty where a side has fewer than two groups.
    """

    values: dict[str, np.ndarray]
    resampled: dict[str, np.ndarray]


def attack_figures(
    members: np.ndarray, non_members: np.ndarray, sides: Sides | None = None, resamples: int = 1000, seed: int = 0
) -> AttackFigures:
    """AUC, balanced accuracy and true positive rates at low false positive rates, with paired resamples.

    Non-members are weighted to the members' strata, in each resample anew. Members and non-members are resampled
    separately, in whole groups. The balanced accuracy is that of thresholds which are fitted on four fifths of the
    groups and tried on the last, so that no sample fits its own threshold; in the resamples its guesses stay. It is
    NaN where a fold holds all of a side, so that nothing is left to fit one on.
    ``tpr_at_…`` is the largest true positive rate of a threshold whose false positive rate is at most that; NaN where
    there are fewer non-members than one over it, not counting those that match no member.

    Args:
        members: K × n scores of the members, one row an attack (a model, a kind of score); finite, higher: member.
        non_members: K × m scores of the non-members.
        sides: groups and strata.
        resamples: number of bootstrap resamples.
        seed: seed of resamples and folds.

    Raises:
        ValueError: if a score is NaN, or groups or strata are not those of n members and m non-members.
    """
    sides = sides or Sides()
    if np.isnan(members).any() or np.isnan(non_members).any():
        raise ValueError("scores should be numbers, but some are NaN. Leave out samples that have none.")
    attacks, n, m = len(members), members.shape[1], non_members.shape[1]
    names = ("auc", "balanced_accuracy", *RATES)
    groups = group_numbers(sides.member_groups, n), group_numbers(sides.non_member_groups, m)
    strata = _strata(sides, n, m)
    matched = int((sides.weights(n, m)[1] > 0).sum())
    if not n or not matched:
        return AttackFigures({name: np.full(attacks, np.nan) for name in names}, {})
    rates = {name: rate for name, rate in RATES.items() if matched * rate >= 1}
    sorted_scores = [_Sorted.of(ours, theirs) for ours, theirs in zip(members, non_members)]
    guesses = [_guesses(ours, theirs, sides, groups, seed) for ours, theirs in zip(members, non_members)]

    def figures(counts: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
        counts, others = _matched(counts, others, strata)
        piece: dict[str, list[np.ndarray]] = {name: [] for name in names}
        undefined = dict.fromkeys(names, np.full(len(counts), np.nan))
        for scores, (right, wrong) in zip(sorted_scores, guesses):
            found = undefined | scores.figures(counts, others, rates)
            hits, alarms = counts @ right / counts.sum(1), others @ wrong / others.sum(1)
            found["balanced_accuracy"] = (hits + 1 - alarms) / 2
            for name in names:
                piece[name].append(found[name])
        return {name: np.stack(values, axis=1) for name, values in piece.items()}

    with np.errstate(invalid="ignore", divide="ignore"):
        values = {name: value[0] for name, value in figures(np.ones((1, n)), np.ones((1, m))).items()}
        sizes = [int(group.max()) + 1 for group in groups]
        if min(sizes) < 2 or resamples < 1:
            return AttackFigures(values, {})
        rows = max(1, CELLS // (n + m))
        seeds = np.random.SeedSequence(seed).spawn(2)
        draws = (resampled_counts(size, resamples, np.random.default_rng(s), rows) for size, s in zip(sizes, seeds))
        pieces = [figures(ours[:, groups[0]], theirs[:, groups[1]]) for ours, theirs in zip(*draws)]
    return AttackFigures(values, {name: np.concatenate([piece[name] for piece in pieces]) for name in names})


def cross_fitted_scores(
    member_features: np.ndarray,
    non_member_features: np.ndarray,
    sides: Sides | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of an attack that is fitted: logistic regression on features, each sample scored by one fitted without it.

    Five folds of whole groups, each scored by a regression that was fitted on the folds before it; the first has no
    score. Features are standardised and non-members weighted to the members' strata.

    Why not on all other folds: where two samples help to score each other, the AUC of all scores varies more than that
    of as many independent ones (without any difference between the sides by a third more), which no resampling of the
    scores can show.

    Args:
        member_features: n × F, finite.
        non_member_features: m × F, finite.
        sides: groups and strata.
        seed: seed of the folds.

    Returns:
        n and m scores, higher: member; NaN where a side has fewer than two groups, and where nothing could be fitted.

    References:
        Bengio and Grandvalet, No Unbiased Estimator of the Variance of K-Fold Cross-Validation, JMLR 5 (2004); Dawid,
        Statistical Theory: The Prequential Approach, J. R. Stat. Soc. A 147 (1984).
    """
    sides = sides or Sides()
    n, m = len(member_features), len(non_member_features)
    features = np.concatenate([member_features, non_member_features])
    truth = np.repeat([1, 0], [n, m])
    scores = np.full(n + m, np.nan)
    weights = np.concatenate(sides.weights(n, m))
    groups = group_numbers(sides.member_groups, n), group_numbers(sides.non_member_groups, m)
    if not n or not m or min(group.max() for group in groups) < 1:
        return scores[:n], scores[n:]
    folds = np.concatenate(_folds(groups, seed))
    for fold in np.unique(folds):
        fit = folds < fold
        sums = np.bincount(truth[fit], weights=weights[fit], minlength=2)
        if (sums == 0).any():
            continue
        balanced = weights[fit] * fit.sum() / (2 * sums[truth[fit]])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(features[fit], truth[fit], logisticregression__sample_weight=balanced)
        # Models of different folds differ in scale: as ranks among the samples that each was fitted on, their scores
        # compare. Without it the AUC on noise is below ½.
        fitted = np.sort(model.decision_function(features[fit]))
        own = folds == fold
        scores[own] = np.searchsorted(fitted, model.decision_function(features[own])) / len(fitted)
    return scores[:n], scores[n:]


def detectable_difference(n: int, m: int) -> float:
    """Difference of a population attack's AUC from ½ that n members and m non-members can just show at 95 %.

    1.96 times the standard error of the AUC when the scores of both come from one distribution,
    √((n + m + 1) / (12 n m)). Samples have to be independent: where images belong to patients, their numbers of
    patients are the ones to take.

    Args:
        n: number of members.
        m: number of non-members.

    Returns:
        A positive number, above ½ where not even perfect separation would show; NaN if either is 0.

    References:
        Mann and Whitney, On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other,
        Ann. Math. Statist. 18 (1947).
    """
    if not n or not m:
        return float("nan")
    return 1.96 * float(np.sqrt((n + m + 1) / (12 * n * m)))


@dataclass(frozen=True)
class _Sorted:
    """Scores of one attack, sorted once for all resamples."""

    members: np.ndarray  # order of the members, ascending
    others: np.ndarray  # order of the non-members, ascending
    below: np.ndarray  # for each member, how many non-members score lower
    upto: np.ndarray  # for each member, how many score lower or the same
    above: np.ndarray  # for the j-th highest non-member, how many members score higher

    @classmethod
    def of(cls, members: np.ndarray, others: np.ndarray) -> _Sorted:
        order, theirs = np.argsort(members, kind="stable"), np.argsort(others, kind="stable")
        low, high = (np.searchsorted(others[theirs], members, side=side) for side in ("left", "right"))
        above = len(members) - np.searchsorted(members[order], others[theirs[::-1]], side="right")
        return cls(order, theirs, low, high, above)

    def figures(self, counts: np.ndarray, others: np.ndarray, rates: dict[str, float]) -> dict[str, np.ndarray]:
        """AUC and true positive rates of each row of weights of members and non-members."""
        ours, theirs = counts.sum(1), others.sum(1)
        lower = np.zeros((len(others), others.shape[1] + 1))
        np.cumsum(others[:, self.others], axis=1, out=lower[:, 1:])
        half = lower[:, self.below]
        if not np.array_equal(self.below, self.upto):
            half = (half + lower[:, self.upto]) / 2
        # Sums of weights are rounded: without its limits the AUC of separated scores is at times just above 1.
        found = {"auc": np.clip(np.einsum("ij,ij->i", counts, half) / (ours * theirs), 0, 1)}
        higher = np.zeros((len(counts), counts.shape[1] + 1))
        np.cumsum(counts[:, self.members[::-1]], axis=1, out=higher[:, 1:])
        from_top = theirs[:, None] - lower[:, ::-1][:, 1:]  # weight of the j + 1 highest non-members
        for name, rate in rates.items():
            # The highest threshold that may not be passed is that of the first non-member beyond the rate. Sums of
            # many weights are rounded by more than a few last digits.
            admitted = (from_top <= rate * theirs[:, None] * (1 + 1e-9)).sum(1)
            beyond = np.append(self.above, counts.shape[1])[admitted]
            found[name] = higher[np.arange(len(counts)), beyond] / ours
        return found


def _strata(sides: Sides, n: int, m: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One-hot strata of both sides, or None where there is only one."""
    if sides.member_strata is None or sides.non_member_strata is None:
        return None
    if len(sides.member_strata) != n or len(sides.non_member_strata) != m:
        raise ValueError(
            f"strata should be those of {n} members and {m} non-members, but are "
            f"{len(sides.member_strata)} and {len(sides.non_member_strata)}."
        )
    strata, numbers = np.unique(np.concatenate([sides.member_strata, sides.non_member_strata]), return_inverse=True)
    if len(strata) == 1:
        return None
    return numbers[:n], numbers[n:]


def _matched(
    counts: np.ndarray, others: np.ndarray, strata: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of both sides in each resample, non-members weighted to the members' strata."""
    if strata is None:
        return counts, others
    size = int(max(side.max() for side in strata)) + 1
    totals = [weights @ np.eye(size)[side] for weights, side in zip((counts, others), strata)]
    factor = np.divide(totals[0], totals[1], out=np.zeros_like(totals[0]), where=totals[1] > 0)
    return counts * (totals[1] > 0)[:, strata[0]], others * factor[:, strata[1]]


def _folds(groups: tuple[np.ndarray, np.ndarray], seed: int) -> list[np.ndarray]:
    """Fold of each sample of both sides: whole groups, about as many of either side in each."""
    random = np.random.default_rng(seed)
    return [random.permutation(int(group.max()) + 1)[group] % FOLDS for group in groups]


def _guesses(
    members: np.ndarray, others: np.ndarray, sides: Sides, groups: tuple[np.ndarray, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample is taken for a member by a threshold that was fitted without its fold; NaN if none was."""
    weights = sides.weights(len(members), len(others))
    folds = _folds(groups, seed)
    guesses = np.full(len(members), np.nan), np.full(len(others), np.nan)
    for fold in range(FOLDS):
        fit = [part != fold for part in folds]
        threshold = _threshold(*(s[f] for s, f in zip((members, others), fit)), *(w[f] for w, f in zip(weights, fit)))
        for guess, scores, part in zip(guesses, (members, others), fit):
            guess[~part] = np.nan if np.isnan(threshold) else scores[~part] >= threshold
    return guesses


def _threshold(members: np.ndarray, others: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The threshold of the best balanced accuracy, midway to the next lower score; NaN if a side has no weight."""
    if ours.sum() == 0 or theirs.sum() == 0:
        return float("nan")
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    hits = np.bincount(place[: len(members)], ours, minlength=len(values))[::-1].cumsum() / ours.sum()
    alarms = np.bincount(place[len(members) :], theirs, minlength=len(values))[::-1].cumsum() / theirs.sum()
    best = int(np.argmax(hits - alarms))
    lowest = len(values) - 1 - best
    return float(values[lowest] if lowest == 0 else (values[lowest] + values[lowest - 1]) / 2)
