"""Forget, retain, selection, validation and test: who is in which split."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monai_unlearn.data.image_data import ImageData, LabeledImages
from monai_unlearn.forget_set import ForgetSet

__all__ = ["Split", "make_split"]

# The halves of the validation data never depend on the run's seed: what one run chose on, no other may report on.
HALVING_SEED = 0


@dataclass(frozen=True)
class Split:
    """Positions of the images of each part, ascending.

    ``forget`` and ``retain`` are disjoint and cover the training images; ``selection`` and ``validation`` are
    disjoint halves of the validation images; ``unit`` tells whether whole patients were drawn.
    """

    forget: np.ndarray
    retain: np.ndarray
    selection: np.ndarray
    validation: np.ndarray
    unit: str

    def forget_set(self) -> ForgetSet:
        """The forget set by the key ``index`` of this package's batches."""
        return ForgetSet(self.forget.tolist(), key="index")

    def digest(self) -> str:
        """SHA-256 of who is to be forgotten."""
        return hashlib.sha256(",".join(map(str, self.forget)).encode()).hexdigest()

    def as_hashes(self, data: ImageData, key: str) -> dict:
        """Size and keyed hash of each part, and of each forgotten image: to be written beside the results.

        Args:
            data: the data that was split.
            key: secret of the hashes. Whoever holds it and the data can check who was forgotten, nobody else.
        """
        images = {"forget": self.forget, "retain": self.retain}
        sources = {name: (data.train, rows) for name, rows in images.items()}
        sources["selection"] = (data.validation, self.selection)
        sources["validation"] = (data.validation, self.validation)
        sources["test"] = (data.test, np.arange(len(data.test)))
        table: dict = {"unit": self.unit}
        for name, (source, rows) in sources.items():
            hashes = [_image_hash(source, row, key) for row in rows]
            table[name] = {"n": len(rows), "hash": _keyed_hash("".join(sorted(hashes)).encode(), key)}
            if name == "forget":
                table[name]["images"] = hashes
        return table


def make_split(
    data: ImageData,
    seed: int = 0,
    forget_fraction: float | None = 0.1,
    forget_indices: str | os.PathLike | None = None,
    forget_patients: str | os.PathLike | None = None,
) -> Split:
    """Decide who is forgotten, and halve the validation data.

    A fraction draws whole patients, in an order fixed by the seed, until their share of the training images is
    reached; where the data has no patients it draws images. Order and halves come from SHA-256 of seed and
    name, so that the same seed gives the same split on every platform and with every version of NumPy.

    Args:
        data: the data set.
        seed: seed of the draw.
        forget_fraction: share of the training images, in (0, 1); used when neither file is given.
        forget_indices: text file with one position in the training images (from 0) a line.
        forget_patients: text file with one patient id a line.

    Raises:
        ValueError: if nothing or everything would be forgotten, or a file names what is not there, or twice.
        FileNotFoundError: if a file does not exist.
    """
    n = len(data.train)
    patients = data.train.patients
    if forget_indices is not None and forget_patients is not None:
        raise ValueError("Give forget_indices or forget_patients, not both.")
    if forget_indices is not None:
        forget, unit = _read_indices(forget_indices, n), "image"
    elif forget_patients is not None:
        if patients is None:
            raise ValueError(
                f"forget_patients needs data with patients, but {data.name} has none. Use --forget_indices FILE."
            )
        forget, unit = _images_of(_read_patients(forget_patients, patients), patients), "patient"
    else:
        forget, unit = _draw_fraction(forget_fraction, n, patients, seed), "image" if patients is None else "patient"
    if len(forget) == n:
        raise ValueError(
            f"The retain set should hold at least one image, but all {n} training images are to be forgotten. "
            "Train a new model on other data instead."
        )
    selection, validation = _halve(data.validation)
    return Split(
        forget=forget,
        retain=np.setdiff1d(np.arange(n), forget),
        selection=selection,
        validation=validation,
        unit=unit,
    )


def _order(names: np.ndarray, seed: int) -> np.ndarray:
    """Positions of the names in a pseudo-random order that depends on nothing but the seed and the names."""
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _draw_fraction(fraction: float | None, n: int, patients: np.ndarray | None, seed: int) -> np.ndarray:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"forget_fraction should lie between 0 and 1 (both excluded), but got {fraction!r}.")
    wanted = math.ceil(fraction * n - 1e-9)
    if patients is None:
        return np.sort(_order(np.arange(n), seed)[:wanted])
    names, counts = np.unique(patients, return_counts=True)
    order = _order(names, seed)
    n_patients = 1 + int(np.searchsorted(np.cumsum(counts[order]), wanted))
    return _images_of(names[order[:n_patients]], patients)


def _images_of(names: np.ndarray, patients: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isin(patients.astype(str), names.astype(str)))  # an id may be a number in the data


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


def _read_indices(file: str | os.PathLike, n: int) -> np.ndarray:
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
    return unique


def _read_patients(file: str | os.PathLike, patients: np.ndarray) -> np.ndarray:
    names = np.array(_lines(file, "forget_patients"))
    unknown = int((~np.isin(names, patients.astype(str))).sum())
    if unknown:
        raise ValueError(
            f"forget_patients should name patients of the training data, but {unknown} of {len(names)} are not in it. "
            "Check the spelling and the data set; ids are not shown to keep them out of logs."
        )
    return names


def _halve(part: LabeledImages) -> tuple[np.ndarray, np.ndarray]:
    """Two halves with about the same share of each class; all images of a patient in one of them."""
    if len(part) < 2:
        raise ValueError(
            f"The validation data should hold at least two images, but holds {len(part)}: one half is for choices, "
            "the other for the report."
        )
    names = np.arange(len(part)) if part.patients is None else part.patients
    unique, member = np.unique(names, return_inverse=True)
    counts = np.zeros((len(unique), int(part.labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (member, part.labels), 1)
    totals = counts.sum(axis=0)
    # Each patient goes where its most unusual class is lacking most; large patients first, while there is room.
    order = _order(unique, HALVING_SEED)
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
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


def _image_hash(part: LabeledImages, row: int, key: str) -> str:
    return _keyed_hash(part.images[row].tobytes() + bytes(str(part.labels[row]), "ascii"), key)


def _keyed_hash(content: bytes, key: str) -> str:
    return hmac.new(key.encode(), content, hashlib.sha256).hexdigest()
