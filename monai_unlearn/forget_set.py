"""The forget set: which samples are to be forgotten, and how to recognise and load them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from monai.transforms import Compose, RandomizableTrait, Transform
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

__all__ = ["ForgetSet", "records_of", "without_random"]


class ForgetSet:
    """Samples to be forgotten, known by an id in the batch, by file name, or by a flag.

    A method asks it which rows of a batch are forget samples and how to load the forget or the retain samples of
    a data set that is already there; it never needs to be told where they lie. It shows only how many it holds:
    no id reaches a log.

    Example::

        forget = ForgetSet(["patient 7", "patient 12"], key="patient_id")  # batch["patient_id"] or a data record's
        forget = ForgetSet.files(["patient7/scan1.nii.gz"])                # file name in the image's metadata
        forget = ForgetSet.flagged("is_forget")                            # a boolean in the batch

    Args:
        ids: the ids of the samples to be forgotten, each hashable; at least one.
        key: key of the id in a batch, and in the records (``dataset.data``) of the training data.

    Raises:
        ValueError: if ``ids`` is empty.
    """

    def __init__(self, ids: Iterable[Hashable], key: str = "index") -> None:
        if isinstance(ids, (str, bytes)):
            raise TypeError(f"ids should be a collection of ids, but got one {type(ids).__name__}. Put it in a list.")
        self._ids: Collection[Hashable] | None = frozenset(_plain(value) for value in ids)
        if not self._ids:
            raise ValueError("ids should name at least one sample to forget, but got none.")
        self.key = key
        self._numbers = (
            torch.tensor(sorted(self._ids)) if all(type(value) is int for value in self._ids) else None  # type: ignore[type-var]
        )
        self._paths: dict[str, list[tuple[str, ...]]] | None = None

    @classmethod
    def flagged(cls, key: str = "is_forget") -> ForgetSet:
        """Samples whose flag under ``key``, in the batch and in the data's records, is true."""
        forget = cls([True], key=key)
        forget._ids = None
        return forget

    @classmethod
    def files(cls, paths: Iterable[str], image_key: str = "image") -> ForgetSet:
        """Samples by file name, as MONAI's readers keep it in the image's metadata.

        A path matches every file that ends in it, folder by folder: ``patient7/scan1.nii`` matches
        ``/data/patient7/scan1.nii`` but not ``/data/xpatient7/scan1.nii``.
        """
        forget = cls(paths, key=image_key)
        forget._paths = {}
        for path in forget._ids or ():
            parts = _parts(str(path))
            forget._paths.setdefault(parts[-1], []).append(parts)
        return forget

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'flagged' if self._ids is None else len(self._ids)}, key={self.key!r})"

    def mask(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Which rows of a batch are forget samples.

        Args:
            batch: a collated batch, as in ``engine.state.batch``.

        Returns:
            Boolean tensor of shape B, on the CPU.

        Raises:
            TypeError: if the batch is no mapping.
            KeyError: if the batch has no ``key``.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"A batch should be a dict, but got {type(batch).__name__}. "
                "Have the data set return dicts, as MONAI's do, with the sample's id in them."
            )
        if self.key not in batch:
            raise KeyError(
                f"The batch has no {self.key!r}, by which forget samples are known. It has {sorted(map(str, batch))}. "
                "Give ForgetSet the right key, or put the sample's id into the data's records."
            )
        values = batch[self.key]
        if self._paths is not None:
            names = getattr(values, "meta", {}).get("filename_or_obj")
            if names is None:
                raise KeyError(
                    f"The metadata of {self.key!r} has no file name. Load the images with LoadImaged and keep "
                    "metadata tracking on, or know forget samples by an id."
                )
            return torch.tensor([self._matches(name) for name in ([names] if isinstance(names, str) else names)])
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().reshape(len(values))
            if self._ids is None:
                return values.bool()
            if self._numbers is not None:
                return torch.isin(values, self._numbers)
            values = values.tolist()
        return torch.tensor([self._matches(value) for value in values], dtype=torch.bool)

    def positions(self, dataset: Dataset) -> list[int]:
        """Positions of the forget samples in a data set, from its records alone: no image is decoded.

        Args:
            dataset: a data set with records in ``.data`` (MONAI's ``Dataset``, ``CacheDataset``,
                ``PersistentDataset`` and so on), or a ``Subset`` of one.

        Raises:
            ValueError: if there are no records, none or only some of the ids are among them, all of them are to be
                forgotten, or a file name is ambiguous.
        """
        records = records_of(dataset)
        if records is None:
            raise ValueError(
                f"The forget samples can't be found in a {type(dataset).__name__}, which has no records in `.data`. "
                "Give the method a loader of its own."
            )
        size = len(dataset)  # type: ignore[arg-type]
        if len(records) != size:  # patches, say
            raise ValueError(
                f"Which of its {len(records)} records each of the {size} samples of a {type(dataset).__name__} comes "
                "from can't be told. Give the method a loader of its own."
            )
        values = [self._value(record) for record in records]
        found = [i for i, value in enumerate(values) if self._matches(value)]
        if not found:
            raise ValueError("No sample of the training data is in the forget set. Check the ids and their key.")
        if len(found) == len(values):
            raise ValueError(
                f"The retain set should hold at least one sample, but all {len(values)} are to be forgotten."
            )
        if self._paths is not None:
            self._check_paths([_parts(str(values[i])) for i in found])
        elif self._ids is not None:
            missing = len(self._ids) - len({_plain(values[i]) for i in found})
            if missing:
                raise ValueError(
                    f"{missing} of the {len(self._ids)} ids to forget are not in the training data. Check them: "
                    "a part of a request must not be lost unnoticed."
                )
        return found

    def ids(self, dataset: Dataset) -> list[Hashable]:
        """The id of each sample of a data set as its record has it, forget sample or not.

        Raises:
            ValueError: if samples are known by a flag, which tells none from another, or the records have no ids.
        """
        if self._ids is None:
            raise ValueError(
                f"The forget samples are known by a flag, {self.key!r}, which does not tell one from another. Know "
                "them by an id."
            )
        return [_plain(self._value(record)) for record in records_of(dataset) or ()]

    def check(self, loader: Iterable) -> None:
        """Hold a request against the training data, for a method that otherwise meets its samples batch by batch.

        Does nothing where the data has no records with the key: an id may be put into the batch by a transform.

        Raises:
            ValueError: as ``positions``.
        """
        dataset = getattr(loader, "dataset", None)
        records = None if dataset is None or self._ids is None else records_of(dataset)
        if (
            dataset is not None
            and records is not None
            and len(records) == len(dataset)
            and all(isinstance(record, Mapping) and self.key in record for record in records)
        ):
            self.positions(dataset)

    def forget_loader(self, loader: Iterable, training: bool = False) -> DataLoader:
        """The forget samples of a loader's data.

        Args:
            loader: the training loader.
            training: False gives them in order and without random transforms. True keeps both the random transforms
                and the shuffling, in an order of its own: that of the training loader stays as it is, also where a
                method takes batches of both in turn.

        Raises:
            ValueError: if they can't be found, the random transforms can't be told from the others, or the loader
                samples in another way than shuffled or in order.
        """
        loader = _rebuildable(loader)
        dataset = _whole(loader.dataset)
        if not training:
            plain = Subset(without_random(dataset), self.positions(dataset))
            return _rebuilt(loader, plain, shuffle=False, generator=torch.Generator())
        part = _TrainingSubset(dataset, self.positions(dataset))
        generator = torch.Generator().manual_seed((loader.generator or torch.default_generator).initial_seed())
        # It may be gone through many times in a run: processes that load images should not start anew each time.
        return _rebuilt(loader, part, _shuffles(loader, "forget"), generator, persistent=loader.num_workers > 0)

    def retain_loader(
        self,
        loader: Iterable,
        training: bool,
        max_batches: int | None = None,
        seed: int = 0,
        *,
        augmentation: bool = True,
        also: Collection[int] = (),
    ) -> DataLoader:
        """The retain samples of a loader's data; of a loader that this has made, the same ones.

        Args:
            loader: the training loader.
            training: True keeps random transforms and shuffling; False drops both.
            max_batches: take at most the samples of so many batches, drawn with ``seed``.
            seed: seed of that draw.
            augmentation: False drops random transforms in training too.
            also: positions of samples that go with them, some forget samples say.

        Raises:
            ValueError: as ``forget_loader``, or if the loader samples in another way than shuffled or in order.
        """
        loader = _rebuildable(loader)
        dataset = _whole(loader.dataset)
        retain = self._retain_positions(dataset)
        if max_batches is not None:
            retain = _drawn(retain, max_batches * (loader.batch_size or 1), seed)
        retain = sorted({*retain, *also})
        if not training:
            part = Subset(without_random(dataset), retain)
            return _rebuilt(loader, part, shuffle=False, generator=torch.Generator())
        part = _TrainingSubset(dataset if augmentation else without_random(dataset), retain)
        return _rebuilt(loader, part, _shuffles(loader, "retain"), loader.generator)

    def with_part_of_retain(self, loader: DataLoader, fraction: float, seed: int = 0) -> DataLoader:
        """A training loader of the forget samples and a random share of the retain samples: no more are at hand, say.

        Args:
            loader: the training loader.
            fraction: share of the retain samples, in (0, 1]; with 1 the loader is returned as it is.
            seed: seed of the draw.

        Raises:
            ValueError: if ``fraction`` is none, or as ``retain_loader``.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(
                f"retain_fraction should lie in (0, 1], but got {fraction!r}. It is the share of the retain samples "
                "that unlearning may use."
            )
        if fraction == 1:
            return loader
        loader = _rebuildable(loader)
        dataset: Any = loader.dataset
        retain = self._retain_positions(dataset)
        left_out = set(retain).difference(_drawn(retain, max(1, round(fraction * len(retain))), seed))
        part = Subset(dataset, [i for i in range(len(dataset)) if i not in left_out])
        return _rebuilt(loader, part, _shuffles(loader, "retain"), loader.generator)

    def _retain_positions(self, dataset: Dataset) -> list[int]:
        forget = set(self.positions(dataset))
        return [i for i in range(len(dataset)) if i not in forget]  # type: ignore[arg-type]

    def _value(self, record: Any) -> Any:
        """What identifies a record: its id, its flag or its image's path."""
        if isinstance(record, Mapping):
            if self.key not in record:
                raise ValueError(
                    f"The records of the training data have no {self.key!r}, by which forget samples are known; "
                    f"they have {sorted(map(str, record))}."
                )
            record = record[self.key]
        elif self._paths is None:
            raise ValueError(
                f"The records of the training data should be dicts with {self.key!r}, but are "
                f"{type(record).__name__}. Give the method a loader of its own."
            )
        return record

    def _matches(self, value: Any) -> bool:
        if self._ids is None:
            return bool(value)
        if self._paths is None:
            return _plain(value) in self._ids
        parts = _parts(str(value))
        return any(parts[-len(wanted) :] == wanted for wanted in self._paths.get(parts[-1], ()))

    def _check_paths(self, found: Sequence[tuple[str, ...]]) -> None:
        wanted = [path for paths in (self._paths or {}).values() for path in paths]
        hits = {path: 0 for path in wanted}
        for parts in found:
            for path in (self._paths or {}).get(parts[-1], ()):
                hits[path] += parts[-len(path) :] == path
        missing, ambiguous = sum(n == 0 for n in hits.values()), sum(n > 1 for n in hits.values())
        if missing or ambiguous:
            raise ValueError(
                f"Of {len(wanted)} files to forget, {missing} are not in the training data and {ambiguous} match "
                "more than one file. Give enough of each path to make it unique."
            )


def _drawn(positions: list[int], number: int, seed: int) -> list[int]:
    """So many of the positions at the most, drawn with a seed, in order."""
    if number >= len(positions):
        return positions
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    return [positions[i] for i in sorted(order[:number].tolist())]


class _TrainingSubset(Subset):
    """Retain or forget samples alone. A handler that comes later still finds the others in the data behind them."""


def _whole(dataset: Any) -> Dataset:
    return dataset.dataset if isinstance(dataset, _TrainingSubset) else dataset


def _shuffles(loader: DataLoader, part: str) -> bool:
    """Whether a loader draws a new order each epoch.

    Raises:
        ValueError: if it does not give each sample once.
    """
    sampler: Any = loader.sampler
    shuffle = isinstance(sampler, RandomSampler)
    once = isinstance(sampler, SequentialSampler) or (shuffle and not sampler.replacement)
    if not once or len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        raise ValueError(
            f"A {part} loader can't be made from a {type(sampler).__name__} other than of each sample once, "
            "in order or shuffled. Give the method a loader."
        )
    return shuffle


def _plain(value: Any) -> Any:
    """A number as Python's own, so that a NumPy or tensor id equals the id in the request."""
    return value.item() if hasattr(value, "item") else value


def _parts(path: str) -> tuple[str, ...]:
    return PurePath(path).parts or (path,)


def records_of(dataset: Dataset) -> Sequence | None:
    """The records of one of MONAI's data sets, or of a ``Subset`` of one; None where there are none."""
    if isinstance(dataset, Subset):
        inner = records_of(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    records = getattr(dataset, "data", None)
    return records if isinstance(records, Sequence) and not isinstance(records, (str, bytes)) else None


def without_random(dataset: Any) -> Dataset:
    """The same samples without random transforms and without touching the data set's caches.

    Raises:
        ValueError: if random transforms can't be told from the others.
    """
    if isinstance(dataset, Subset):
        return Subset(without_random(dataset.dataset), dataset.indices)
    if hasattr(dataset, "without_random"):
        return dataset.without_random()
    from monai.data import Dataset as MonaiDataset

    if not isinstance(dataset, MonaiDataset):
        raise ValueError(
            f"Random transforms can't be told from the others in a {type(dataset).__name__}. "
            "Give the method a loader of its own, without augmentation."
        )
    for method in ("__getitem__", "_transform"):
        owner = next(kind for kind in type(dataset).__mro__ if method in vars(kind))
        if not owner.__module__.startswith(("monai.", "torch.")):
            raise ValueError(
                f"A {type(dataset).__name__} makes its samples in a way of its own, which can't be told from its "
                "transforms. Give the method a loader of its own, without augmentation."
            )
    return MonaiDataset(dataset.data, transform=Compose(_deterministic(dataset.transform)))


def _deterministic(transform: Any) -> list[Transform]:
    """The transforms that are not random, in order."""
    if transform is None:
        return []
    if type(transform) is Compose or isinstance(transform, (list, tuple)):
        steps = transform.transforms if isinstance(transform, Compose) else transform
        return [kept for step in steps for kept in _deterministic(step)]
    if isinstance(transform, (RandomizableTrait, Compose)):  # OneOf, SomeOf and RandomOrder are random Composes
        return []
    if not isinstance(transform, Transform):
        raise ValueError(
            f"Whether {getattr(transform, '__name__', type(transform).__name__)} is random can't be told, since it is "
            "no MONAI transform. Wrap it in monai.transforms.Lambda, or give the method a loader of its own."
        )
    return [transform]


def _rebuildable(loader: Iterable) -> DataLoader:
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise ValueError(
            f"The samples of a {type(loader).__name__} can't be loaded one part apart from the other: it is no "
            "torch DataLoader, or one with a batch sampler of its own. Give the method a loader of its own."
        )
    return loader


def _rebuilt(
    loader: DataLoader, dataset: Dataset, shuffle: bool, generator: torch.Generator | None, persistent: bool = False
) -> DataLoader:
    size = len(dataset)  # type: ignore[arg-type]
    # BatchNorm is undefined on a batch of one image; when shuffling, another one is left out each epoch.
    leaves_one = shuffle and size > 1 and size % (loader.batch_size or 1) == 1
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=(loader.drop_last and shuffle and size >= (loader.batch_size or 1)) or leaves_one,
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
        persistent_workers=persistent,
    )
