"""Which data a run works on: the embedded set, a MedMNIST file, or one to download."""

from __future__ import annotations

from monai_unlearn.data.image_data import ImageData
from monai_unlearn.data.medmnist import download_medmnist, read_medmnist
from monai_unlearn.data.synthetic import synthetic_cells

__all__ = ["load_data"]


def load_data(
    dataset_file: str | None = None, download: str | None = None, dataset_dir: str = "runs/data"
) -> ImageData:
    """Load a data set; without arguments, the embedded one.

    Args:
        dataset_file: a MedMNIST ``.npz`` file.
        download: name of a MedMNIST set to fetch into ``dataset_dir``.
        dataset_dir: folder of downloaded sets.

    Raises:
        ValueError: if both a file and a download are named.
    """
    if dataset_file is not None and download is not None:
        raise ValueError("Give dataset_file or download, not both.")
    if download is not None:
        return read_medmnist(download_medmnist(download, dataset_dir))
    if dataset_file is not None:
        return read_medmnist(dataset_file)
    return synthetic_cells()
