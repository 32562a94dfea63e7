"""Bias: the audit's figures broken down by sex, age, site, difficulty or any other column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from monai_unlearn.evaluation.attacks import group_attack
from monai_unlearn.evaluation.audited import SPLITS, Audited, AuditOptions
from monai_unlearn.evaluation.utility import Predictions, predictions
from monai_unlearn.metrics import (
    age_bands,
    groups_of,
    holm,
    interval,
    largest_difference,
    permutation_test,
    resampled_sums,
)

__all__ = ["subgroup_section"]

# Columns that are broken down by where a user names none.
USUAL = (
    *("sex", "gender", "age", "age_band", "ethnicity", "race", "site", "hospital", "institution"),
    *("manufacturer", "scanner", "view", "projection", "difficulty"),
)
DIFFICULTY = "difficulty"
THIRDS = {"lowest third": "easiest third", "middle third": "middle third", "highest third": "hardest third"}


def subgroup_section(audited: Audited, options: AuditOptions) -> dict[str, Any]:
    """Figures of each group, the largest difference between groups, and whether chance explains it.

    The difference is that of the *change* of the share of right answers against the retrained model (against the
    original where there is none): how much more unlearning took from one group than from another. Its p-value is that
    of a permutation test over patients, corrected by Holm for all columns and splits.

    Without a column of that name, ``difficulty`` is each image's EL2N score in thirds, averaged over the models that
    are compared, each of which counts alike: ranked by one of two models, the other does better on what that one finds
    hard by chance, and worse on what it finds easy.

    Args:
        audited: outputs of the models.
        options: how to audit.

    Returns:
        The section ``subgroups`` of the report.

    Raises:
        ValueError: if a column that was asked for is not there, or is text of too many values.
    """
    columns = _columns(audited, options.subgroups)
    section: dict[str, Any] = {name: {"groups": {}, "largest": {}} for name in columns}
    for split in SPLITS:
        models = predictions(audited, split)
        groups = {name: values[split] for name, values in columns.items()}
        unseen = {name: values["validation"] for name, values in columns.items()}
        drawn = _resampled(models, groups, audited.facts[split].people, options)
        for name in columns:
            for group in _names(name, columns[name]):
                rows, others = np.flatnonzero(groups[name] == group), np.flatnonzero(unseen[name] == group)
                changes = drawn.get((name, group), {})
                found = _group(audited, models, split, rows, others, changes, options.specificity)
                section[name]["groups"].setdefault(group, {})[split] = found
            section[name]["largest"][split] = _largest(audited, models, split, name, groups[name], drawn, options)
    tests = [part for column in section.values() for part in column["largest"].values() if part is not None]
    for part, corrected in zip(tests, holm(np.array([part["p"] for part in tests], dtype=float))):
        part["p_holm"] = float(corrected)
    return section


def _names(column: str, groups: Mapping[str, np.ndarray]) -> list[str]:
    """Groups of a column in the order in which a reader expects them."""
    names = sorted({str(group) for values in groups.values() for group in values if group})
    thirds = [group for group in THIRDS.values() if group in names]
    return thirds if column == DIFFICULTY and len(thirds) == len(names) else names


def _columns(audited: Audited, asked: Sequence[str] | None) -> dict[str, dict[str, np.ndarray]]:
    """Column → split → group of each image, ``""`` where it is in none."""
    tables = {split: audited.facts[split].columns for split in SPLITS}
    there = set.intersection(*(set(table.columns) for table in tables.values()))
    if isinstance(asked, str):  # one name, as it comes from a command line
        asked = [asked]
    names = [name for name in USUAL if name in there] if asked is None else list(asked)
    if missing := [name for name in names if name not in there and name != DIFFICULTY]:
        raise ValueError(
            f"subgroups should name columns of the data, but there is no {missing[0]!r} in all of its parts. There "
            f"are: {', '.join(sorted(map(str, there))) or 'none'}."
        )
    ends = np.cumsum([audited.original[split].n for split in SPLITS])[:-1]
    found = {}
    for name in names:
        if name not in there:
            continue
        column = pd.concat([tables[split][name] for split in SPLITS], ignore_index=True)
        groups = groups_of(age_bands(column)) if name == "age" else groups_of(column)
        if groups is None:
            if asked is None:
                continue
            raise ValueError(
                f"subgroups should name columns of a few values, but {name!r} is text of more than 12 different ones. "
                "Leave it out, or group its values in the table."
            )
        found[name] = _by_difficulty(groups) if name == DIFFICULTY else groups
    if DIFFICULTY not in found and (asked is None or DIFFICULTY in asked):
        found[DIFFICULTY] = _by_difficulty(np.concatenate([_thirds(audited, split) for split in SPLITS]))
    return {name: dict(zip(SPLITS, np.split(groups, ends))) for name, groups in found.items()}


def _by_difficulty(groups: np.ndarray) -> np.ndarray:
    return np.array([THIRDS.get(group, group) for group in groups], dtype=str)


def _thirds(audited: Audited, split: str) -> np.ndarray:
    """Thirds of a split by difficulty, which trained and unseen images can't share."""
    compared = [audited.unlearned[0], *(audited.retrained or [audited.original])]
    return _ranked_thirds(np.mean([outputs[split].difficulty for outputs in compared], axis=0))


def _ranked_thirds(scores: np.ndarray) -> np.ndarray:
    groups = np.full(len(scores), "", dtype=object)
    known = np.flatnonzero(~np.isnan(scores))
    order = known[np.argsort(scores[known], kind="stable")]
    for name, part in zip(THIRDS, np.array_split(order, 3)):
        groups[part] = name
    return groups.astype(str)


def _resampled(
    models: Mapping[str, Sequence[Predictions]],
    groups: Mapping[str, np.ndarray],
    people: np.ndarray | None,
    options: AuditOptions,
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(Column, group) → other model → change of the share of right answers in each resample, all from the same ones."""
    values = {other: _difference(models, other) for other in ("original", "retrained") if other in models}
    keys, columns = [], []
    for name, group_of in groups.items():
        for group in sorted({group for group in group_of if group}):
            for other, change in values.items():
                own = (group_of == group) & ~np.isnan(change)
                keys.append((name, group, other))
                columns += [np.where(own, np.nan_to_num(change), 0), own.astype(np.float64)]
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    if columns:
        sums = resampled_sums(np.column_stack(columns), people, options.resamples, options.seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            for i, (name, group, other) in enumerate(keys):
                found.setdefault((name, group), {})[other] = sums[:, 2 * i] / sums[:, 2 * i + 1]
    return found


def _group(
    audited: Audited,
    models: Mapping[str, Sequence[Predictions]],
    split: str,
    rows: np.ndarray,
    unseen: np.ndarray,
    drawn: Mapping[str, np.ndarray],
    specificity: float,
) -> dict[str, Any]:
    """Figures of the images of one group in one split."""
    people = audited.facts[split].people
    found: dict[str, Any] = {
        "n": len(rows),
        "patients": None if people is None else len(np.unique(people[rows])),
        "models": {"original": None, "unlearned": None, "retrained": None},
        "change": {"original": None, "retrained": None},
        "attack": None,
    }
    for name, group in models.items():
        each = [one.figures(rows, specificity) for one in group]
        found["models"][name] = {figure: float(np.mean([one[figure] for one in each])) for figure in each[0]}
    for other, resampled in drawn.items():
        found["change"][other] = _change(audited, models, other, rows, resampled)
    if split == "forget":
        attack: dict[str, float | None] = {"original": None, "unlearned": None, "retrained": None}
        for name, outputs in audited.models.items():
            attack[name] = group_attack([(o["forget"].scores, o["validation"].scores) for o in outputs], rows, unseen)
        found["attack"] = attack
    return found


def _change(
    audited: Audited,
    models: Mapping[str, Sequence[Predictions]],
    other: str,
    rows: np.ndarray,
    resampled: np.ndarray,
) -> dict[str, float]:
    """Change of the group's accuracy: of its share of right answers."""
    values = _difference(models, other)[rows]
    low, high = interval(resampled)
    mean = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return {"difference": mean, "low": low, "high": high}


def _difference(models: Mapping[str, Sequence[Predictions]], other: str) -> np.ndarray:
    """Share of right answers of each image by the unlearned model, minus that by another; NaN where none is known."""

    def share(group: Sequence[Predictions]) -> np.ndarray:
        asked = group[0].asked
        right = np.mean([one.right for one in group], axis=0)
        return np.divide(right, asked, out=np.full(len(right), np.nan), where=asked > 0)

    return share(models["unlearned"]) - share(models[other])


def _largest(
    audited: Audited,
    models: Mapping[str, Sequence[Predictions]],
    split: str,
    name: str,
    groups: np.ndarray,
    drawn: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
    options: AuditOptions,
) -> dict[str, Any] | None:
    """The groups between which the change differs most; None where fewer than two have two images."""
    other = "retrained" if "retrained" in models else "original"
    values = _difference(models, other)
    high_group, low_group, difference = largest_difference(values, groups)
    if np.isnan(difference):
        return None
    low, high = interval(drawn[name, high_group][other] - drawn[name, low_group][other])
    return {
        "groups": [high_group, low_group],
        "against": other,
        "difference": difference,
        "low": low,
        "high": high,
        "p": permutation_test(values, groups, audited.facts[split].people, seed=options.seed),
    }
