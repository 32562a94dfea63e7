"""Deletion requests: one file that says who is to be forgotten, and which images that is."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import secrets
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_unlearn.data.matching import Names, hashed_order, match_glob, match_plain, normal_path
from monai_unlearn.data.request_file import DIFFICULTY, IDS, KINDS, key_beside, read_csv, read_json
from monai_unlearn.data.rules import ID_COLUMNS, check_rule, columns_of, rows_where

__all__ = ["DeletionRequest", "Resolution", "Selector", "hashed_order", "read_request", "resolve_request"]

BY_IMAGE = ("index", *DIFFICULTY)  # what names images rather than people
UNITS = ("patient", "image")
SHOWN = 5  # unmatched entries that a message lists


@dataclass(frozen=True, repr=False)
class Selector:
    """One way to say which images are meant.

    Args:
        by: patient, study, series, file, index, rule, fraction, easiest or hardest.
        values: ids, paths or globs, or rules as text; positions of images from 0; or one number: a share of the images
            in (0, 1) for fraction, a percentage in (0, 100) for easiest and hardest.
        seed: seed of the draw of a fraction.
        score: column that easiest and hardest go by; higher is harder.

    Raises:
        ValueError: if the kind is none, or a value does not suit it. No value is shown.
    """

    by: str
    values: tuple
    seed: int = 0
    score: str = "difficulty"

    def __post_init__(self) -> None:
        if self.by not in KINDS:
            raise ValueError(f"by should be one of {', '.join(KINDS)}, but is none of them.")
        if not isinstance(self.values, (tuple, list)) or not self.values:
            raise ValueError(f"values of {self.by} should be a tuple of at least one, but are not.")
        if self.by in IDS:  # an id may be a number on one side and text on the other
            object.__setattr__(self, "values", tuple(str(v) if _is_int(v) else v for v in self.values))
        object.__setattr__(self, "values", tuple(self.values))
        if self.by == "index":
            valid, rule = all(_is_int(v) and v >= 0 for v in self.values), "whole numbers of at least 0"
        elif self.by in ("fraction", *DIFFICULTY):
            top = 1 if self.by == "fraction" else 100
            number = self.values[0]
            valid = len(self.values) == 1 and (_is_int(number) or isinstance(number, float)) and 0 < number < top
            rule = f"one number between 0 and {top} (both excluded)"
        else:
            valid, rule = all(isinstance(v, str) and v for v in self.values), "text, not empty"
        if not valid:
            raise ValueError(f"values of {self.by} should be {rule}, but are not.")
        if not _is_int(self.seed):
            raise ValueError(f"seed should be a whole number, but got {self.seed!r}.")
        if not isinstance(self.score, str) or not self.score:
            raise ValueError(f"score should be the name of a column, but got {self.score!r}.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(by={self.by!r}, {len(self.values)} values)"

    @property
    def default_unit(self) -> str:
        """What is forgotten where the request names no unit: image for index and difficulty, patient for all else."""
        return "image" if self.by in BY_IMAGE else "patient"


@dataclass(frozen=True, repr=False)
class DeletionRequest:
    """Who is to be forgotten: all that ``include`` selects, without what ``exclude`` selects.

    Args:
        include: at least one selector.
        exclude: selectors of what is kept all the same.
        unit: patient forgets (and keeps) every image of a matched patient, image the matched images alone; None takes
            each selector's default.
        reference: free text for the report, such as a ticket's number.
        key: secret of the hashes by which messages and reports name ids.
        key_is_kept: whether the key lies beside the request, so that later runs give the same hashes.

    Raises:
        ValueError: if nothing is included, or a value is not as said.
    """

    include: tuple[Selector, ...]
    exclude: tuple[Selector, ...] = ()
    unit: str | None = None
    reference: str | None = None
    key: str = field(default_factory=lambda: secrets.token_hex(32))
    key_is_kept: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            selectors = getattr(self, name)
            if not isinstance(selectors, (tuple, list)) or not all(isinstance(s, Selector) for s in selectors):
                raise ValueError(f"{name} should be a tuple of selectors, but is not.")
            object.__setattr__(self, name, tuple(selectors))
            for i, selector in enumerate(selectors):
                for j, value in enumerate(selector.values):
                    if selector.by == "rule":
                        check_rule(value, f"{name}[{i}] entry {j + 1}")
        if not self.include:
            raise ValueError("include should have at least one selector, but has none. Nothing to forget.")
        if self.unit is not None and self.unit not in UNITS:
            raise ValueError("unit should be patient, image or None, but is none of them.")
        if self.reference is not None and (not isinstance(self.reference, str) or not self.reference):
            raise ValueError("reference should be text or None, but is not.")
        if not isinstance(self.key, str) or not self.key:
            raise ValueError("key should be text, but is not.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(include={self.include!r}, exclude={self.exclude!r}, unit={self.unit!r})"

    def hashed(self, value: object) -> str:
        """HMAC-SHA-256 of an id or path as text, 64 hex digits: whoever lacks the key can't tell whose it is."""
        return hmac.new(self.key.encode(), str(value).encode(), hashlib.sha256).hexdigest()

    @property
    def score_columns(self) -> set[str]:
        """Columns that easiest and hardest go by."""
        return {selector.score for selector in (*self.include, *self.exclude) if selector.by in DIFFICULTY}

    @property
    def named_columns(self) -> tuple[str, ...]:
        """Columns by which images were chosen, ids left out: those of rules, and scores of easiest and hardest."""
        names = set(self.score_columns)
        for selector in (*self.include, *self.exclude):
            if selector.by == "rule":
                names |= set().union(*(columns_of(rule) for rule in selector.values))
        return tuple(sorted(names - set(ID_COLUMNS)))


@dataclass(frozen=True)
class Resolution:
    """Which images a request means.

    Args:
        positions: the images to be forgotten, ascending.
        unit: patient, image, or mixed where selectors differ.
        matched: images that the selectors of ``include`` matched themselves, before patients were completed.
        patients: patients with at least one forgotten image; None where the data has no patients. An image without a
            patient counts as one of its own.
        partly_forgotten: of these, patients who keep some images.
        entries: different entries of the request.
        unmatched: of these, entries that match no image.
    """

    positions: np.ndarray
    unit: str
    matched: int
    patients: int | None
    partly_forgotten: int | None
    entries: int
    unmatched: int

    def as_dict(self) -> dict[str, Any]:
        """Counts for the report, without ids and positions."""
        counts = {name: value for name, value in vars(self).items() if name != "positions"}
        return {"images": len(self.positions), **counts}


def read_request(path: str | os.PathLike) -> DeletionRequest:
    """Read a request from a JSON or CSV file; see docs/requests.md and request.schema.json beside this module.

    The key of its hashes is read from the file ``….key`` beside the request, or made and kept there. Where that can't
    be written, the key is of this run alone, and ``key_is_kept`` is false.

    Args:
        path: the file, ending in .json or .csv.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no request; the message says at which place, but shows no value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The request should be an existing file, but {str(path)!r} is none. Check the path.")
    readers = {".json": read_json, ".csv": read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"The request should be a .json or .csv file, but got {path.suffix!r}. Rename or convert it.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("The request should be text in UTF-8, but is not. Save it as UTF-8.") from None
    arguments = readers[path.suffix.lower()](text)
    for side in ("include", "exclude"):
        arguments[side] = tuple(Selector(**selector) for selector in arguments[side])
    request = DeletionRequest(**arguments)
    key, kept = key_beside(path)  # now that the request is known to be one
    return replace(request, key=key, key_is_kept=kept)


def resolve_request(
    request: DeletionRequest, index: pd.DataFrame, *, allow_partial: bool = False, what: str = "the training data"
) -> Resolution:
    """Find the images that a request means, from the table of the images alone.

    Args:
        request: the request.
        index: one row an image, in the data set's order; columns patient, study, series, file (path relative to the
            data's root, with ``/``) and any others, as far as the data has them. Ids are compared as text.
        allow_partial: go on where some entries match no image.
        what: the data in messages.

    Raises:
        ValueError: if entries match nothing (named by position and hash), a path matches several files, a column is
            missing, a score is not finite, or nothing or everything would be forgotten.
    """
    n = len(index)
    table = _Table(index, what)
    patients = table.names("patient", "the request") if "patient" in index else None
    if request.unit == "patient" and patients is None:
        raise ValueError(
            f"unit should be image where there are no patients, but the request asks for patient and {what} has no "
            "column 'patient'. Leave unit out, or use data with patients."
        )
    entries: set[tuple] = set()
    unmatched: dict[tuple, str] = {}
    matched, units = np.zeros(n, dtype=bool), set()
    chosen = {"include": np.zeros(n, dtype=bool), "exclude": np.zeros(n, dtype=bool)}
    for side, selectors in (("include", request.include), ("exclude", request.exclude)):
        for number, selector in enumerate(selectors):
            place = f"{side}[{number}]"
            unit = "image" if patients is None else request.unit or selector.default_unit
            units.add(unit)
            # People merge lists: an entry that repeats another is the same entry, at the first one's place.
            places: dict = {}
            for position, value in enumerate(selector.values):
                places.setdefault(value, f"{place} entry {position + 1}")
            rows, missing = _match(selector, places, table, unit, place, request)
            kind = (side, selector.by, selector.seed, selector.score)
            entries.update((*kind, value) for value in places)
            for value in missing:
                unmatched.setdefault((*kind, value), f"{places[value]} ({selector.by} {_short(request, value)})")
            if side == "include":
                matched |= rows
            if unit == "patient" and patients is not None:
                rows = patients.complete(rows)
            chosen[side] |= rows
    _check_matched(list(unmatched.values()), len(entries), allow_partial, what)
    forget = chosen["include"] & ~chosen["exclude"]
    if not forget.any():
        raise ValueError(
            f"The request should leave at least one image of {what} to forget, but exclude takes off all "
            f"{int(chosen['include'].sum())} that include selects. Nothing to forget."
            if chosen["include"].any()
            else f"The request should match at least one image of {what}, but include matches none. Nothing to forget."
        )
    if forget.all():
        raise ValueError(
            f"The retain set should hold at least one image, but all {n} images of {what} are to be forgotten. "
            "Train a new model on other data instead."
        )
    forgotten, partly = (None, None) if patients is None else patients.count(forget)
    return Resolution(
        positions=np.flatnonzero(forget).astype(np.int64),
        unit=units.pop() if len(units) == 1 else "mixed",
        matched=int(matched.sum()),
        patients=forgotten,
        partly_forgotten=partly,
        entries=len(entries),
        unmatched=len(unmatched),
    )


class _Table:
    """The table of the images, with what several selectors need of it made once."""

    def __init__(self, index: pd.DataFrame, what: str) -> None:
        self.index, self.what = index, what
        self._names: dict[str, Names] = {}

    def column(self, name: str, place: str, remedy: str = "") -> pd.Series:
        if name not in self.index:
            raise ValueError(
                f"{place} needs a column {name!r}, but {self.what} has none; it has "
                f"{sorted(map(str, self.index.columns))}. {remedy or 'Ask by something that the data has.'}"
            )
        return self.index[name]

    def names(self, name: str, place: str) -> Names:
        if name not in self._names:
            self._names[name] = Names(self.column(name, place))
        return self._names[name]


def _match(
    selector: Selector, places: dict, table: _Table, unit: str, place: str, request: DeletionRequest
) -> tuple[np.ndarray, list]:
    """Rows that a selector matches, and its entries that match none."""
    n = len(table.index)
    rows = np.zeros(n, dtype=bool)
    if selector.by in IDS:
        rows, found = table.names(selector.by, place).find(places)
        return rows, [value for value in places if value not in found]
    if selector.by == "file":
        return _match_files(table.column("file", place), places, request, table.what)
    if selector.by == "index":
        rows[[value for value in places if value < n]] = True
        return rows, [value for value in places if value >= n]
    if selector.by == "rule":
        hits = {value: rows_where(value, table.index, places[value]) for value in places}
        return np.logical_or.reduce(list(hits.values())), [value for value, hit in hits.items() if not hit.any()]
    if selector.by == "fraction":
        wanted = math.ceil(selector.values[0] * n - 1e-9)
        if unit == "patient":
            return table.names("patient", place).draw(wanted, selector.seed), []
        rows[hashed_order(range(n), selector.seed)[:wanted]] = True
        return rows, []
    wanted = math.ceil(selector.values[0] / 100 * n - 1e-9)
    scores = _scores(table, selector.score, place)
    order = np.argsort(scores if selector.by == "easiest" else -scores, kind="stable")
    rows[order[:wanted]] = True
    return rows, []


def _scores(table: _Table, name: str, place: str) -> np.ndarray:
    remedy = (
        "Name a column with a score (higher = harder). The train bundle records some, and a run computes one where "
        "score is left out: see docs/difficulty.md."
    )
    column = table.column(name, place, remedy)
    try:
        scores = column.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise ValueError(f"{place} needs a column of numbers, but {name!r} holds something else. {remedy}") from None
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(
            f"{place} needs a score of every image, but {bad} of {len(scores)} in column {name!r} are NaN or infinite. "
            "Give each image a score, or name the images otherwise."
        )
    return scores


def _match_files(
    column: pd.Series, places: dict[str, str], request: DeletionRequest, what: str
) -> tuple[np.ndarray, list[str]]:
    codes = None
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, column = column.cat.codes.to_numpy(), column.cat.categories.to_series()
    paths = [path if isinstance(path, str) else "" for path in column.array]
    normal = {entry: normal_path(entry) for entry in places}
    plain = match_plain(paths, normal.values())
    hits = np.zeros(len(paths), dtype=bool)
    missing, ambiguous = [], []
    for entry, place in places.items():
        found = plain.get(normal[entry], [])
        different = len({paths[i] for i in found})
        if different > 1:
            ambiguous.append(f"{place} (file {_short(request, entry)}, {different} files)")
        elif not found and re.search(r"[*?[]", entry):  # otherwise a name has such a character in it
            found = match_glob(paths, normal[entry])
        if not found:
            missing.append(entry)
        hits[found] = True
    if ambiguous:
        raise ValueError(
            f"A path of the request should match one file of {what}, but {len(ambiguous)} of {len(places)} match "
            f"several: {_listed(ambiguous)}. Give more of the path, or a pattern such as **/view2_*.jpg where all "
            "are meant."
        )
    return hits if codes is None else np.append(hits, False)[codes], missing


def _check_matched(unmatched: list[str], entries: int, allow_partial: bool, what: str) -> None:
    if unmatched and not (allow_partial and len(unmatched) < entries):
        remedy = (
            "Nothing to forget: is it the right data set?"
            if len(unmatched) == entries
            else "Correct or remove them, or go on without them with allow_partial (--allow_partial true)."
        )
        raise ValueError(
            f"Every entry of the request should match an image of {what}, but {len(unmatched)} of {entries} match "
            f"none: {_listed(unmatched)}. {remedy} Ids are shown as hashes to keep them out of logs."
        )


def _listed(items: list[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(request: DeletionRequest, value: object) -> str:
    return request.hashed(value)[:12]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
