"""Groups of samples, such as sexes, age bands or sites, and how much a figure differs between them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["age_bands", "groups_of", "holm", "largest_difference", "permutation_test"]

BANDS = ("0-17", "18-39", "40-59", "60-79", "80+")
BAND_STARTS = (18, 40, 60, 80)
OLDEST = 150
THIRDS = ("lowest third", "middle third", "highest third")
# How DICOM counts an age, in years.
UNITS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1}
NOT_KNOWN = {"", "nan", "na", "n/a", "<na>"}


def age_bands(values: pd.Series | np.ndarray) -> np.ndarray:
    """Age bands, ``0-17``, ``18-39``, ``40-59``, ``60-79`` or ``80+``, of ages in years.

    Args:
        values: N ages: numbers, numbers as text, or DICOM's (``045Y``, ``018M``). Text that is no age is taken for a
            band and left as it is.

    Returns:
        Text array of shape N; ``""`` where an age is not known, negative or above 150.
    """
    texts = _texts(values).tolist()
    bands = {text: _band(text) for text in set(texts)}
    return np.array([bands[text] for text in texts], dtype=str)


def groups_of(column: pd.Series | np.ndarray, min_size: int = 2, max_groups: int = 12) -> np.ndarray | None:
    """Groups of the samples by a column of their metadata.

    Each value is a group, and numbers of more than ``max_groups`` different values are cut into the ``lowest third``,
    the ``middle third`` and the ``highest third``; equal numbers stay together, so thirds may be of unlike sizes. Pass
    the column of all samples at once, so that a group means the same in each part of the data.

    Args:
        column: N values of any type.
        min_size: samples that a group should have; those of smaller ones belong to none.
        max_groups: number of different values that are kept as they are.

    Returns:
        Text array of shape N, ``""`` for samples that are in no group; None where the column is text of more than
        ``max_groups`` different values, as ids are.
    """
    labels = _texts(column).astype(object)
    known = labels != ""
    if len(set(labels[known].tolist())) > max_groups:
        numbers = pd.to_numeric(pd.Series(labels[known]), errors="coerce").to_numpy(dtype=float)
        if not np.isfinite(numbers).all():
            return None
        ends = np.quantile(numbers, [1 / 3, 2 / 3])
        labels[known] = np.array(THIRDS, dtype=object)[np.searchsorted(ends, numbers)]
    names, place, sizes = np.unique(labels.astype(str), return_inverse=True, return_counts=True)
    return np.where(sizes < min_size, "", names)[place]


def largest_difference(values: np.ndarray, groups: np.ndarray) -> tuple[str, str, float]:
    """The groups with the highest and with the lowest mean, and the difference of these means.

    Groups of fewer than two samples are left out. Between equal means the first name in order is the highest and the
    last one the lowest.

    Args:
        values: N figures, one a sample; NaN where a sample has none, which leaves it out.
        groups: N names; ``""`` where a sample is in no group.

    Returns:
        Name of the highest, name of the lowest, and the difference, at least 0; two empty names and NaN where fewer
        than two groups are left.

    Raises:
        ValueError: if shapes do not fit, or a value is infinite.
    """
    values, place, names, _ = _grouped(values, groups)
    if len(names) < 2:
        return "", "", float("nan")
    means = np.bincount(place, values) / np.bincount(place)
    high, low = int(means.argmax()), len(means) - 1 - int(means[::-1].argmin())
    return str(names[high]), str(names[low]), float(means[high] - means[low])


def permutation_test(
    values: np.ndarray,
    groups: np.ndarray,
    clusters: np.ndarray | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> float:
    """p-value of ``largest_difference``, if a sample's group had nothing to do with its value.

    Groups are permuted between clusters (patients), whose samples are not independent: all samples of a cluster get
    the group of another one. A cluster whose samples are in several groups, such as a patient with two views or one who
    grew out of an age band, has no group to exchange: there, groups are permuted between its own samples. Both leave
    the distribution unchanged under the null hypothesis, and the difference that is tested is that of
    ``largest_difference`` itself. The order of the samples does not matter.

    Args:
        values: N figures, one a sample; NaN where a sample has none, which leaves it out.
        groups: N names; ``""`` where a sample is in no group.
        clusters: cluster of each sample; by default, each sample is its own.
        permutations: number of random permutations, at least 1.
        seed: seed of the permutations.

    Returns:
        (1 + number of permutations whose difference is at least that large) / (1 + permutations); NaN where fewer than
        two groups are left.

    Raises:
        ValueError: if shapes do not fit, a value is infinite, or ``permutations`` is below 1.

    References:
        Phipson and Smyth, Permutation P-values Should Never Be Zero, Stat. Appl. Genet. Mol. Biol. 9 (2010),
        arXiv:1603.05766.
    """
    if permutations < 1:
        raise ValueError(f"permutations should be at least 1, but got {permutations!r}.")
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"clusters should name the cluster of each of {len(values)} samples, but got {len(clusters)}.")
    values, place, names, kept = _grouped(values, groups)
    if len(names) < 2:
        return float("nan")
    cluster = np.arange(len(values))
    if clusters is not None:
        cluster = np.unique(np.asarray(clusters)[kept].astype(str), return_inverse=True)[1]
    order = np.lexsort((values, place)) if clusters is None else np.lexsort((values, place, cluster))
    values, place = values[order], place[order]
    if clusters is not None:
        cluster = cluster[order]

    # Of a cluster in one group its sum and its number of samples are enough.
    starts = np.flatnonzero(np.diff(cluster, prepend=-1))
    sizes = np.diff(starts, append=len(cluster))
    sums, own = np.add.reduceat(values, starts), place[starts]
    whole = own == place[starts + sizes - 1]  # sorted by group within a cluster
    sums, own, weights = sums[whole], own[whole], sizes[whole].astype(float)
    mixed = np.repeat(~whole, sizes)
    mixed_values, mixed_place = values[mixed], place[mixed]
    mixed_cluster = np.repeat(np.arange(len(sizes)), sizes)[mixed].astype(float)
    mixed_counts = np.bincount(mixed_place, minlength=len(names))

    def difference(own: np.ndarray, mixed_place: np.ndarray) -> float:
        totals = np.bincount(own, sums, len(names)) + np.bincount(mixed_place, mixed_values, len(names))
        means = totals / (np.bincount(own, weights, len(names)) + mixed_counts)
        return float(means.max() - means.min())

    generator = np.random.default_rng(seed)
    # Sums in another order differ in their last digits.
    observed = difference(own, mixed_place) - 1e-12 * float(np.abs(values).max())
    reached = 0
    for _ in range(permutations):
        shuffled = generator.permutation(own)
        if len(mixed_cluster):
            # Sorting by cluster and a random number below 1 shuffles within each cluster.
            shuffled_mixed = mixed_place[np.argsort(mixed_cluster + generator.random(len(mixed_cluster)))]
        else:
            shuffled_mixed = mixed_place
        reached += difference(shuffled, shuffled_mixed) >= observed
    return (1 + reached) / (1 + permutations)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction: p-values that keep the chance of any false finding at the level of a single test.

    Args:
        p_values: shape N, in [0, 1]; NaN where a test is undefined, which stays NaN and does not count as a test.

    Returns:
        Float64 array of shape N, none below its uncorrected value.

    Raises:
        ValueError: if a value is outside [0, 1].

    References:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Statist. 6 (1979).
    """
    p_values = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(p_values))
    if not ((p_values[known] >= 0) & (p_values[known] <= 1)).all():
        raise ValueError(f"p_values should be in [0, 1] or NaN, but got {p_values.tolist()}.")
    order = known[np.argsort(p_values[known])]
    corrected = np.full(p_values.shape, np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return corrected


def _grouped(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values, number of their group, names of the groups, and which samples were kept."""
    values, groups = np.asarray(values, dtype=float), np.asarray(groups).astype(str)
    if values.ndim != 1 or groups.shape != values.shape:
        raise ValueError(f"values and groups should both have shape N, but got {values.shape} and {groups.shape}.")
    if np.isinf(values).any():
        raise ValueError("values should be finite, or NaN where a sample has none, but some are infinite.")
    kept = np.flatnonzero(~np.isnan(values) & (groups != ""))
    names, place, sizes = np.unique(groups[kept], return_inverse=True, return_counts=True)
    large = sizes > 1
    of_large = large[place]
    return values[kept][of_large], (np.cumsum(large) - 1)[place[of_large]], names[large], kept[of_large]


def _texts(column: Any) -> np.ndarray:
    """Values as text, "" where they are not known; whole numbers without a point, as a gap turns them into floats."""
    series = pd.Series(column, dtype=None if len(column) else object)
    texts = []
    for value, missing in zip(series.tolist(), series.isna()):
        if isinstance(value, float):
            text = "" if not math.isfinite(value) else str(int(value)) if value.is_integer() else str(value)
        else:
            text = "" if missing else str(value).strip()
        texts.append("" if text.lower() in NOT_KNOWN else text)
    return np.array(texts, dtype=str)


def _band(text: str) -> str:
    """The band of an age; the text itself where it is none."""
    match = re.fullmatch(r"(\d+)([DWMY])", text.upper())
    try:
        age = int(match[1]) * UNITS[match[2]] if match else float(text)
    except ValueError:
        return text
    return BANDS[int(np.searchsorted(BAND_STARTS, age, side="right"))] if 0 <= age <= OLDEST else ""
