"""Image files and a table of what is known of them: NIfTI volumes, or whatever else MONAI reads."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

from monai_unlearn.data.image_data import ImageData, ImageFiles
from monai_unlearn.data.request import hashed_order

__all__ = ["read_table"]

logger = logging.getLogger(__name__)

# What a row of labels can be about, from the finest to the coarsest.
KEYS = ("file", "instance", "series", "study", "patient")
ALIASES = {
    "participant_id": "patient",  # BIDS
    "patientid": "patient",
    "studyinstanceuid": "study",
    "seriesinstanceuid": "series",
    "sopinstanceuid": "instance",
}
PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
NO_FINDINGS = ("sex", "gender", "age")  # even where they are coded as 0 and 1
# Which part a patient is in never depends on a run's seed: no model may be tested on what another run trained it on.
SPLIT_SEED = 701515
ENDS = (0.7, 0.85)
BLANKS = ["", "n/a", "N/A", "nan", "NaN", "NA"]  # not pandas' own, among which are the words None and null
READING_THREADS = 8


def read_table(
    dataset_dir: str | os.PathLike,
    labels_file: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    channels: int = 1,
    on_broken: str = "raise",
) -> ImageData:
    """Read a table with a row for each image file; no image is decoded.

    The columns are ``file`` (relative to ``dataset_dir``), ``patient`` (or BIDS' ``participant_id``), the labels and,
    if you like, ``split`` (train, validation, test). Labels are either a column ``label`` with the names or numbers of
    classes, or a column of 0, 1 and blank (not known) for each finding. Other columns become attributes.

    Without ``split``, whole patients go to training, validation and test images (70, 15 and 15 % of the images), in an
    order that depends on nothing but their ids.

    Of NIfTI files the header is read: a fourth dimension (time, contrasts) counts as channels.

    Args:
        dataset_dir: folder of the files.
        labels_file: the table, CSV, or with tabs if its name ends in ``.tsv``.
        class_names: names of the classes in the order of the network's outputs, by default sorted; without a column
            ``label``, the columns that are findings, by default all that hold nothing but 0, 1 and blanks.
        channels: number of channels of a loaded image; a NIfTI file with another number of volumes is broken.
        on_broken: what to do with files that are missing or broken, and rows without a label: ``"raise"``, or
            ``"skip"`` them and note how many.

    Raises:
        FileNotFoundError: if the folder or the table does not exist.
        ValueError: if folder or table are not given, the table can't be read or lacks a column, a file appears twice, a
            label or split is none, files are broken, or there are too few patients to split. Neither files nor patients
            are named.
    """
    check_on_broken(on_broken)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels should be an integer of at least 1, but got {channels!r}.")
    root = existing_folder(dataset_dir)
    table = read_labels(labels_file)
    for column in ("file", "patient"):
        if column not in table:
            raise ValueError(
                f"labels_file should have a column {column!r}, but none of its {len(table.columns)} is called so. "
                + ("Name the files relative to dataset_dir." if column == "file" else "Say whose image each one is.")
            )
    named = table[table["file"].notna()]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        problems = pd.Series(list(pool.map(lambda file: _problem(root, file, channels), named["file"])), named.index)
    reasons = Counter(problems.dropna())
    reasons["without a name"] = len(table) - len(named)
    patientless = named["patient"].isna() & problems.isna()
    reasons["without a patient"] = int(patientless.sum())
    notes = report_broken(reasons, on_broken, f"All {len(table)} files of labels_file should be usable")
    usable = named[problems.isna() & ~patientless].reset_index(drop=True)
    if usable.empty:
        raise ValueError(
            f"dataset_dir should hold the files of labels_file, but of {len(table)} none can be used: "
            f"{counted(reasons)}. Check the folder."
        )
    return labelled_data(
        "image files",
        root,
        usable[[key for key in KEYS if key in usable]],
        usable,
        class_names,
        on_broken,
        channels=channels,
        notes=notes,
    )


def _problem(root: Path, file: str, channels: int) -> str | None:
    """Why a file can't be used, or None."""
    path = root / file
    if os.path.isabs(file) or file.startswith("..") or not path.is_file():
        return "not there"
    if not file.lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        image: Any = nibabel.load(path)
        shape = image.shape
        volumes = int(np.prod(shape[3:], dtype=np.int64))
        if not 2 <= len(shape) <= 4 or 0 in shape:
            return f"of {len(shape)} dimensions"
        if volumes != channels:
            return f"with {volumes} volumes (files that all have as many can be read with --channels {volumes})"
        data = image.dataobj
        if not file.endswith(".gz") and path.stat().st_size < data.offset + np.prod(shape) * data.dtype.itemsize:
            return "cut short"
    except Exception:  # nibabel raises whatever a damaged file makes it trip over
        return "could not be read"
    return None


def check_on_broken(on_broken: str) -> None:
    """Refuse what is no choice."""
    if on_broken not in ("raise", "skip"):
        raise ValueError(f"on_broken should be raise or skip, but got {on_broken!r}.")


def existing_folder(dataset_dir: str | os.PathLike) -> Path:
    """The folder of a data set."""
    _refuse_none("dataset_dir", dataset_dir, "DIR")
    root = Path(dataset_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir should be a folder, but got {str(dataset_dir)!r}. Check the path.")
    return root


def _refuse_none(name: str, value: Any, example: str) -> None:
    """A setting that a bundle leaves empty."""
    if value is None:
        raise ValueError(f"{name} should say where the data is, but got None. Use --{name} {example}.")


def report_broken(reasons: Mapping[str, int], on_broken: str, rule: str) -> tuple[str, ...]:
    """Refuse what can't be used, or say in the log how much it is, and return that as a note for the report."""
    if not any(reasons.values()):
        return ()
    if on_broken == "raise":
        raise ValueError(f"{rule}, but got {counted(reasons)}. Mend these, or leave them out with --on_broken skip.")
    note = f"Left out: {counted(reasons)}."
    logger.warning("%s", note)
    return (note,)


def counted(reasons: Mapping[str, int]) -> str:
    """Numbers and what of, the largest first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {reason}" for reason, n in ordered if n)


def read_labels(labels_file: str | os.PathLike) -> pd.DataFrame:
    """Read a table as text, its columns under this package's names.

    Args:
        labels_file: CSV with commas or semicolons, or with tabs if its name ends in ``.tsv``; UTF-8.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if none is given, or it is no table, is empty, or has two columns of the same meaning.
    """
    _refuse_none("labels_file", labels_file, "FILE")
    path = Path(labels_file)
    if not path.is_file():
        raise FileNotFoundError(f"labels_file should be a table, but got {str(labels_file)!r}. Check the path.")
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(path)
    try:
        table = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            na_values=BLANKS,
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).strip()
        raise ValueError(f"labels_file should be a CSV or TSV table, but could not be read ({reason}).") from None
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("Rows of labels_file have more fields than its header. Check the commas.")
    if table.empty:
        raise ValueError("labels_file should hold at least one row, but has none.")
    known = {**ALIASES, **{name: name for name in (*KEYS, "label", "split")}}
    table.columns = pd.Index([known.get(str(name).strip().lower(), str(name).strip()) for name in table.columns])
    if table.columns.has_duplicates:
        twice = _listed(table.columns[table.columns.duplicated()].unique())
        raise ValueError(f"labels_file should have one column of each kind, but has more of {twice}. Remove one.")
    for name in table:
        table[name] = table[name].str.strip()
    if "file" in table:
        table["file"] = table["file"].map(lambda file: posixpath.normpath(file.replace("\\", "/")), na_action="ignore")
    return table


def _separator(path: Path) -> str:
    """Semicolons where the header has them and no comma, as some spreadsheets write."""
    with open(path, "rb") as file:
        header = file.readline()
    return ";" if b";" in header and b"," not in header else ","


def labelled_data(
    name: str,
    root: Path,
    index: pd.DataFrame,
    table: pd.DataFrame,
    class_names: Sequence[str] | None,
    on_broken: str,
    channels: int = 1,
    notes: tuple[str, ...] = (),
) -> ImageData:
    """Join images and labels, and divide them into training, validation and test images.

    Args:
        name: what the report calls the data.
        root: folder of the files.
        index: one row an image: ``file``, ``patient`` and other attributes.
        table: the labels, with at least one of ``KEYS``; the finest one counts.
        class_names: as in ``read_table``.
        on_broken: whether images without a label and labels without an image are refused or left out.
        channels: number of channels of a loaded image.
        notes: what the report has to say already.

    Raises:
        ValueError: if labels don't fit together with images, or images can't be divided.
    """
    key = next((key for key in KEYS if key in table and key in index), None)
    if key is None:
        keys = [key for key in KEYS if key in index]
        raise ValueError(
            f"labels_file should have a column {_listed(keys, 'or')}, but none of its {len(table.columns)} columns is "
            "called so. Check its first row; names of columns are not shown, since without a header they are ids."
        )
    empty = table[key].isna()
    table = table[~empty].drop_duplicates()
    repeated = int(table[key].duplicated().sum())
    if repeated:
        raise ValueError(
            f"labels_file should name each {key} once, but {repeated} of {len(table)} rows name one again with other "
            "values. Remove the wrong ones."
        )
    names, labels, findings = _labels(table, class_names, set(index.columns))
    known = labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(axis=1)
    rows = pd.Index(table[key]).get_indexer(pd.Index(index[key]))
    usable = (rows >= 0) & known[rows]
    reasons = {
        "images without a label": int((~usable).sum()),
        f"labels without an image (by {key})": len(table) - len(np.unique(rows[rows >= 0])),
        f"labels without a value for {key}": int(empty.sum()),
    }
    if not usable.any():
        raise ValueError(
            f"labels_file and dataset_dir should belong together, but none of {len(index)} images has a label by "
            f"{key}. Check that its values are spelt as in the data; ids are not shown to keep them out of logs."
        )
    notes += report_broken(reasons, on_broken, f"{len(index)} images and {len(table)} labels should belong together")
    rows = rows[usable]
    attributes, chosen = index[usable].reset_index(drop=True), table.iloc[rows].reset_index(drop=True)
    for coarser in KEYS[KEYS.index(key) + 1 :]:
        if coarser in chosen and coarser in attributes:
            other = int((chosen[coarser].notna() & (chosen[coarser] != attributes[coarser])).sum())
            if other:
                raise ValueError(
                    f"labels_file and the images should agree on the {coarser} of each {key}, but don't for {other} of "
                    f"{len(chosen)} images. Correct the table, or remove its column."
                )
    extra = [column for column in chosen if column not in (*KEYS, "label", "split", *findings)]
    attributes = attributes.assign(**{column: _numbers(chosen[column]) for column in extra})
    if "split" in chosen:
        part_of = _given_parts(chosen["split"])
        shared = int((pd.Series(part_of).groupby(attributes["patient"]).nunique() > 1).sum())
        if shared:
            note = f"{shared} patients have images in more than one of training, validation and test images."
            logger.warning("%s", note)
            notes += (note,)
    else:
        part_of = _drawn_parts(attributes["patient"])
    labels = labels[rows]
    _check_training(labels[part_of == "train"], names)
    logger.info("Labels by %s; %s: %s", key, "findings" if findings else "classes", _listed(names))

    def part(name: str) -> ImageFiles:
        here = part_of == name
        own = attributes[here].reset_index(drop=True)
        return ImageFiles(
            root=root,
            files=own["file"].to_numpy(dtype=object),
            labels=labels[here],
            attributes=own.drop(columns="file"),
            channels=channels,
            name=name,
        )

    test = part("test") if (part_of == "test").any() else None
    return ImageData(name, names, part("train"), part("validation"), test, notes=notes)


def _labels(
    table: pd.DataFrame, class_names: Sequence[str] | None, reserved: set[str]
) -> tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]:
    """Names of classes or findings, the labels (-1 or NaN where not known), and the columns that are findings."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names should be a list of names, but got {class_names!r}. Put it in a list.")
    given = None if class_names is None else tuple(map(str, class_names))
    if given is not None and len(set(given)) < len(given):
        raise ValueError("class_names should name each class once, but some repeat.")
    if "label" in table:
        values = table["label"].dropna()
        names = _sorted_names(set(values)) if given is None else given
        if len(names) < 2:
            raise ValueError(f"The column label should have at least two classes, but has {len(names)}.")
        unknown = int((~values.isin(names)).sum())
        if unknown:
            raise ValueError(f"Labels should be in class_names ({_listed(names)}), but {unknown} are not.")
        return names, pd.Categorical(table["label"], categories=list(names)).codes.astype(np.int64), ()
    candidates = [column for column in table if column not in {*KEYS, "split", *reserved, *NO_FINDINGS}]
    numbers = table[candidates].apply(pd.to_numeric, errors="coerce")
    zero_or_one = (numbers.isin([0, 1]) | table[candidates].isna()).all() & table[candidates].notna().any()
    names = tuple(column for column in candidates if zero_or_one[column]) if given is None else given
    missing = [name for name in names if name not in candidates]
    if missing or not names:
        raise ValueError(
            "labels_file should have a column label with classes, or columns of 0, 1 and blank for findings, but has "
            + (f"no {_listed(missing)}." if missing else "neither.")
            + " Check its first row, or name the columns that are findings with --class_names."
        )
    wrong = [name for name in names if not zero_or_one[name]]
    if wrong:
        raise ValueError(
            f"Findings should be 0, 1 or blank where not known, but {_listed(wrong)} hold something else or nothing. "
            "Correct the table, or name the columns that are findings with --class_names."
        )
    return names, numbers[list(names)].to_numpy(dtype=np.float32), names


def _sorted_names(values: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(values, key=float))
    except ValueError:
        return tuple(sorted(values))


def _numbers(column: pd.Series) -> pd.Series:
    """The column as numbers, if it holds nothing else; 007 is none."""
    if column.str.match(r"0\d").any():
        return column
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def _given_parts(column: pd.Series) -> np.ndarray:
    parts = column.str.lower().map(PARTS)
    if parts.isna().any():
        raise ValueError(
            f"The column split should say train, validation or test, but {int(parts.isna().sum())} of {len(parts)} "
            "images have something else or nothing there."
        )
    for name in ("train", "validation"):
        if not (parts == name).any():
            raise ValueError(f"The column split should give at least one image to {name}, but gives none.")
    return parts.to_numpy(dtype=object)


def _drawn_parts(patients: pd.Series) -> np.ndarray:
    """Training, validation or test for each image: 70, 15 and 15 % of the images, whole patients."""
    member, names = pd.factorize(patients, sort=True)
    counts = np.bincount(member)
    order = hashed_order(list(names), SPLIT_SEED)
    middle = (np.cumsum(counts[order]) - counts[order] / 2) / len(patients)  # where a patient's images lie in the order
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.searchsorted(ENDS, middle, side="right")
    train, validation, test = np.bincount(place, minlength=3)
    if train < 1 or validation < 2 or test < 1:
        raise ValueError(
            f"{len(names)} patients are too few to be divided by themselves: {train} would be for training, "
            f"{validation} for validation (at least 2 are needed) and {test} for testing. Add a column split to "
            "labels_file."
        )
    return np.array(["train", "validation", "test"], dtype=object)[place[member]]


def _check_training(labels: np.ndarray, names: tuple[str, ...]) -> None:
    seen = np.isin(np.arange(len(names)), labels) if labels.ndim == 1 else ~np.isnan(labels).all(axis=0)
    if not seen.all():
        missing = _listed([name for name, there in zip(names, seen) if not there])
        raise ValueError(
            f"Each class or finding should have a label among the training images, but not so {missing}. "
            "Use more data, another column split, or other class_names."
        )


def _listed(names: Sequence[str] | pd.Index, word: str = "and") -> str:
    names = list(map(str, names))
    if len(names) > 12:
        names = [*names[:12], f"{len(names) - 12} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
