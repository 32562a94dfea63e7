"""Data sets, splits and loaders."""

from monai_unlearn.data.augmentation import RandomFlip, RandomShift
from monai_unlearn.data.chexpert import read_chexpert
from monai_unlearn.data.image_data import BatchedImages, ImageData, ImageFiles, LabeledImages, make_loader
from monai_unlearn.data.image_files import FileImages, GreyImage, file_dataset, remove_cached
from monai_unlearn.data.load import load_data
from monai_unlearn.data.medmnist import download_medmnist, read_medmnist
from monai_unlearn.data.request import DeletionRequest, Resolution, Selector, read_request, resolve_request
from monai_unlearn.data.splits import Split, make_split, people
from monai_unlearn.data.synthetic import synthetic_cells

__all__ = [
    "BatchedImages",
    "DeletionRequest",
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
    "download_medmnist",
    "file_dataset",
    "load_data",
    "make_loader",
    "make_split",
    "people",
    "read_chexpert",
    "read_medmnist",
    "read_request",
    "remove_cached",
    "resolve_request",
    "synthetic_cells",
]
