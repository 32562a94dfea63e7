"""Labelled images held in memory, in named splits: what every reader of this package returns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["BatchedImages", "ImageData", "LabeledImages", "make_loader"]

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class LabeledImages:
    """One split: images, labels and what is known of each image.

    Args:
        images: N × H × W (grey) or N × H × W × C, uint8 in [0, 255] or floating point in [0, 1].
        labels: N class indices, integer.
        attributes: N rows, one column for each thing known of an image (``patient``, ``sex``, …); may have none.

    Raises:
        ValueError: if shapes disagree, the split is empty, or a value is not finite.
    """

    images: np.ndarray
    labels: np.ndarray
    attributes: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        if len(self.labels) == 0:
            raise ValueError("A split should hold at least one image, but got none. Check the data file.")
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
        if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.ndim != 1:
            raise ValueError(
                f"labels should be N integers, but got {self.labels.dtype} of shape {self.labels.shape}. "
                "Multi-label tasks are not supported yet."
            )
        if len(self.attributes.columns) and len(self.attributes) != len(self.labels):
            raise ValueError(f"attributes should have {len(self.labels)} rows, but got {len(self.attributes)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def patients(self) -> np.ndarray | None:
        """Patient of each image, or None where the data has no patients."""
        return self.attributes["patient"].to_numpy() if "patient" in self.attributes else None


@dataclass(frozen=True)
class ImageData:
    """A data set: its training, validation and test images and the names of its classes.

    ``embedded`` is true of the package's own synthetic set alone, for which a run may train an original by itself.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    embedded: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            part = getattr(self, name)
            if part.labels.min() < 0 or part.labels.max() >= self.num_classes:
                raise ValueError(
                    f"labels of {name} should lie in [0, {self.num_classes - 1}] for {self.num_classes} classes, "
                    f"but got [{part.labels.min()}, {part.labels.max()}]. Check the data file."
                )
            if part.images.shape[1:] != self.train.images.shape[1:]:
                raise ValueError(
                    f"all images should have the shape {self.train.images.shape[1:]} of the training images, "
                    f"but those of {name} have {part.images.shape[1:]}."
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Number of channels of an image, 1 for grey."""
        return 1 if self.train.images.ndim == 3 else self.train.images.shape[3]

    def digest(self) -> str:
        """SHA-256 of all images, labels and patients, in order."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for array in (part.images, part.labels):
                sha.update(f"{array.shape}{array.dtype.str}".encode())
                sha.update(np.ascontiguousarray(array).data)
            if part.patients is not None:
                sha.update("\0".join(map(str, part.patients)).encode())
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
        self._labels = torch.from_numpy(source.labels).long().to(device)
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


def make_loader(dataset: Dataset, batch_size: int, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Loader over an ``BatchedImages``, or a ``Subset`` of one.

    When shuffled training would end an epoch on a batch of one image, on which BatchNorm is undefined, that
    image (another one each epoch) is left out.

    Args:
        dataset: an ``BatchedImages`` or a ``Subset`` of one.
        batch_size: images a batch, at least 1.
        shuffle: draw a new order each epoch.
        seed: seed of the order.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size should be an integer of at least 1, but got {batch_size!r}.")
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("The data set of a loader should hold at least one image, but got none.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle and size > 1 and size % batch_size == 1,
        collate_fn=_already_batched,
        generator=torch.Generator().manual_seed(seed),
    )
