"""Labelled images, in memory or on disk, in named splits: what every reader of this package returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader as MonaiDataLoader
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = ["BatchedImages", "ImageData", "ImageFiles", "LabeledImages", "make_loader"]

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class LabeledImages:
    """One split in memory: images, labels and what is known of each image.

    Args:
        images: N × H × W (grey) or N × H × W × C, uint8 in [0, 255] or floating point in [0, 1].
        labels: N class indices, integer; or, for a multi-label task, N × L floating point in [0, 1], where a value in
            between is a soft label and NaN is not known.
        attributes: N rows, one column for each thing known of an image (``patient``, ``sex``, …); may have none.

    Raises:
        ValueError: if shapes disagree, the split is empty, or a value is not finite.
    """

    images: np.ndarray
    labels: np.ndarray
    attributes: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.attributes)
        if self.images.ndim not in (3, 4) or len(self.images) != len(self.labels):
            raise ValueError(
                f"images should be N × H × W or N × H × W × C with N = {len(self.labels)} (the number of labels), "
                f"but got shape {self.images.shape}. Check the data file."
            )
        if np.issubdtype(self.images.dtype, np.floating):
            bad = ~np.isfinite(self.images).reshape(len(self.images), -1).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"images should be finite, but {int(bad.sum())} of {len(bad)} hold NaN or infinity. "
                    "Repair or remove them before training."
                )
            if self.images.min() < 0 or self.images.max() > 1:
                raise ValueError(
                    f"floating-point images should lie in [0, 1], but got [{self.images.min()}, {self.images.max()}]. "
                    "Rescale them, or store them as uint8."
                )
        elif self.images.dtype != np.uint8:
            raise ValueError(
                f"images should be uint8 or floating point, but got {self.images.dtype}. Convert the data file."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def patients(self) -> np.ndarray | None:
        """Patient of each image, or None where the data has no patients."""
        return self.attributes["patient"].to_numpy() if "patient" in self.attributes else None

    @property
    def channels(self) -> int:
        """Number of channels of an image, 1 for grey."""
        return 1 if self.images.ndim == 3 else self.images.shape[3]

    def index(self) -> pd.DataFrame:
        """One row an image, in order, with all that a request can ask for."""
        return self.attributes if len(self.attributes.columns) else pd.DataFrame(index=range(len(self)))

    def feed(self, sha: hashlib._Hash) -> None:
        """Add what the split consists of to a hash: images, labels and patients, in order."""
        for array in (self.images, self.labels):
            sha.update(f"{array.shape}{array.dtype.str}".encode())
            sha.update(np.ascontiguousarray(array).data)
        if self.patients is not None:
            sha.update("\0".join(map(str, self.patients)).encode())

    def content(self, row: int) -> bytes:
        """What identifies an image: its pixels and its label."""
        return self.images[row].tobytes() + bytes(str(self.labels[row]), "ascii")


@dataclass(frozen=True)
class ImageFiles:
    """One split on disk: image files, labels and what is known of each image. No image is opened to make it.

    Args:
        root: folder of the files.
        files: N paths relative to ``root``, with ``/`` between folders; a folder for a DICOM series.
        labels: as in ``LabeledImages``.
        attributes: as in ``LabeledImages``, without ``file``.
        channels: number of channels of a loaded image.
        name: which part of an ``ImageData`` it is, for errors.

    Raises:
        ValueError: if numbers disagree or the split is empty.
    """

    root: Path
    files: np.ndarray
    labels: np.ndarray
    attributes: pd.DataFrame = field(default_factory=pd.DataFrame)
    channels: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.attributes)
        if len(self.files) != len(self.labels):
            raise ValueError(f"files should be {len(self.labels)} (the number of labels), but are {len(self.files)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def patients(self) -> np.ndarray | None:
        """Patient of each image, or None where the data has no patients."""
        return self.attributes["patient"].to_numpy() if "patient" in self.attributes else None

    @property
    def paths(self) -> list[str]:
        """Path of each image."""
        return [os.path.join(self.root, file) for file in self.files]

    def index(self) -> pd.DataFrame:
        """One row an image, in order, with all that a request can ask for."""
        return self.attributes.assign(file=self.files)

    def records(self) -> list[dict[str, Any]]:
        """A record for each image, as MONAI's data sets take them: ``image`` (its path), ``label`` and ``index``."""
        labels = self.labels if self.labels.ndim == 2 else self.labels.tolist()
        return [{"image": p, "label": y, "index": i} for i, (p, y) in enumerate(zip(self.paths, labels))]

    def feed(self, sha: hashlib._Hash) -> None:
        """Add what the split consists of to a hash: names and sizes of the files, labels and patients, in order."""
        for file, path in zip(self.files, self.paths):
            sha.update(f"{file}\0{os.stat(path).st_size}\0".encode())
        sha.update(f"{self.labels.shape}{self.labels.dtype.str}".encode())
        sha.update(np.ascontiguousarray(self.labels).data)
        if self.patients is not None:
            sha.update("\0".join(map(str, self.patients)).encode())

    def content(self, row: int) -> bytes:
        """What identifies an image: its file's name and its label."""
        return bytes(f"{self.files[row]}\0{self.labels[row]}", "utf-8")


def _check_labels(labels: np.ndarray, attributes: pd.DataFrame) -> None:
    if len(labels) == 0:
        raise ValueError("A split should hold at least one image, but got none. Check the data file.")
    if labels.ndim == 2 and np.issubdtype(labels.dtype, np.floating):
        known = labels[~np.isnan(labels)]
        if len(known) and (known.min() < 0 or known.max() > 1):
            raise ValueError(
                f"labels of a multi-label task should lie in [0, 1], or be NaN where they are not known, but got "
                f"[{known.min()}, {known.max()}]. Check the data file."
            )
    elif not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(
            f"labels should be N integers, but got {labels.dtype} of shape {labels.shape}. "
            "Those of a multi-label task are N × L floating-point numbers."
        )
    if len(attributes.columns) and len(attributes) != len(labels):
        raise ValueError(f"attributes should have {len(labels)} rows, but got {len(attributes)}.")


@dataclass(frozen=True)
class ImageData:
    """A data set: its training, validation and test images and the names of its classes, or findings.

    ``embedded`` is true of the package's own synthetic set alone, for which a run may train an original by itself.
    Without test images the half of the validation images that nothing is chosen on is the test set too. ``notes`` are
    sentences that a report has to say about the data.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabeledImages | ImageFiles
    validation: LabeledImages | ImageFiles
    test: LabeledImages | ImageFiles | None
    embedded: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, part in self.parts().items():
            if part.labels.ndim != self.train.labels.ndim:
                raise ValueError(f"labels of {name} are of another task than those of the training images.")
            if self.multi_label:
                if part.labels.shape[1] != self.num_classes:
                    raise ValueError(
                        f"labels of {name} should have {self.num_classes} columns, one a finding, but have "
                        f"{part.labels.shape[1]}. Check the data file."
                    )
            elif part.labels.min() < 0 or part.labels.max() >= self.num_classes:
                raise ValueError(
                    f"labels of {name} should lie in [0, {self.num_classes - 1}] for {self.num_classes} classes, "
                    f"but got [{part.labels.min()}, {part.labels.max()}]. Check the data file."
                )
            shapes = [p.images.shape[1:] for p in (self.train, part) if isinstance(p, LabeledImages)]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"all images should have the shape {shapes[0]} of the training images, "
                    f"but those of {name} have {shapes[1]}."
                )

    def parts(self) -> dict[str, LabeledImages | ImageFiles]:
        """The parts that are there, by name."""
        parts = {"train": self.train, "validation": self.validation}
        return parts if self.test is None else {**parts, "test": self.test}

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several findings, rather than one class."""
        return self.train.labels.ndim == 2

    @property
    def num_classes(self) -> int:
        """Number of classes, or findings."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Number of channels of an image, 1 for grey."""
        return self.train.channels

    def digest(self) -> str:
        """SHA-256 of the parts, in order: pixels of images in memory, names and sizes of files; labels, patients."""
        sha = hashlib.sha256()
        for part in self.parts().values():
            part.feed(sha)
        return sha.hexdigest()


class BatchedImages(Dataset):
    """In-memory images as MONAI batches: ``{"image": B × C × H × W, "label": B, "index": B}``.

    A whole batch is taken from one tensor and augmented at once, which costs a few microseconds an image where
    the per-image transforms of a ``CacheDataset`` cost about a hundred; see docs/benchmarks.md.

    Args:
        source: the images.
        augmentation: functions of (batch, generator) that return the changed batch; applied in order.
        seed: seed of the augmentation.
        device: where to keep the images.
        value_range: what black and white become, low < high: (-1, 1) as MedMNIST's own models have it, or (0, 1).

    Raises:
        ValueError: if the range is none.
    """

    def __init__(
        self,
        source: LabeledImages,
        augmentation: Sequence[Augmentation] = (),
        seed: int = 0,
        device: str | torch.device = "cpu",
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise ValueError(f"value_range should be two numbers, the lower first, but got {value_range!r}.")
        self._low, self._high = map(float, value_range)
        images = torch.from_numpy(source.images)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        self._images = images.contiguous().to(device)
        labels = torch.from_numpy(source.labels)
        self._labels = (labels.long() if labels.ndim == 1 else labels.float()).to(device)
        self._index = torch.arange(len(source), device=device)
        self._source = source
        self.augmentation = tuple(augmentation)
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def data(self) -> list[dict]:
        """A record for each image, as in MONAI's data sets, without its pixels."""
        return [{"index": i} for i in range(len(self))]

    def without_random(self) -> BatchedImages:
        """The same images, shared, without augmentation."""
        plain = object.__new__(type(self))
        plain.__dict__.update(self.__dict__, augmentation=())
        return plain

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices, device=self._images.device)
        images = self._images[rows]
        white = 255 if images.dtype == torch.uint8 else 1
        images = images.float().mul_((self._high - self._low) / white).add_(self._low)
        for augment in self.augmentation:
            images = augment(images, self._generator)
        return {"image": images, "label": self._labels[rows], "index": self._index[rows]}


def _already_batched(batch: Any) -> Any:
    return batch


def make_loader(
    dataset: Dataset, batch_size: int, shuffle: bool = False, seed: int = 0, num_workers: int = 0
) -> DataLoader:
    """Loader over images in memory or on disk.

    When shuffled training would end an epoch on a batch of one image, on which BatchNorm is undefined, that
    image (another one each epoch) is left out.

    Args:
        dataset: a ``BatchedImages``, a data set of MONAI's, or a ``Subset`` of one.
        batch_size: images a batch, at least 1.
        shuffle: draw a new order each epoch.
        seed: seed of the order and, with MONAI's data sets, of their random transforms.
        num_workers: processes that load images from disk; images in memory need none.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size should be an integer of at least 1, but got {batch_size!r}.")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"num_workers should be an integer of at least 0, but got {num_workers!r}.")
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("The data set of a loader should hold at least one image, but got none.")
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_last": shuffle and size > 1 and size % batch_size == 1,
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(base, BatchedImages):
        return DataLoader(dataset, collate_fn=_already_batched, **options)
    # MONAI's loader seeds the random transforms, in this process and in workers.
    return MonaiDataLoader(dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **options)
