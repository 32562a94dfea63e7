"""Kinds of forget set: who is forgotten in each run of a study, written as deletion requests."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from monai_unlearn.bundle import hint
from monai_unlearn.data import ImageData, people

__all__ = ["KINDS", "SINGLE", "WITHOUT_FRACTION", "group_of_sex", "pooled", "requests_of"]

KINDS = (
    *("random", "patients", "female", "male", "all_female", "all_male"),
    *("easiest", "hardest", "one_class", "one_site"),
)
SINGLE = "patients"  # one patient a run, many runs
WITHOUT_FRACTION = (SINGLE, "all_female", "all_male")
SEX = ("sex", "gender")
SITE = ("site", "hospital", "institution")
# How tables code them, in lower case.
CODES = {"female": ("female", "f", "woman", "women", "w"), "male": ("male", "m", "man", "men")}


def group_of_sex(value: Any) -> str | None:
    """``female`` or ``male`` where a column's value says so (``F``, ``Woman``, …), None where it does not."""
    text = str(value).strip().lower()
    return next((name for name, codes in CODES.items() if text in codes), None)


def requests_of(data: ImageData, kind: str, fraction: float | None, seed: int, patients: int = 20) -> list[dict]:
    """The requests of a kind of forget set, as docs/requests.md describes them.

    Args:
        data: the data set.
        kind: one of ``KINDS``.
        fraction: share of the training images, in (0, 1); None for kinds that have none.
        seed: seed of who is drawn.
        patients: number of single patients, for the kind ``patients``.

    Returns:
        One request; for ``patients`` as many as there are patients.

    Raises:
        ValueError: if there is no such kind, or the data can't give it.
    """
    if kind not in KINDS:
        raise ValueError(f"kinds should be some of {', '.join(KINDS)}, but got {kind!r}.{hint(str(kind), KINDS)}")
    if kind == SINGLE:
        return [_positions(data, rows) for rows in _single_patients(data, patients, seed)]
    if kind in ("all_female", "all_male"):
        column, values = _sex_values(data, kind.removeprefix("all_"))
        return [{"include": [{"rule": f"{_quoted(column)} in {_listed(values)}"}]}]
    if fraction is None:
        raise ValueError(f"fraction should be given for the kind {kind}, but is None.")
    if kind == "random":
        return [{"include": [{"fraction": fraction, "seed": seed}]}]
    if kind in ("easiest", "hardest"):
        return [{"include": [{kind: round(100 * fraction, 10)}]}]
    if kind == "one_class":
        return [_one_class(data, fraction, seed)]
    if kind == "one_site":
        column = _column(data, SITE, kind)
        sites = data.train.attributes[column]
        found = [sites.mode().iloc[0]]  # of equals the first in order
        return [_of_values(data, column, found, fraction, seed, up_to=True)]
    column, values = _sex_values(data, kind)
    return [_of_values(data, column, values, fraction, seed)]


def _column(data: ImageData, names: Sequence[str], kind: str) -> str:
    columns = list(data.train.attributes.columns)
    found = next((column for name in names for column in columns if str(column).lower() == name), None)
    if found is None:
        raise ValueError(
            f"The kind {kind} needs a column {' or '.join(names)}, but {data.name} has "
            f"{', '.join(map(str, columns)) or 'none'}. Leave {kind} out of --kinds."
        )
    return str(found)


def _sex_values(data: ImageData, sex: str) -> tuple[str, list]:
    """The column of the sex, and how it codes one of them."""
    column = _column(data, SEX, sex)
    there = data.train.attributes[column].dropna().unique().tolist()
    values = [value for value in there if group_of_sex(value) == sex]
    if not values:
        raise ValueError(
            f"The kind {sex} needs a column {column!r} with {' or '.join(CODES[sex][:2])}, but its values are "
            f"{', '.join(sorted(map(str, there))[:12]) or 'missing'}. Recode it, or leave {sex} out of --kinds."
        )
    return column, values


def _of_values(
    data: ImageData, column: str, values: list, fraction: float, seed: int, up_to: bool = False
) -> dict[str, Any]:
    """Whole patients all of whose images have one of some values, up to a share of all images."""
    persons = _persons(data)
    has = data.train.attributes[column].isin(values).to_numpy()
    mixed = np.isin(persons, persons[~has])  # also those of whom it is not known of every image
    wanted = math.ceil(fraction * len(data.train) - 1e-9)
    eligible = has & ~mixed
    if not eligible.any() or (eligible.sum() < wanted and not up_to):
        raise ValueError(
            f"A share of {fraction:g} is {wanted} training images, but {data.name} has only {int(eligible.sum())} of "
            f"people with {column} {' or '.join(map(str, values))}. Give smaller --fractions."
        )
    request = _positions(data, _draw(persons, eligible, wanted, seed))
    known = data.train.attributes[column].notna().to_numpy() & (data.train.attributes[column].astype(str) != "")
    if (known & ~has).any():
        # Takes nobody off, but tells the audit by what they were chosen, so that it matches unseen images by it.
        request["exclude"] = [{"rule": f"{_quoted(column)} not in {_listed(values)}"}]
    return request


def _one_class(data: ImageData, fraction: float, seed: int) -> dict[str, Any]:
    """Images of the most frequent class or finding, without regard to patients."""
    labels = data.train.labels
    if labels.ndim == 1:
        has = labels == np.bincount(labels).argmax()
    else:
        present = labels > 0.5
        has = present[:, present.sum(0).argmax()]
    wanted = math.ceil(fraction * len(labels) - 1e-9)
    rows = _draw(np.arange(len(labels)), has, wanted, seed)
    return {"include": [{"index": rows.tolist()}], "unit": "image"}


def _single_patients(data: ImageData, number: int, seed: int) -> list[np.ndarray]:
    if data.train.patients is None:
        raise ValueError(f"The kind {SINGLE} needs data with patients, but {data.name} has none. Leave it out.")
    persons = _persons(data)
    unique = np.unique(persons)
    if number >= len(unique):
        raise ValueError(
            f"patients should be less than the {len(unique)} patients of {data.name}, but got {number}. Take fewer."
        )
    drawn = np.random.RandomState(seed).permutation(unique)[:number]
    return [np.flatnonzero(persons == person) for person in drawn]


def _persons(data: ImageData) -> np.ndarray:
    patients = data.train.patients
    return np.arange(len(data.train)) if patients is None else people(patients)


def _draw(persons: np.ndarray, eligible: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Positions of the images of people drawn until they are as many as wanted, ascending."""
    # RandomState rather than Generator: NumPy promises its streams never change between versions.
    order = np.random.RandomState(seed).permutation(np.unique(persons[eligible]))
    place = np.full(persons.max() + 1, -1)
    place[order] = np.arange(len(order))
    sizes = np.bincount(place[persons[eligible]], minlength=len(order))
    last = int(np.searchsorted(np.cumsum(sizes), wanted))
    return np.flatnonzero(eligible & (place[persons] <= last))


def _positions(data: ImageData, rows: np.ndarray) -> dict[str, Any]:
    unit = {} if data.train.patients is None else {"unit": "patient"}
    return {"include": [{"index": rows.tolist()}], **unit}


def _quoted(column: str) -> str:
    return f"`{column}`"


def _listed(values: Collection[Any]) -> str:
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    return "[" + ", ".join(map(repr, plain)) + "]"


def pooled(requests: Sequence[dict]) -> dict[str, Any]:
    """One request for all that several of them name by position."""
    rows = sorted({row for request in requests for row in request["include"][0]["index"]})
    return {**requests[0], "include": [{"index": rows}]}
