"""Unseen images that are like the forget set: of the same classes, and of what the request names."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader, Subset

from monai_unlearn.data.image_data import ImageData, ImageFiles, LabeledImages, make_loader
from monai_unlearn.data.matching import hashed_order
from monai_unlearn.data.splits import Split

__all__ = ["column_strata", "matched_loader", "matched_rows"]

logger = logging.getLogger("monai_unlearn")

# Numbers of more different values are cut into fifths.
FEW_VALUES = 12
MOST = 0.5
# Missing strata that a message names.
SHOWN = 5


def matched_rows(data: ImageData, split: Split, *, min_samples: float = 10, seed: int = 0) -> np.ndarray:
    """Rows of the validation images, of the selection half alone, that have the forget set's shares of each stratum.

    A stratum is a class (for findings: the number of findings that an image has, 0, 1, 2 or more) together with the
    values of the columns that the request names (``split.named_columns``); a column of numbers with many different
    values is cut into fifths, as in the audit. There are about as many rows as there are comparable images. Of a
    stratum with more images than its share takes, some are drawn; those of one with fewer are repeated.

    Args:
        data: the data.
        split: its split.
        min_samples: what the rows should be worth in images that are drawn independently from the forget set's strata:
            1 / Σ share² / n over the strata, with n images each. Greater than 0.
        seed: seed of the draw.

    Returns:
        Row numbers, ascending; a row may be there several times.

    Raises:
        ValueError: if a named column is not one of the validation images', less than half of the forget set is in
            strata that the selection half has too, or what there is is worth less than ``min_samples``.
    """
    if not min_samples > 0:
        raise ValueError(f"min_samples should be greater than 0, but got {min_samples!r}.")
    ours, theirs = _strata(data, split)
    strata, numbers = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    forget, selection = (np.bincount(n, minlength=len(strata)) for n in (numbers[: len(ours)], numbers[len(ours) :]))
    both = (forget > 0) & (selection > 0)
    share = np.where(both, forget, 0) / max(1, forget[both].sum())
    comparable = int(selection[both].sum())
    worth = 1 / (share[both] ** 2 / selection[both]).sum() if both.any() else 0.0
    covered = forget[both].sum() / len(ours)
    missing = [str(name) for name in strata[(forget > 0) & ~both]]
    more = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    none_of = f" None is of: {'; '.join(missing[:SHOWN])}{more}." if missing else ""
    if covered < MOST or worth < min_samples - 1e-9:
        raise ValueError(
            f"The selection half of the validation images should hold images like those to forget, worth at least "
            f"{min_samples:g} in number, but of {len(theirs)} images {comparable} are comparable to {covered:.0%} of "
            f"the forget set, worth {worth:.1f}.{none_of} Use more validation data, or do without matched "
            "images (in SCRUB's bundle: --rewind false)."
        )
    if missing:
        logger.info(
            "Matched unseen images: %.0f %% of the forget set have none that is comparable.%s",
            100 * (1 - covered),
            none_of,
        )
    rows = []
    for stratum, quota in enumerate(_quotas(share, comparable)):
        own = split.selection[numbers[len(ours) :] == stratum]
        if quota:
            rows.append(np.resize(own[hashed_order(own.tolist(), seed)], quota))
    return np.sort(np.concatenate(rows))


def matched_loader(
    loader: DataLoader, data: ImageData, split: Split, *, min_samples: float = 10, seed: int = 0
) -> DataLoader:
    """Images of the selection half that are matched to the forget set, see ``matched_rows``.

    Args:
        loader: all validation images, as they are evaluated; its batch size and number of workers are kept.
        data: the data.
        split: its split.
        min_samples: as in ``matched_rows``.
        seed: as in ``matched_rows``.

    Raises:
        ValueError: as ``matched_rows``, or if ``loader`` is not one of the validation images.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size != len(data.validation) or loader.batch_size is None:
        raise ValueError(
            f"loader should be one of the {len(data.validation)} validation images in batches, but has {size} images "
            f"and a batch size of {loader.batch_size}."
        )
    rows = matched_rows(data, split, min_samples=min_samples, seed=seed)
    return make_loader(Subset(loader.dataset, rows.tolist()), loader.batch_size, num_workers=loader.num_workers)


def _strata(data: ImageData, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The stratum of each image of the forget set and of the selection half, in words."""
    sides = [(data.train, split.forget), (data.validation, split.selection)]
    words = [_labels_in_words(part, rows, data.class_names) for part, rows in sides]
    for column in split.named_columns:
        tables = [part.index() for part, _ in sides]
        if any(column not in table for table in tables):
            raise ValueError(
                f"The request goes by {column}, which the validation images do not have, so that none of them can be "
                "called comparable. Do without matched images (in SCRUB's bundle: --rewind false), or add the column."
            )
        values = column_strata(*(table[column].iloc[rows] for table, (_, rows) in zip(tables, sides)), in_words=True)
        words = [np.char.add(side, np.char.add(f", {column} ", more)) for side, more in zip(words, values)]
    return words[0], words[1]


def _labels_in_words(part: LabeledImages | ImageFiles, rows: np.ndarray, class_names: tuple[str, ...]) -> np.ndarray:
    labels = part.labels[rows]
    if labels.ndim == 1:
        return np.array([f"class {name}" for name in class_names])[labels]
    return np.array([f"{number} findings" for number in ("0", "1", "2", "3 or more")])[
        np.minimum((labels > 0.5).sum(axis=1), 3)
    ]


def column_strata(ours: pd.Series, theirs: pd.Series, *, in_words: bool = False) -> list[np.ndarray]:
    """The stratum of each image of both sides by a column: its value, or a fifth of many different numbers.

    Args:
        ours: the column of the forget images.
        theirs: that of unseen images.
        in_words: whether a fifth is called by its ends, rather than by its number.

    Returns:
        The strata of both sides, as text.
    """
    both = pd.concat([ours, theirs], ignore_index=True)
    if pd.api.types.is_numeric_dtype(both) and both.nunique() > FEW_VALUES:
        both = pd.qcut(both, 5, labels=None if in_words else False, duplicates="drop")
    text = both.astype(str).to_numpy(dtype=str)
    return [text[: len(ours)], text[len(ours) :]]


def _quotas(share: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to the total, as near to the shares as can be (largest remainders)."""
    exact = share * total
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas
