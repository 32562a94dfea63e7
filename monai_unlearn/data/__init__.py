"""Data sets, splits and loaders."""

from monai_unlearn.data.augmentation import RandomFlip, RandomShift
from monai_unlearn.data.chexpert import read_chexpert
from monai_unlearn.data.dicom import dicom_index, quiet_pydicom, read_dicom
from monai_unlearn.data.dicom_pixels import DicomViewReader
from monai_unlearn.data.image_data import BatchedImages, ImageData, ImageFiles, LabeledImages, make_loader
from monai_unlearn.data.image_files import FileImages, GreyImage, file_dataset, remove_cached
from monai_unlearn.data.load import load_data
from monai_unlearn.data.matched import column_strata, matched_loader, matched_rows
from monai_unlearn.data.medmnist import download_medmnist, read_medmnist
from monai_unlearn.data.request import DeletionRequest, Resolution, Selector, read_request, resolve_request
from monai_unlearn.data.rules import ID_COLUMNS
from monai_unlearn.data.splits import Split, make_split, people
from monai_unlearn.data.synthetic import synthetic_cells
from monai_unlearn.data.table import read_labels, read_table

__all__ = [
    "ID_COLUMNS",
    "BatchedImages",
    "DeletionRequest",
    "DicomViewReader",
    "FileImages",
    "GreyImage",
    "ImageData",
    "ImageFiles",
    "LabeledImages",
    "RandomFlip",
    "RandomShift",
    "Resolution",
    "Selector",
    "Split",
    "column_strata",
    "dicom_index",
    "download_medmnist",
    "file_dataset",
    "load_data",
    "make_loader",
    "make_split",
    "matched_loader",
    "matched_rows",
    "people",
    "quiet_pydicom",
    "read_chexpert",
    "read_dicom",
    "read_labels",
    "read_medmnist",
    "read_request",
    "read_table",
    "remove_cached",
    "resolve_request",
    "synthetic_cells",
]
