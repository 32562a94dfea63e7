"""DICOM archives: a list of images from their headers, joined to a table of labels."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGExtended12Bit
from tqdm import tqdm

from monai_unlearn.data.dicom_pixels import PYDICOM
from monai_unlearn.data.image_data import ImageData
from monai_unlearn.data.table import (
    check_on_broken,
    counted,
    existing_folder,
    labelled_data,
    read_labels,
    report_broken,
)

try:
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import get_expected_length
except ImportError:  # pydicom 2.4, which MONAI Label needs
    from pydicom.pixel_data_handlers.util import get_expected_length  # type: ignore[no-redef]

__all__ = ["dicom_index", "quiet_pydicom", "read_dicom"]

logger = logging.getLogger(__name__)
_quiet = threading.Lock()

# Threads gain nothing on a local disk, where pydicom's parsing is the work, and much on a network folder.
READING_THREADS = 8
ATTRIBUTES = {
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "instance": "SOPInstanceUID",
    "sex": "PatientSex",
    "manufacturer": "Manufacturer",
    "scanner": "ManufacturerModelName",
    "modality": "Modality",
    "photometric": "PhotometricInterpretation",
}
OTHERS = (
    "PatientAge",
    "InstanceNumber",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
)
TAGS = [tag for keyword in (*ATTRIBUTES.values(), *OTHERS) if (tag := tag_for_keyword(keyword)) is not None]
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and integer pixel data
UNDEFINED = 0xFFFFFFFF  # the length of compressed pixel data
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}

# Why a file is no image: left out and counted.
NO_DICOM, NO_IMAGE = "no DICOM files", "without an image (reports, plans, directories, segmentations, doses)"
LEFT_OUT = (NO_DICOM, NO_IMAGE)
# Why an image can't be used: refused, or left out and counted.
UNREADABLE = "could not be read"
NO_PATIENT = "without a patient ID"
MULTI_FRAME = "multi-frame"
NO_DECODER = "compressed in a way for which no decoder is installed"
CUT_SHORT = "with fewer pixels than the header says"
PALETTE = "in palette colours"
COLOUR = "in colour, for which pydicom 3.0 or later is needed"
SHARED_FOLDER = "series that are not alone in one folder"
BROKEN_SLICE = "series with a file that can't be used"
UNEQUAL_SLICES = "series with slices of several sizes, or in colour"
UNNUMBERED = "series without different instance numbers"
SINGLE = "series of one slice"


def dicom_index(dataset_dir: str | os.PathLike, level: str = "image", on_broken: str = "raise") -> pd.DataFrame:
    """List the images of a DICOM archive; headers are read, no pixels.

    All files of the folder and its subfolders are looked at, whatever their names. Those that are no DICOM files or
    hold no image are left out, and the log says how many.

    Args:
        dataset_dir: folder of the archive.
        level: ``"image"`` for a row a file; ``"series"`` for a row a series of slices, which has to be alone in a
            folder.
        on_broken: what to do with images that could not be read, have no patient ID, several frames, palette colours or
            fewer pixels than the header says, or that nothing installed can decode: ``"raise"``, or ``"skip"`` them and
            log how many.

    Returns:
        One row an image, sorted by file, with the columns file (relative, with ``/``; the folder of a series), patient,
        study, series, instance, sex, manufacturer, scanner, modality, photometric, age (years), frames, rows, columns;
        a series has ``slices`` instead of instance and frames.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no image that can be used, or broken ones. Neither files nor patients are named.
    """
    return _index(dataset_dir, level, on_broken)[0]


def read_dicom(
    dataset_dir: str | os.PathLike,
    labels_file: str | os.PathLike,
    level: str = "image",
    class_names: Sequence[str] | None = None,
    on_broken: str = "raise",
) -> ImageData:
    """Read a DICOM archive with a table of labels; no pixels are read.

    The table has a column ``patient``, ``study``, ``series``, ``instance`` or ``file`` (or ``PatientID``,
    ``StudyInstanceUID``, …); where it has several, the finest counts. Labels, ``split`` and other columns are as in
    ``read_table``; another column takes the place of the header's of that name.

    Args:
        dataset_dir: folder of the archive.
        labels_file: the table, CSV, or with tabs if its name ends in ``.tsv``.
        level: as in ``dicom_index``: ``"image"`` or ``"series"``.
        class_names: as in ``read_table``.
        on_broken: as in ``dicom_index``, also for images without a label and labels without an image.

    Raises:
        FileNotFoundError: if folder or table does not exist.
        ValueError: as ``dicom_index`` and ``read_table``.
    """
    table = read_labels(labels_file)  # before the headers, which take longer
    index, notes = _index(dataset_dir, level, on_broken)
    index = index.drop(columns=["rows", "columns", "frames", "photometric"], errors="ignore")
    name = "DICOM images" if level == "image" else "DICOM series"
    return labelled_data(name, Path(dataset_dir), index, table, class_names, on_broken, notes=notes)


def _index(dataset_dir: str | os.PathLike, level: str, on_broken: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The index, and what a report has to say of it."""
    check_on_broken(on_broken)
    if level not in ("image", "series"):
        raise ValueError(f"level should be image or series, but got {level!r}.")
    root = existing_folder(dataset_dir)
    files = _files(root)
    with quiet_pydicom(), ThreadPoolExecutor(READING_THREADS) as pool:
        headers = pool.map(lambda file: _read_header(root / file), files)
        found = list(tqdm(headers, "Headers", len(files), disable=None, leave=False))
    rows = [{"file": file, **header} for file, header in zip(files, found) if isinstance(header, dict)]
    problems = {file: header for file, header in zip(files, found) if isinstance(header, str)}
    left_out = {reason: n for reason, n in Counter(problems.values()).items() if reason in LEFT_OUT}
    broken = {reason: n for reason, n in Counter(problems.values()).items() if reason not in LEFT_OUT}
    if left_out:
        logger.info("Of %d files, these are no images: %s.", len(files), counted(left_out))
    notes = report_broken(broken, on_broken, f"All {len(files) - sum(left_out.values())} images should be usable")
    index = pd.DataFrame(rows)
    if level == "series" and rows:
        index, reasons = _series(root, index, {file for file, why in problems.items() if why != NO_DICOM})
        notes += report_broken(reasons, on_broken, f"All {len(index) + sum(reasons.values())} series should be usable")
    if index.empty:
        raise ValueError(
            f"dataset_dir should hold DICOM images, but of {len(files)} files none can be used"
            + (f": {counted(left_out | broken)}" if files else "")
            + ". Check the folder."
        )
    what = "images" if level == "image" else "series"
    modalities = index["modality"].value_counts().to_dict()
    logger.info("%d %s of %d patients: %s.", len(index), what, index["patient"].nunique(), counted(modalities))
    return index.drop(columns="number"), notes


def _files(root: Path) -> list[str]:
    """All files of a folder and its subfolders, relative to it, sorted."""
    found = []
    for folder, _, names in os.walk(root):
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    return sorted(found)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Without what pydicom logs and warns of, which quotes values of the header and, where debugging, names files.

    One thread at a time, as level and filters are the process's: the second to leave would put back the first's.
    """
    log = logging.getLogger("pydicom")
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _read_header(path: Path) -> dict[str, Any] | str:
    """What is known of an image, or why the file can't be used."""
    try:
        with open(path, "rb") as file:
            return _header(file)
    except InvalidDicomError:
        return UNREADABLE if path.suffix.lower() in (".dcm", ".dicom") else NO_DICOM
    except Exception:  # pydicom raises whatever a damaged file makes it trip over
        return UNREADABLE


def _header(file: BinaryIO) -> dict[str, Any] | str:
    length: int | None = None

    def at_pixels(tag: int, _vr: str | None, size: int) -> bool:
        nonlocal length
        if tag in PIXELS:
            length = size
        return tag in PIXELS

    data = read_partial(file, at_pixels, specific_tags=list(TAGS))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if length is None or data.get("Modality") in ("SEG", "RTDOSE"):
        return UNREADABLE if length is None and _should_have_pixels(data) else NO_IMAGE
    row: dict[str, Any] = {name: _text(data.get(keyword)) for name, keyword in ATTRIBUTES.items()}
    if row["patient"] is None:
        return NO_PATIENT
    row |= {"age": _years(data.get("PatientAge")), "frames": int(data.get("NumberOfFrames") or 1)}
    row |= {"rows": int(data.Rows), "columns": int(data.Columns), "number": data.get("InstanceNumber")}
    if row["frames"] > 1:
        return MULTI_FRAME
    if row["photometric"] == "PALETTE COLOR":
        return PALETTE
    if PYDICOM < 3 and int(data.get("SamplesPerPixel") or 1) > 1:
        return COLOUR
    syntax = data.file_meta.TransferSyntaxUID
    if not _decodable(syntax, data.BitsStored):
        return NO_DECODER
    deflated = syntax == DeflatedExplicitVRLittleEndian  # has no length in the file
    if length != UNDEFINED and (length < get_expected_length(data) or (not deflated and length > left)):
        return CUT_SHORT
    return row


def _should_have_pixels(data: pydicom.Dataset) -> bool:
    """Whether a file that ends before any pixels was an image."""
    return pydicom.uid.UID(str(data.file_meta.get("MediaStorageSOPClassUID", ""))).name.endswith("Image Storage")


def _text(value: Any) -> str | None:
    return str(value).strip() or None if value is not None else None


def _years(age: Any) -> float:
    """DICOM's age string (``045Y``, ``018M``) in years; NaN where it is missing or none."""
    match = re.fullmatch(r"(\d+)([DWMY])", str(age).strip().upper())
    return round(int(match[1]) * YEARS[match[2]], 3) if match else float("nan")


def _decodable(syntax: pydicom.uid.UID, bits: int) -> bool:
    """Whether something is installed that decodes images in a transfer syntax."""
    if PYDICOM < 3:
        handlers = [one for one in pydicom.config.pixel_data_handlers if one.is_available()]
        return any(one.supports_transfer_syntax(syntax) for one in handlers)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return False
    if syntax == JPEGExtended12Bit and bits > 8 and decoder.available_plugins == ("pillow",):
        return False  # Pillow decodes 8 bits of it
    return decoder.is_available


def _series(root: Path, index: pd.DataFrame, unusable: set[str]) -> tuple[pd.DataFrame, Counter[str]]:
    """One row for each series that MONAI can load from its folder, and how many can't be used for which reason."""
    folders = index["file"].map(os.path.dirname)
    bad_folders = set(map(os.path.dirname, unusable))
    series_in = index.groupby(folders)["series"].nunique(dropna=False)
    reasons: Counter[str] = Counter()
    rows = []
    for _, slices in index.groupby("series", sort=False, dropna=False):
        own = folders[slices.index].unique()
        folder = own[0]
        shapes = slices[["rows", "columns"]].drop_duplicates()
        if len(own) > 1 or series_in[folder] > 1 or any(entry.is_dir() for entry in os.scandir(root / folder)):
            reasons[SHARED_FOLDER] += 1
        elif folder in bad_folders:
            reasons[BROKEN_SLICE] += 1
        elif len(shapes) > 1 or not slices["photometric"].str.startswith("MONOCHROME").all():
            reasons[UNEQUAL_SLICES] += 1
        elif len(slices) == 1:
            reasons[SINGLE] += 1
        elif slices["number"].isna().any() or slices["number"].duplicated().any():
            reasons[UNNUMBERED] += 1
        else:
            first = slices.loc[slices["number"].astype(int).idxmin()]
            rows.append({**first.drop(["instance", "frames"]), "file": folder or ".", "slices": len(slices)})
    return pd.DataFrame(rows), reasons
