"""Images on disk as MONAI data sets: decoded when a step needs them, or kept in memory or on disk."""

from __future__ import annotations

import copy
import hashlib
import logging
import operator
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, PersistentDataset
from monai.data import Dataset as MonaiDataset
from monai.transforms import Compose, RandomizableTrait, Transform
from monai.utils import convert_to_tensor
from PIL import Image
from torch.utils.data import Dataset

from monai_unlearn.checkpoint import save_atomically
from monai_unlearn.data.image_data import ImageFiles

__all__ = ["FileImages", "GreyImage", "file_dataset", "remove_cached"]


class GreyImage:
    """Make a JPEG or PNG one grey image of size × size, for the ``converter`` of MONAI's ``LoadImaged``.

    Colour becomes luma (ITU-R 601), 16 bits become 8. Shrinking averages (Pillow's bilinear filter), and a JPEG at
    least four times as wide and high is decoded at a half, quarter or eighth of its size to begin with, still at least
    twice as large, which is far quicker.

    Args:
        size: side of the square in pixels, at least 1.

    Raises:
        ValueError: if the size is no whole number of at least 1.
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size should be an integer of at least 1, but got {size!r}.")
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a new image of mode L."""
        if image.mode.startswith("I"):  # 16-bit PNG
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        image.draft("L", (2 * self.size, 2 * self.size))
        return image.convert("L").resize((self.size, self.size), Image.Resampling.BILINEAR)


def file_dataset(
    source: ImageFiles,
    transform: Callable | Sequence[Callable],
    cache: str = "none",
    cache_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
) -> FileImages:
    """Images on disk with MONAI transforms.

    What the transforms before the first random one give depends on the image alone, so that it can be kept: the same
    copies then serve training, with augmentation, and evaluation, without.

    Args:
        source: the images.
        transform: MONAI dictionary transforms of ``image``. Those after the first random one see ``label`` and
            ``index`` too.
        cache: ``"none"`` decodes an image each time it is needed; ``"memory"`` (MONAI's ``CacheDataset``) decodes all
            of them at once and keeps them, once for all data sets of the same images and transforms; ``"disk"``
            (``PersistentDataset``) keeps each in ``cache_dir`` when it was needed for the first time.
        cache_dir: folder of the cache on disk; it holds copies of the images, without their metadata, see
            ``remove_cached``.
        num_workers: threads that fill the cache in memory.

    Raises:
        ValueError: if there is no such cache, a cache on disk without a folder, nothing for a cache to keep, transforms
            that can't be told from others, or a nested ``Compose`` with options; and, here or when an item is taken, if
            an image can't be read, or the cache on disk would hold text.
    """
    # At level INFO, MONAI's loader writes the name of a file that it can't read.
    logging.getLogger("LoadImage").setLevel(logging.WARNING)
    steps = _one_by_one(transform)
    first = next((i for i, step in enumerate(steps) if _may_be_random(step)), len(steps))
    fixed, rest = _Reading(source, steps[:first]), _Reading(source, steps[first:])
    records = _Records(source)
    if cache in ("memory", "disk") and not first:
        raise ValueError(
            f"transform should begin with transforms of MONAI's that are not random for a cache ({cache}), which keeps "
            "what they give, but does not. Begin with monai.transforms.LoadImaged, or set cache to none."
        )
    if cache == "memory":
        kept: MonaiDataset = _in_memory(source, records, fixed, num_workers)
    elif cache == "disk":
        if cache_dir is None:
            raise ValueError("cache_dir should name a folder for a cache on disk, but got none. Use --cache_dir DIR.")
        kept = _DiskCache(source, records, fixed, cache_dir)
    elif cache == "none":
        kept = MonaiDataset(records, fixed)
    else:
        raise ValueError(f"cache should be none, memory or disk, but got {cache!r}.")
    return FileImages(source, kept, rest)


def remove_cached(source: ImageFiles, positions: Iterable[int], cache_dir: str | os.PathLike) -> int:
    """Remove the copies of images from a cache on disk.

    Where the images have patients, all copies of these patients go: of every study and view, also of images that are
    not in ``source``, and with whatever transforms they were made.

    Args:
        source: images that were in the cache.
        positions: which of them, from 0.
        cache_dir: the cache's folder.

    Returns:
        How many copies were removed; 0 too where there is no such folder.
    """
    folder = Path(cache_dir)
    if not folder.is_dir():
        return 0
    owners = {_owner(source, position) for position in positions}
    with os.scandir(folder) as entries:
        gone = [entry.path for entry in entries if entry.name.split("-")[0] in owners]
    for path in gone:
        os.unlink(path)
    return len(gone)


class FileImages(Dataset):
    """Images on disk as MONAI items ``{"image", "label", "index"}``; made by ``file_dataset``.

    An image that can't be read raises a ValueError that tells its position, and never its name.
    """

    def __init__(self, source: ImageFiles, kept: MonaiDataset, rest: _Reading) -> None:
        self._labels = source.labels
        self._kept = kept
        self._rest = rest

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def data(self) -> Sequence[dict[str, Any]]:
        """A record for each image, as in MONAI's data sets: its path and its position."""
        return self._kept.data

    def without_random(self) -> FileImages:
        """The same images, with the same cache, without random transforms.

        Raises:
            ValueError: if a transform is none of MONAI's, so that it can't be told whether it is random.
        """
        for step in self._rest.transforms:
            if not isinstance(step, Transform):
                raise ValueError(
                    f"Whether {getattr(step, '__name__', type(step).__name__)} is random can't be told, since it is no "
                    "MONAI transform. Wrap it in monai.transforms.Lambdad or RandLambdad."
                )
        plain = copy.copy(self)
        plain._rest = self._rest.only([step for step in self._rest.transforms if not _may_be_random(step)])
        return plain

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A position of NumPy's would be stored in the cache on disk, which could not be loaded then.
        index = range(len(self))[operator.index(index)]
        kept = self._kept[index]
        if isinstance(self._kept, CacheDataset) and self._rest.transforms:
            kept = copy.deepcopy(kept)
        return self._rest({**kept, "label": self._labels[index], "index": index})


def _one_by_one(transform: Callable | Sequence[Callable]) -> list[Callable]:
    """The transforms without the Composes that hold them."""
    if isinstance(transform, Sequence):
        return [step for part in transform for step in _one_by_one(part)]
    if type(transform) is not Compose:
        return [transform]
    options = {
        "lazy": transform.lazy is not False,
        "map_items": transform.map_items is not True,
        "unpack_items": transform.unpack_items,
        "log_stats": transform.log_stats,
        "overrides": transform.overrides,
    }
    if any(options.values()):
        raise ValueError(
            "A Compose in transform should have no options, since it is taken apart, but has "
            f"{' and '.join(name for name, given in options.items() if given)}. Give its transforms as a list."
        )
    return _one_by_one(transform.transforms)


def _may_be_random(step: Any) -> bool:
    """Where MONAI's own caches stop."""
    return isinstance(step, RandomizableTrait) or not isinstance(step, Transform)


class _Records(Sequence):
    """The records of images, made when they are asked for: hundreds of thousands would take up memory."""

    __slots__ = ("_source",)  # without a __dict__, MONAI's seeding of random transforms does not look inside

    def __init__(self, source: ImageFiles) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return {"image": os.path.join(self._source.root, self._source.files[index]), "index": index}


class _Reading(Compose):
    """Transforms whose errors tell an image's position instead of its name."""

    def __init__(self, source: ImageFiles, steps: Sequence[Callable]) -> None:
        super().__init__(steps)
        self._source = source

    def only(self, steps: Sequence[Callable]) -> _Reading:
        """The same for some of the transforms."""
        return _Reading(self._source, steps)

    def __call__(self, input_: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        try:
            return super().__call__(input_, *args, **options)
        except Exception as error:
            index = input_["index"]
            reason = self._reason(error, index)
        # Out of the handler, so that the errors that name the file are not this one's context.
        part = self._source.name
        raise ValueError(
            f"Image {index} of the {part and part + ' '}images, counted from 0, could not be read or transformed"
            f"{reason}. Its name is not shown, to keep it out of logs; in Python, "
            f"`data.{part or 'PART'}.files[{index}]` tells it. Restore the file, or leave its row out."
        )

    def _reason(self, error: BaseException, index: int) -> str:
        """What went wrong, where that names neither file nor patient."""
        while error.__cause__ is not None:
            error = error.__cause__
        text = f"{type(error).__name__}: {error}".rstrip(".")
        file, patients = self._source.files[index], self._source.patients
        parts = {file, *file.split("/"), *([] if patients is None else [str(patients[index])])}
        names = parts | {PurePosixPath(part).stem for part in parts}
        names |= {repr(name)[1:-1] for name in names}  # as errors of the operating system show odd characters
        return f" ({type(error).__name__})" if any(name and name in text for name in names) else f" ({text})"


# Images decoded into memory, for as long as a data set of them lives. That holds its source: an id is of no other.
_kept_in_memory: weakref.WeakValueDictionary[tuple[int, str], CacheDataset] = weakref.WeakValueDictionary()


def _in_memory(source: ImageFiles, records: Sequence, transform: Compose, num_workers: int) -> CacheDataset:
    """The images decoded into memory; those that are there already serve every data set of the same transforms."""
    try:
        key = (id(source), _hash_of(transform.transforms))
    except (pickle.PicklingError, AttributeError, TypeError):  # can't be told from others
        key = None
    kept = None if key is None else _kept_in_memory.get(key)
    if kept is None:
        # A bar is for a person who waits.
        kept = CacheDataset(records, transform, num_workers=num_workers or None, progress=sys.stderr.isatty())
        if key is not None:
            _kept_in_memory[key] = kept
    return kept


def _hash_of(*parts: Any) -> str:
    return hashlib.sha256(pickle.dumps(parts, protocol=4)).hexdigest()[:32]


class _DiskCache(PersistentDataset):
    """A ``PersistentDataset`` by image and transforms alone, whose files appear whole or not at all."""

    def __init__(self, source: ImageFiles, records: Sequence, transform: Compose, cache_dir: str | os.PathLike) -> None:
        if not os.path.exists(cache_dir):
            os.makedirs(cache_dir, mode=0o700)  # as private as the images
        super().__init__(records, transform, Path(cache_dir))
        try:
            steps = _hash_of(os.path.abspath(source.root), transform.transforms)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"Transforms of a cache on disk should be such that pickle can store them, but are not ({error}). Use "
                "functions of a module instead of lambdas, or another cache."
            ) from None
        self._source = source
        self.transform_hash = steps

    def _cachecheck(self, item_transformed: dict) -> dict:
        index = item_transformed["index"]
        name = f"{_owner(self._source, index)}-{_hash(self._source.files[index])}-{self.transform_hash}"
        file = Path(str(self.cache_dir), f"{name}.pt")
        try:
            return torch.load(file, weights_only=True)
        except FileNotFoundError:
            pass
        except Exception:  # torch raises whatever a damaged file makes it trip over; it is made anew
            file.unlink(missing_ok=True)
        item = convert_to_tensor(self._pre_transform(dict(item_transformed)), convert_numeric=False, track_meta=False)
        odd = [str(key) for key, value in item.items() if not _holds_numbers_alone(value)]
        if odd:
            raise ValueError(
                "Transforms of a cache on disk should give tensors and Python's numbers alone, since text may name a "
                f"patient, but {', '.join(odd)} is neither. Leave image_only of LoadImaged as it is, or use another "
                "cache."
            )
        save_atomically(item, file)
        return item


def _holds_numbers_alone(value: Any) -> bool:
    """Whether it names nobody, and ``torch.load`` reads it without running code."""
    if isinstance(value, dict):
        return all(map(_holds_numbers_alone, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_holds_numbers_alone, value))
    return value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, complex)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _owner(source: ImageFiles, index: int) -> str:
    """Hash of an image's patient, or of its file where there are no patients: how its copies' names begin."""
    return _hash(str(source.files[index] if source.patients is None else source.attributes["patient"].iat[index]))
