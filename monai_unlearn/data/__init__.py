"""Data sets, splits and loaders."""

from monai_unlearn.data.augmentation import RandomFlip, RandomShift
from monai_unlearn.data.image_data import BatchedImages, ImageData, LabeledImages, make_loader
from monai_unlearn.data.load import load_data
from monai_unlearn.data.medmnist import download_medmnist, read_medmnist
from monai_unlearn.data.splits import Split, make_split
from monai_unlearn.data.synthetic import synthetic_cells

__all__ = [
    "BatchedImages",
    "ImageData",
    "LabeledImages",
    "RandomFlip",
    "RandomShift",
    "Split",
    "download_medmnist",
    "load_data",
    "make_loader",
    "make_split",
    "read_medmnist",
    "synthetic_cells",
]
