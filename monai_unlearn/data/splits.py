"""Forget, retain, selection, validation and test: who is in which split."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from monai_unlearn.data.duplicates import equal_to, file_hashes, pixel_hashes
from monai_unlearn.data.image_data import ImageData, ImageFiles, LabeledImages
from monai_unlearn.data.matching import Names
from monai_unlearn.data.request import DeletionRequest, Selector, hashed_order, read_request, resolve_request
from monai_unlearn.forget_set import ForgetSet

__all__ = ["Split", "make_split", "people"]

# The halves of the validation data never depend on the run's seed: what one run chose on, no other may report on.
HALVING_SEED = 0
OVERLAP = ("refuse", "drop", "keep")

Evaluated = dict[str, tuple[LabeledImages | ImageFiles, np.ndarray]]


@dataclass(frozen=True)
class Split:
    """Positions of the images of each part, ascending.

    ``forget`` and ``retain`` are disjoint and cover the training images; ``selection`` and ``validation`` are
    disjoint halves of the validation images; ``unit`` tells whether whole patients were drawn; ``request`` is what a
    report says of the request; ``named_columns`` are the columns by which images were chosen, ids left out; ``key`` is
    the secret of the hashes that stand for names, and ``key_is_kept`` tells
    whether it is kept beside the request.
    """

    forget: np.ndarray
    retain: np.ndarray
    selection: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    unit: str
    request: dict
    named_columns: tuple[str, ...]
    key: str = field(repr=False)
    key_is_kept: bool

    def forget_set(self) -> ForgetSet:
        """The forget set by the key ``index`` of this package's batches."""
        return ForgetSet(self.forget.tolist(), key="index")

    def digest(self) -> str:
        """SHA-256 of who is to be forgotten."""
        return hashlib.sha256(",".join(map(str, self.forget)).encode()).hexdigest()

    def as_hashes(self, data: ImageData) -> dict:
        """Size and keyed hash of each part, and of each forgotten image: to be written beside the results.

        Whoever holds the key and the data can check who was forgotten, nobody else.

        Args:
            data: the data that was split.
        """
        held_out = data.validation if data.test is None else data.test
        sources = {
            "forget": (data.train, self.forget),
            "retain": (data.train, self.retain),
            "selection": (data.validation, self.selection),
            "validation": (data.validation, self.validation),
            "test": (held_out, self.test),
        }
        table: dict = {"unit": self.unit}
        for name, (source, rows) in sources.items():
            hashes = [_keyed_hash(source.content(row), self.key) for row in rows]
            table[name] = {"n": len(rows), "hash": _keyed_hash("".join(sorted(hashes)).encode(), self.key)}
            if name == "forget":
                table[name]["images"] = hashes
        return table


def make_split(
    data: ImageData,
    seed: int = 0,
    forget_fraction: float | None = 0.1,
    forget_indices: str | os.PathLike | None = None,
    forget_patients: str | os.PathLike | None = None,
    forget_request: str | os.PathLike | None = None,
    allow_partial: bool = False,
    overlap: str = "refuse",
    find_duplicates: bool = False,
    cache_dir: str | os.PathLike | None = None,
    difficulty: np.ndarray | pd.DataFrame | None = None,
) -> Split:
    """Decide who is forgotten, and halve the validation data.

    A fraction draws whole patients, in an order fixed by the seed, until their share of the training images is
    reached; where the data has no patients it draws images. Order and halves come from SHA-256 of seed and
    name, so that the same seed gives the same split on every platform and with every version of NumPy.

    Training images equal to a forgotten one follow it. Validation and test images equal to one are left out: a model
    has seen them.

    Args:
        data: the data set.
        seed: seed of the draw.
        forget_fraction: share of the training images, in (0, 1); used when no file is given.
        forget_indices: text file with one position in the training images (from 0) a line.
        forget_patients: text file with one patient id a line.
        forget_request: JSON or CSV file with a deletion request, see docs/requests.md.
        allow_partial: go on when a part of the request matches nothing.
        overlap: what to do when a forgotten patient also has validation or test images: ``"refuse"``, ``"drop"``
            these images, or ``"keep"`` them.
        find_duplicates: look for equal images among files too; among images in memory that is always done.
        cache_dir: where the scan of files is kept for later runs.
        difficulty: score of each training image, higher is harder, for a request that asks for the easiest or
            hardest without a column of the data; or a frame of such scores, one column each.

    Raises:
        ValueError: if nothing or everything would be forgotten, a request names what is not there, or a forgotten
            patient is in another split.
        FileNotFoundError: if a file does not exist.
    """
    if overlap not in OVERLAP:
        raise ValueError(f"overlap should be one of {', '.join(OVERLAP)}, but got {overlap!r}.")
    request = _request(data, seed, forget_fraction, forget_indices, forget_patients, forget_request)
    index = data.train.index()
    if difficulty is not None:
        scores = difficulty if isinstance(difficulty, pd.DataFrame) else pd.DataFrame({"difficulty": difficulty})
        index = index.assign(**{name: scores[name].to_numpy() for name in scores if name not in index})
    resolution = resolve_request(request, index, allow_partial=allow_partial)
    forget, counts = resolution.positions, resolution.as_dict()

    halves = dict(zip(("selection", "validation"), _halve(data.validation)))
    evaluated = {name: (data.validation, rows) for name, rows in halves.items()}
    if data.test is None:
        evaluated["test"] = evaluated["validation"]
    else:
        evaluated["test"] = (data.test, np.arange(len(data.test)))

    duplicates = None
    if find_duplicates or isinstance(data.train, LabeledImages):
        hashes = _hashes(data, cache_dir)
        follow = equal_to(hashes["train"], hashes["train"][forget])
        duplicates = {"training": int(follow.sum()) - len(forget), "evaluation": 0}
        forget = np.flatnonzero(follow)
        if data.train.patients is not None:  # a copy may lie with another patient
            counts["patients"], counts["partly_forgotten"] = Names(pd.Series(data.train.patients)).count(follow)
        for name, (part, rows) in evaluated.items():
            own = hashes["test" if part is data.test else "validation"][rows]
            seen = equal_to(own, hashes["train"][forget])
            duplicates["evaluation"] += int(seen.sum()) if name != "test" or data.test is not None else 0
            evaluated[name] = (part, rows[~seen])
    if len(forget) == len(data.train):
        raise ValueError(
            f"The retain set should hold at least one image, but all {len(forget)} images of the training data are "
            "to be forgotten. Train a new model on other data instead."
        )
    evaluated, shared = _without_overlap(data, forget, evaluated, overlap)
    for name, (_, rows) in evaluated.items():
        if len(rows) == 0:
            raise ValueError(f"No image is left in the {name} set without the forgotten patients. Use more data.")
    return Split(
        forget=forget,
        retain=np.setdiff1d(np.arange(len(data.train)), forget),
        **{name: rows for name, (_, rows) in evaluated.items()},
        unit=resolution.unit,
        request={
            "reference": request.reference,
            **counts,
            "images": len(forget),
            "duplicates": duplicates,
            "allow_partial": allow_partial,
            "overlap": shared,
        },
        named_columns=request.named_columns,
        key=request.key,
        key_is_kept=request.key_is_kept,
    )


def _request(
    data: ImageData,
    seed: int,
    forget_fraction: float | None,
    forget_indices: str | os.PathLike | None,
    forget_patients: str | os.PathLike | None,
    forget_request: str | os.PathLike | None,
) -> DeletionRequest:
    """The request of a file or of a shortcut."""
    files = {
        "forget_indices": forget_indices,
        "forget_patients": forget_patients,
        "forget_request": forget_request,
    }
    given = [name for name, file in files.items() if file is not None]
    if len(given) > 1:
        raise ValueError(f"Give {' or '.join(given)}, not both.")
    if forget_request is not None:
        return read_request(forget_request)
    if forget_indices is not None:
        selector = Selector("index", tuple(_read_indices(forget_indices, len(data.train))))
    elif forget_patients is not None:
        if data.train.patients is None:
            raise ValueError(
                f"forget_patients needs data with patients, but {data.name} has none. Use --forget_indices FILE."
            )
        selector = Selector("patient", tuple(_lines(forget_patients, "forget_patients")))
    else:
        fraction = forget_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise ValueError(f"forget_fraction should lie between 0 and 1 (both excluded), but got {fraction!r}.")
        selector = Selector("fraction", (fraction,), seed=seed)
    return DeletionRequest(include=(selector,))


def people(patients: np.ndarray) -> np.ndarray:
    """Number of the person on each image, as whole numbers; an image without a patient has a person of its own.

    Args:
        patients: patient of each image; None, NaN or empty where it is not known.
    """
    names = Names(pd.Series(patients))
    alone = names.codes < 0
    numbers = names.codes.astype(np.int64)
    numbers[alone] = len(names.names) + np.arange(alone.sum())
    return numbers


def _hashes(data: ImageData, cache_dir: str | os.PathLike | None) -> dict[str, np.ndarray]:
    """A hash of the pixels of every image."""
    parts = data.parts()
    hashes = {name: pixel_hashes(part.images) for name, part in parts.items() if isinstance(part, LabeledImages)}
    files = {name: part.paths for name, part in parts.items() if isinstance(part, ImageFiles)}
    if files:  # all of them at once, so that a file in two parts is decoded once
        cache_file = None if cache_dir is None else Path(cache_dir) / "duplicates.hashes"
        found = file_hashes([path for paths in files.values() for path in paths], cache_file)
        hashes |= zip(files, np.split(found, np.cumsum([len(paths) for paths in files.values()])[:-1]))
    return hashes


def _without_overlap(
    data: ImageData, forget: np.ndarray, evaluated: Evaluated, overlap: str
) -> tuple[Evaluated, dict | None]:
    """Refuse, drop or keep validation and test images of forgotten patients; and what a report says of that."""
    if data.train.patients is None:
        return evaluated, None
    forgotten = Names(pd.Series(data.train.patients[forget]))
    kept, images = dict(evaluated), 0
    shared: set[str] = set()
    for name, (part, rows) in evaluated.items():
        if part.patients is None:
            continue
        same, found = Names(pd.Series(part.patients[rows])).find(forgotten.names)
        if name != "test" or data.test is not None:  # otherwise the validation half a second time
            images += int(same.sum())
        shared |= found
        if overlap == "drop":
            kept[name] = (part, rows[~same])
    if shared and overlap == "refuse":
        raise ValueError(
            f"{len(shared)} of the {len(np.unique(people(data.train.patients[forget])))} patients to forget also have "
            f"{images} validation or test images, which are to show how a model does on people it never saw. Use "
            "--overlap drop to leave these images out of the evaluation, or --overlap keep."
        )
    return kept, {"option": overlap, "patients": len(shared), "images": images}


def _lines(file: str | os.PathLike, what: str) -> list[str]:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{what} should be an existing text file, but got {str(file)!r}. Check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"{what} should be a text file with one entry a line, but {path.name!r} is not text."
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{what} should name at least one entry, but {path.name!r} is empty. Nothing to forget.")
    if len(set(lines)) < len(lines):
        raise ValueError(
            f"{what} should name each entry once, but {len(lines) - len(set(lines))} of {len(lines)} lines "
            f"of {path.name!r} repeat another. Remove them."
        )
    return lines


def _read_indices(file: str | os.PathLike, n: int) -> list[int]:
    lines = _lines(file, "forget_indices")
    try:
        indices = np.array([int(line) for line in lines], dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(
            "forget_indices should hold one whole number a line, but a line is something else. Check the file."
        ) from None
    outside = int(((indices < 0) | (indices >= n)).sum())
    if outside:
        raise ValueError(
            f"forget_indices should lie in [0, {n - 1}], but {outside} of {len(indices)} do not. "
            "Indices count the training images from 0."
        )
    unique = np.unique(indices)
    if len(unique) < len(indices):
        raise ValueError(f"forget_indices should name each image once, but {len(indices) - len(unique)} repeat.")
    return unique.tolist()


def _halve(part: LabeledImages | ImageFiles) -> tuple[np.ndarray, np.ndarray]:
    """Two halves with about the same share of each class; all images of a patient in one of them."""
    if len(part) < 2:
        raise ValueError(
            f"The validation data should hold at least two images, but holds {len(part)}: one half is for choices, "
            "the other for the report."
        )
    unique, member = _names(part)
    if part.labels.ndim == 1:
        rows = np.eye(int(part.labels.max()) + 1, dtype=np.int64)[part.labels]
    else:  # findings, and the number of images
        rows = np.column_stack([part.labels > 0.5, np.ones(len(part))]).astype(np.int64)
    counts = np.zeros((len(unique), rows.shape[1]), dtype=np.int64)
    np.add.at(counts, member, rows)
    totals = counts.sum(axis=0)
    # Each patient goes where its most unusual class is lacking most; large patients first, while there is room.
    order = hashed_order(unique, HALVING_SEED)
    images = np.bincount(member)
    order = order[np.argsort(-images[order], kind="stable")]
    in_first = np.zeros(len(unique), dtype=bool)
    balance = np.zeros_like(totals)
    for patient in order:
        # Squared imbalance over all classes after either choice, in whole numbers, so that no platform differs.
        weight = totals.sum() // np.maximum(totals, 1)
        first = int((weight * (balance + counts[patient]) ** 2).sum())
        second = int((weight * (balance - counts[patient]) ** 2).sum())
        in_first[patient] = first < second or (first == second and int(balance.sum()) <= 0)
        balance = balance + counts[patient] if in_first[patient] else balance - counts[patient]
    selected = in_first[member]
    if selected.all() or not selected.any():
        raise ValueError("The validation data should come from at least two patients, but comes from one.")
    return np.flatnonzero(selected), np.flatnonzero(~selected)


def _names(part: LabeledImages | ImageFiles) -> tuple[list[str], np.ndarray]:
    """The patients' names, or those of images without one, each once; and the number of each image's among them."""
    if part.patients is None:
        return [str(row) for row in range(len(part))], np.arange(len(part))
    _, first, member = np.unique(people(part.patients), return_index=True, return_inverse=True)
    names = Names(pd.Series(part.patients))
    return [names.names[code] if code >= 0 else f"image {row}" for row, code in zip(first, names.codes[first])], member


def _keyed_hash(content: bytes, key: str) -> str:
    return hmac.new(key.encode(), content, hashlib.sha256).hexdigest()
