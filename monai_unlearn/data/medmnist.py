"""MedMNIST's own files (Yang et al., Scientific Data 2023), read with NumPy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from medmnist import INFO
from monai.apps import download_url

from monai_unlearn.data.image_data import ImageData, LabeledImages

__all__ = ["download_medmnist", "read_medmnist"]

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def read_medmnist(file: str | os.PathLike) -> ImageData:
    """Read a 2-D set of MedMNIST from its ``.npz`` file.

    The names of the classes come from the ``medmnist`` package when the file is named after one of its sets
    (``pneumoniamnist.npz``, ``tissuemnist_64.npz``); otherwise the classes are numbered.

    Args:
        file: an ``.npz`` file with ``{train,val,test}_images`` (N × H × W or N × H × W × 3, uint8) and
            ``{train,val,test}_labels`` (N × 1, integer).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, lacks a key, or has shapes or labels of another task.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset_file should be an existing .npz file, but got {str(file)!r}. "
            "Check the path, or fetch a set with --download NAME."
        )
    info = INFO.get(path.name.split(".")[0].split("_")[0].lower())
    if info is not None and info["task"] == "multi-label, binary-class":
        raise ValueError(f"{path.name} is a multi-label set, which is not supported yet. Use a multi-class one.")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for split in SPLITS.values():
                for kind in ("images", "labels"):
                    if f"{split}_{kind}" not in stored:
                        raise KeyError(f"{split}_{kind}")
                    arrays[split, kind] = stored[f"{split}_{kind}"]
    except KeyError as missing:
        raise ValueError(
            f"{path.name} should hold {{train,val,test}}_images and _labels as MedMNIST's files do, but has no "
            f"{missing.args[0]!r}. Check that it is a MedMNIST file."
        ) from None
    except Exception as error:  # damage shows as whatever zipfile, zlib and NumPy trip over: TypeError, zlib.error, …
        raise ValueError(
            f"{path.name} could not be read ({error}). It is damaged or no .npz file: fetch it again."
        ) from error

    parts = {name: _labeled_images(path.name, split, arrays) for name, split in SPLITS.items()}
    if info is not None:
        names = tuple(info["label"][str(i)] for i in range(len(info["label"])))
    else:
        largest = max(int(part.labels.max()) for part in parts.values())
        if largest >= len(parts["train"]):  # as many classes as images: these are no class numbers
            raise ValueError(f"labels of {path.name} should number the classes from 0, but go up to {largest}.")
        names = tuple(str(i) for i in range(1 + largest))
    if len(names) < 2:
        raise ValueError(f"{path.name} should have at least two classes, but has {len(names)}.")
    return ImageData(path.stem, names, parts["train"], parts["validation"], parts["test"])


def _labeled_images(file: str, split: str, arrays: dict) -> LabeledImages:
    images, labels = arrays[split, "images"], arrays[split, "labels"]
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise ValueError(
            f"{file}: {split}_images should be N × H × W or N × H × W × 3, but got {images.shape}. "
            "3-D sets are not supported yet."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{file}: {split}_labels should be N × 1 integers, but got {labels.dtype} of shape "
            f"{arrays[split, 'labels'].shape}. Multi-label tasks are not supported yet."
        )
    try:
        return LabeledImages(images=images, labels=labels.astype(np.int64))
    except ValueError as error:
        raise ValueError(f"{file}, {split}: {error}") from None


def download_medmnist(name: str, folder: str | os.PathLike) -> Path:
    """Fetch a MedMNIST set from the address, and check the MD5 sum, that the ``medmnist`` package gives.

    Args:
        name: a set such as ``"tissuemnist"``, or with its size, ``"tissuemnist_64"``.
        folder: where to put ``NAME.npz``; a file that is already there is checked and used.

    Raises:
        ValueError: if there is no such 2-D set.
        ConnectionError: if it cannot be fetched.
    """
    base, _, size = str(name).lower().partition("_")
    suffix = f"_{size}" if size else ""
    if base not in INFO or f"url{suffix}" not in INFO[base] or base.endswith("3d"):
        sets = ", ".join(sorted(key for key in INFO if not key.endswith("3d")))
        raise ValueError(f"download should be a 2-D set of MedMNIST, but got {name!r}. There are: {sets}.")
    target = Path(folder) / f"{base}{suffix}.npz"
    try:
        download_url(INFO[base][f"url{suffix}"], target, hash_val=INFO[base][f"MD5{suffix}"], hash_type="md5")
    except Exception as error:  # MONAI lets whatever urllib or gdown raise through, and RuntimeError for the checksum
        raise ConnectionError(
            f"{target.name} could not be fetched: {error}. Without a network, get the file from "
            f"medmnist.com on another machine and give it with --dataset_file."
        ) from error
    return target
