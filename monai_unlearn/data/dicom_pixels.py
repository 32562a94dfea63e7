"""DICOM pixels as a viewer shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from monai.data import ImageReader, PydicomReader

try:
    from pydicom.pixels import apply_voi, apply_windowing
except ImportError:  # pydicom 2.4, which MONAI Label needs
    from pydicom.pixel_data_handlers.util import apply_voi, apply_windowing  # type: ignore[no-redef]

__all__ = ["PYDICOM", "DicomViewReader", "as_displayed"]

# No more of the header is read: neither ids nor names get near the images.
TAGS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "InstanceNumber",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601


PYDICOM = int(pydicom.__version__.split(".")[0])


def as_displayed(pixels: np.ndarray, header: pydicom.Dataset, window: Sequence[float] | None = None) -> np.ndarray:
    """Grey values as a viewer shows them, 0 black and 1 white.

    A window maps its range to [0, 1], as DICOM PS3.3 C.11.2 has it: the one given, or else the header's VOI LUT, or its
    first window; where it has neither, or one of no width, smallest to largest value. MONOCHROME1, in which large
    values are dark, is inverted after that. Colour becomes luma, without a window.

    Args:
        pixels: values after the rescale, of any shape; channels last for colour.
        header: the image's header.
        window: centre and width, in the unit of the rescaled values (HU for CT).

    Returns:
        float32 of the same shape (without channels), in [0, 1].

    Raises:
        ImportError: of colour, if pydicom is older than 3.0.
    """
    if header.get("SamplesPerPixel", 1) == 3:
        if PYDICOM < 3:  # gives the colours of compressed files as they are stored, which may be YBR
            raise ImportError(f"Colour images need pydicom 3.0 or later, but this is {pydicom.__version__}.")
        return np.clip(pixels.astype(np.float32) @ LUMA / (2**header.BitsStored - 1), 0, 1)
    if window is None and header.get("VOILUTSequence"):
        white = 2 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1
        grey = apply_voi(np.rint(pixels).astype(np.int64), header) / white
    else:
        view = pydicom.Dataset()
        function, center, width = ("LINEAR", *window) if window is not None else _window(header)
        if center is None:
            low, high = float(pixels.min()), float(pixels.max())
            function, center, width = "LINEAR_EXACT", (low + high) / 2, max(high - low, np.finfo(np.float32).tiny)
        view.VOILUTFunction, view.WindowCenter, view.WindowWidth = function, center, width
        # Of 8 bits without a rescale the result is in [0, 255].
        view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 8, 0
        grey = apply_windowing(pixels, view) / 255
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    return np.clip(grey, 0, 1).astype(np.float32)


def _window(header: pydicom.Dataset) -> tuple[str, float | None, float | None]:
    """Function, centre and width of the first window; None where there is none that can be used."""
    center, width = (_first(header.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    function = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return function, None, None
    return function, center, width


def _first(value: Any) -> float | None:
    values = list(value) if isinstance(value, pydicom.multival.MultiValue) else [value]
    return float(values[0]) if values and values[0] not in (None, "") else None


class DicomViewReader(ImageReader):
    """MONAI's ``PydicomReader``, with grey values as a viewer shows them instead of as stored.

    Reading, rescale slope and intercept, order of slices and the affine are MONAI's; so is the order of the axes, which
    swaps rows and columns (``swap_ij``). Rescaled values go through ``as_displayed``; a series has the window of its
    first slice. No id, name or date is read.

    Args:
        window: centre and width in the unit of the rescaled values (HU for CT); None for that of each file.
        swap_ij: the first axis goes along a row, as from MONAI's other readers; False: rows first, as on the screen.

    Raises:
        ValueError: if the window is none.

    Example:
        >>> from monai.transforms import LoadImaged
        >>> load = LoadImaged("image", reader=DicomViewReader(window=(40, 400)))
    """

    def __init__(self, window: Sequence[float] | None = None, swap_ij: bool = True) -> None:
        if window is not None and (len(window) != 2 or not np.isfinite(window).all() or window[1] < 1):
            raise ValueError(f"window should be centre and width, the width at least 1, but got {window!r}.")
        self.window = None if window is None else (float(window[0]), float(window[1]))
        self.swap_ij = swap_ij

    def verify_suffix(self, filename: Any) -> bool:
        """Whatever the name: files of an archive often have no ending."""
        return True

    def read(self, data: str | os.PathLike | Sequence[str | os.PathLike], **kwargs: Any) -> Any:
        """The paths: after an error here, MONAI would try readers that don't know of windows."""
        return data

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Pixels and metadata, as ``PydicomReader`` gives them."""
        # One for each image: it keeps the names of what it is reading, and threads may share this one.
        reader = PydicomReader(
            swap_ij=self.swap_ij,
            fname_regex=None,  # type: ignore[arg-type]  # of a folder, the DICOM files only
            specific_tags=list(TAGS),
        )
        datasets = reader.read(img)
        header = min(datasets, key=lambda one: one.InstanceNumber) if isinstance(datasets, list) else datasets
        if header.get("ModalityLUTSequence"):
            raise ValueError("Images with a modality look-up table are not supported. Leave them out.")
        pixels, meta = reader.get_data(datasets)
        shown = as_displayed(pixels, header, self.window)
        meta["spatial_shape"] = np.asarray(shown.shape)
        return shown, meta
