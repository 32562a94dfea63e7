"""Bootstrap: the same resamples for all figures that are compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["group_numbers", "interval", "resampled_counts", "resampled_sums", "two_sided_p"]

CELLS = 4_000_000  # numbers that a piece of resamples may have: 32 MB
DEFINED = 0.9  # share of the resamples in which a figure has to be defined


def group_numbers(groups: np.ndarray | None, n: int) -> np.ndarray:
    """Groups as whole numbers from 0, in the order in which they first appear; without groups each sample is its own.

    Args:
        groups: group (patient) of each of n samples, or None.
        n: number of samples.
    """
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups should name the group of each of {n} samples, but got {len(groups)}.")
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[numbers]


def resampled_counts(
    groups: int, resamples: int, generator: np.random.Generator, rows: int | None = None
) -> Iterator[np.ndarray]:
    """How often each group is drawn when as many are drawn with replacement as there are.

    Args:
        groups: number of groups, at least 1.
        resamples: number of resamples in all.
        generator: source of the draws.
        rows: resamples a piece; by default as many as keep it small.

    Yields:
        Pieces of the R × groups table of counts, float64, a few resamples at a time.
    """
    rows = rows or max(1, CELLS // groups)
    for start in range(0, resamples, rows):
        piece = min(rows, resamples - start)
        drawn = generator.integers(groups, size=(piece, groups)) + groups * np.arange(piece)[:, None]
        yield np.bincount(drawn.ravel(), minlength=piece * groups).reshape(piece, groups).astype(np.float64)


def resampled_sums(columns: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int) -> np.ndarray:
    """Sums of columns over bootstrap resamples of whole groups, the same resamples for each column.

    Means, shares and their differences are ratios of such sums.

    Args:
        columns: N × K, finite.
        groups: group of each sample; None: each its own.
        resamples: number of resamples, R.
        seed: seed of the draws.

    Returns:
        R × K; zeros where there is no sample.
    """
    group = group_numbers(groups, len(columns))
    if not len(columns) or resamples < 1:
        return np.zeros((max(resamples, 0), columns.shape[1]))
    size = int(group.max()) + 1
    sums = np.empty((size, columns.shape[1]))
    for k in range(columns.shape[1]):
        sums[:, k] = np.bincount(group, weights=columns[:, k], minlength=size)
    drawn = resampled_counts(size, resamples, np.random.default_rng(seed))
    return np.concatenate([counts @ sums for counts in drawn])


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled figures; NaN where fewer than nine in ten of them are defined.

    Its ends are expected quantiles of the resamples' distribution ((R + 1) p-th of R in order), so that few resamples
    don't make it too short, and it excludes 0 where ``two_sided_p`` is below 1 − level.

    Args:
        values: one figure a resample; NaN where it is undefined.
        level: coverage, in (0, 1).
    """
    defined = values[~np.isnan(values)]
    if len(values) == 0 or len(defined) < DEFINED * len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def two_sided_p(values: np.ndarray) -> float:
    """p-value of "no difference" by resampled differences: the level at which their percentile interval reaches 0.

    At least 2 / (R + 1), and 1 where half of them lie on either side; NaN where fewer than nine in ten are defined.

    Args:
        values: one difference a resample, of which R are defined; NaN where it is undefined.
    """
    defined = values[~np.isnan(values)]
    if len(values) == 0 or len(defined) < DEFINED * len(values):
        return float("nan")
    below, above = ((1 + beyond.sum()) / (1 + len(defined)) for beyond in (defined <= 0, defined >= 0))
    return float(min(1.0, 2 * min(below, above)))
