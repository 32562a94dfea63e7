"""Somebody else's training bundle: its trainer, evaluator, original model and records, with nothing of it changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ignite.handlers
import monai.handlers
import pandas as pd
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import Dataset as RecordDataset
from monai.data import ThreadDataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from monai_unlearn.bundle import components, hint, unwrapped
from monai_unlearn.forget_set import records_of, without_random
from monai_unlearn.methods import require_supervised_trainer, unwrapped_handlers

__all__ = [
    "FLAG",
    "ForeignBundle",
    "TaggedDataset",
    "index_of",
    "loader_of",
    "repeats_of",
    "with_dataset",
    "with_repeats",
]

FLAG = "is_forget"
TRAINERS = ("train::trainer", "trainer")
SCHEDULES = ("LrScheduleHandler", "ParamSchedulerHandler")
# What writes files, loads other weights, ends the run early or follows the recipe's schedule.
SET_ASIDE = (
    *("CheckpointLoader", "CheckpointSaver", "ClassificationSaver", "ClearMLHandler", "ClearMLImageHandler"),
    *("ClearMLStatsHandler", "EarlyStopHandler", "LogfileHandler", "MLFlowHandler", "MetricLogger", "MetricsSaver"),
    *("ProbMapProducer", "StatsHandler", "TensorBoardHandler", "TensorBoardImageHandler", "TensorBoardStatsHandler"),
    *("Checkpoint", "DiskSaver", "EarlyStopping", "ModelCheckpoint", "ProgressBar", "TimeLimit"),
    *("SaveImage", "SaveImaged", "SaveClassificationd", "SummaryWriter"),
    *SCHEDULES,
)
# Spellings of what a record may say of whose image it is, without case, "_" and "-".
NAMES = {
    "patient": ("patient", "patientid", "subject", "subjectid", "participant", "participantid"),
    "study": ("study", "studyid", "studyuid", "studyinstanceuid"),
    "series": ("series", "seriesid", "seriesuid", "seriesinstanceuid"),
}


class ForeignBundle:
    """A training bundle whose parts are built with everything set aside that would write, load or stop.

    Args:
        config: its config, command-line overrides included.
        trainer: id of the trainer; by default ``train::trainer`` or ``trainer``.
        evaluator: id of the evaluator; by default that of the trainer's ``ValidationHandler``.

    Raises:
        ValueError: if there is no trainer of that id, with what is there.
    """

    def __init__(self, config: Mapping[str, Any], trainer: str | None = None, evaluator: str | None = None) -> None:
        self._config = dict(config)
        self._parser = ConfigParser(copy.deepcopy(self._config))
        self.trainer_id = self._id("trainer", trainer, TRAINERS, "Trainer")
        self._evaluator_id = None if evaluator is None else self._id("evaluator", evaluator, (), "Evaluator")

    def _id(self, what: str, given: str | None, usual: Sequence[str], ending: str) -> str:
        found = {path: str(part["_target_"]) for path, part in components(self._config)}
        names = usual if given is None else [given.removeprefix("@").replace("#", "::")]
        for name in names:
            if name in found or name in self._parser:
                return name
        there = [path for path, target in found.items() if target.endswith(ending)] or sorted(map(str, self._config))
        wrong = f"The bundle has no {' or '.join(names)}" + ("" if given is None else hint(names[0], found))
        raise ValueError(f"{wrong}. Name the {what} with --unlearning::{what} KEY; there are: {', '.join(there)}.")

    def engines(self, keep_schedules: bool = False) -> tuple[SupervisedTrainer, SupervisedEvaluator]:
        """The trainer and its evaluator, built anew and without what is set aside.

        Args:
            keep_schedules: keep the learning rate's schedules, for a training by the bundle's own recipe.

        Raises:
            ValueError: if the trainer's loop is none that the methods work in, or there is no evaluator.
        """
        aside = tuple(name for name in SET_ASIDE if not (keep_schedules and name in SCHEDULES))
        parser = ConfigParser(_without(copy.deepcopy(self._config), aside))
        try:
            trainer = parser.get_parsed_content(self.trainer_id)
            named = self._evaluator_id
            evaluator = _validator(trainer) if named is None else parser.get_parsed_content(named)
        except Exception as error:
            raised = unwrapped(error)
            if str(raised).startswith("applying transform"):  # its cause names the file, and so perhaps the patient
                raise ValueError(
                    "An image can't be read or prepared while the bundle's data sets are made "
                    f"({type(raised.__cause__ or raised).__name__}). Repair it, or take it off the bundle's lists. Are "
                    "images of people to be forgotten deleted already? Unlearning needs them: delete them afterwards."
                ) from None
            raise raised from raised.__cause__
        try:
            require_supervised_trainer(trainer, self)
        except TypeError:
            own = " with an iteration_update of its own" if isinstance(trainer, SupervisedTrainer) else ""
            raise ValueError(
                f"{self.trainer_id} should be a monai.engines.SupervisedTrainer that makes its own steps, but is a "
                f"{type(trainer).__name__}{own}: it does not fire the events that the methods live on."
            ) from None
        if not isinstance(evaluator, SupervisedEvaluator):
            there = [path for path, part in components(self._config) if str(part["_target_"]).endswith("Evaluator")]
            raise ValueError(
                "The trainer has no ValidationHandler with a SupervisedEvaluator. Name the evaluator with "
                f"--unlearning::evaluator KEY; there are: {', '.join(there) or 'none'}."
            )
        for engine in (trainer, evaluator):
            _strip(engine, (*aside, "ValidationHandler"))
        return trainer, evaluator

    def original(self, bundle_root: Path) -> Path:
        """The model that the bundle's training wrote: the best or ``models/model.pt``; failing that, the last.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if there are several.
        """
        best = [bundle_root / "models" / "model.pt"]
        last: list[Path] = []
        for path, part in components(self._config):
            folder = str(part["_target_"]).endswith("CheckpointSaver") and self._argument(path, "save_dir")
            for name, places in (("key_metric_filename", best), ("final_filename", last)):
                if folder and (file := self._argument(path, name)):
                    places.append(Path(folder) / file)
        for places in (best, last):
            found = {os.path.realpath(place): place for place in places if place.is_file()}
            if len(found) == 1:
                return next(iter(found.values()))
            if found:
                raise ValueError(
                    f"The original may be any of {', '.join(map(str, found.values()))}. Say which: "
                    "--unlearning::original_checkpoint FILE."
                )
        folders = dict.fromkeys(place.parent for place in best + last)
        there = [str(file) for folder in folders for file in sorted(folder.glob("*.pt*"))]
        raise FileNotFoundError(
            f"No original model is at {', '.join(dict.fromkeys(map(str, best + last)))}. Name it with "
            "--unlearning::original_checkpoint FILE, and the bundle's folder with --bundle_root; there are: "
            f"{', '.join(there) or 'none'}."
        )

    def initial_checkpoint(self, original: Path) -> str | None:
        """The file from which the bundle's own training starts (fine-tuning), or None.

        Raises:
            ValueError: if that is the original itself: a reference that starts from it has seen the forget set.
        """
        for path, part in components(self._config):
            if not str(part["_target_"]).endswith("CheckpointLoader") or not path.startswith(_top(self.trainer_id)):
                continue
            if str(self._argument(path, "_disabled_")).lower() == "true":
                continue
            start = self._argument(path, "load_path")
            if start is not None and os.path.realpath(start) == os.path.realpath(original):
                raise ValueError(
                    f"{path} starts the bundle's training from {start}, the original itself, which has seen the forget "
                    f"set. Give it the weights with which that training once began (--{path}::load_path FILE), or "
                    f"none (--{path}::_disabled_ True)."
                )
            return start
        return None

    def _argument(self, path: str, name: str) -> Any:
        id = f"{path}::{name}"
        return self._parser.get_parsed_content(id) if id in self._parser else None


class TaggedDataset(Dataset):
    """A data set whose samples say whether they are to be forgotten; the data set itself is not touched.

    Args:
        dataset: gives dicts, or lists of dicts (several crops of an image).
        flags: whether each of its samples is to be forgotten.
    """

    def __init__(self, dataset: Any, flags: Sequence[bool]) -> None:
        self.dataset = dataset
        self.flags = list(flags)

    @property
    def data(self) -> list[dict]:
        """The records, by which a forget set finds its samples."""
        return [{FLAG: flag} for flag in self.flags]

    def without_random(self) -> TaggedDataset:
        """The same samples without random transforms."""
        return TaggedDataset(without_random(self.dataset), self.flags)

    def __len__(self) -> int:
        return len(self.flags)

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.dataset[index]
        except Exception as error:  # a reader's message names the file, and so perhaps the patient
            raise ValueError(
                f"Image {index} of the training data can't be read ({type(error).__name__}). Repair or remove it."
            ) from None
        flag = self.flags[index]
        # Copied before they are tagged: the item may be the very one that a cache holds.
        if isinstance(item, Mapping):
            return {**item, FLAG: flag}
        if isinstance(item, list) and all(isinstance(part, Mapping) for part in item):
            return [{**part, FLAG: flag} for part in item]
        raise ValueError(
            f"The training data should give dicts, as MONAI's do, but gives {type(item).__name__}. "
            "Have the data set return dicts with the image and the label."
        )


def loader_of(engine: SupervisedTrainer | SupervisedEvaluator) -> DataLoader:
    """The loader of an engine; a list of dicts in it as a data set of MONAI's.

    Raises:
        ValueError: if it is no loader of a data set with a length.
    """
    loader = engine.data_loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"The data of a {type(engine).__name__} should come from a DataLoader over a data set with a length, but "
            f"comes from a {type(getattr(loader, 'dataset', loader)).__name__}."
        )
    dataset = _as_dataset(loader.dataset)
    return loader if dataset is loader.dataset else with_dataset(loader, dataset)


def _as_dataset(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        inner = _as_dataset(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    return RecordDataset(dataset) if isinstance(dataset, (list, tuple)) else dataset


def with_dataset(loader: DataLoader, dataset: Dataset) -> DataLoader:
    """The same loader, workers, sampler and all, over another data set of the same length."""
    other = copy.copy(loader)
    other.__dict__["dataset"] = dataset  # torch refuses the plain assignment
    other.__dict__["_iterator"] = None
    return other


def repeats_of(loader: DataLoader) -> int:
    """How many times a loader gives each batch; its length does not count that."""
    return loader.repeats if isinstance(loader, ThreadDataLoader) else 1


def with_repeats(loader: DataLoader, like: DataLoader) -> DataLoader:
    """A loader that gives each batch as often as another does."""
    if not isinstance(like, ThreadDataLoader):
        return loader
    return ThreadDataLoader(
        cast(Any, loader.dataset),
        buffer_size=like.buffer_size,
        buffer_timeout=like.buffer_timeout,
        repeats=like.repeats,
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def index_of(loader: DataLoader, image_key: str, patient_key: str | None = None) -> pd.DataFrame:
    """The table by which a request finds images: one row a record, no image is opened.

    Args:
        loader: a loader of a data set with records.
        image_key: key of the image's path, or list of paths, in a record.
        patient_key: key of the patient's id; by default one that is spelt like ``patient_id`` or ``subject``.

    Returns:
        Columns ``file``, ``patient``, ``study``, ``series`` as far as the records have them, and all their other
        numbers and texts under their own names.

    Raises:
        ValueError: if there are no records, or none has ``image_key`` or ``patient_key``.
    """
    dataset: Any = loader.dataset
    records = records_of(dataset)
    if records is None or len(records) != len(dataset):
        raise ValueError(
            f"Whose images are in a {type(dataset).__name__} can't be told: it has no list of records, one a sample, "
            "in `.data`. Use one of MONAI's data sets over a list of dicts."
        )
    rows = [record if isinstance(record, Mapping) else {image_key: record} for record in records]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for name, key in (("image", image_key), ("patient", patient_key)):
        if key is not None and key not in keys:
            raise ValueError(
                f"The records have no {key!r}; they have {', '.join(map(str, keys))}. "
                f"Name the {name}'s key with --unlearning::{name}_key."
            )
    table = pd.DataFrame(index=range(len(rows)))
    files = [_path(row.get(image_key)) for row in rows]
    if any(files):
        table["file"] = files
    for key in keys:
        values = [_plain(row.get(key)) for row in rows]
        if key != image_key and any(value is not None for value in values):
            table[str(key)] = values
    if patient_key is not None and patient_key not in table:
        raise ValueError(f"{patient_key!r} of the records holds no texts or numbers, by which patients are known.")
    for name, spellings in NAMES.items():
        own = [key for key in table if key.lower().replace("_", "").replace("-", "") in spellings]
        key = patient_key if name == "patient" and patient_key else next(iter(own), None)
        if key is not None:
            table[name] = table[key]
    return table


def _path(value: Any) -> str | None:
    value = getattr(value, "meta", {}).get("filename_or_obj", value)  # an image that is loaded already
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return Path(value).as_posix() if isinstance(value, (str, os.PathLike)) else None


def _plain(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (str, int, float, bool)) else None


def _top(id: str) -> str:
    """The part of the config in which a trainer's handlers stand: all of it where the trainer is at the top."""
    return id.rpartition("::")[0]


class _SetAside(Transform):
    """Stands for what is set aside, also where other parts refer to it: as a handler or transform it does nothing."""

    def attach(self, *_: Any, **__: Any) -> None:
        """Leave the engine as it is."""

    def __call__(self, data: Any) -> Any:
        return data


def _without(config: Any, names: Sequence[str]) -> Any:
    """A config without components of these classes and without their arguments, which would be evaluated."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if isinstance(target, str) and target.rpartition(".")[2] in names:
            return {"_target_": f"{__name__}.{_SetAside.__name__}"}
        return {key: _without(value, names) for key, value in config.items()}
    if isinstance(config, list):
        return [_without(value, names) for value in config]
    return config


def _all_handlers(engine: Engine) -> Iterator[object]:
    for event in list(engine._event_handlers):
        yield from unwrapped_handlers(engine, event)


def _validator(trainer: Engine) -> Any:
    for handler in _all_handlers(trainer):
        if isinstance(handler, monai.handlers.ValidationHandler):
            return handler.validator
    return None


def _strip(engine: Engine, names: Sequence[str]) -> None:
    """Take handlers of these classes off an engine, also those that an expression has made.

    Those of an exception go whatever they are: as long as there is such an event, Ignite does not raise what fails.
    """
    named = (getattr(module, name, None) for module in (monai.handlers, ignite.handlers) for name in names)
    classes = tuple(kind for kind in named if isinstance(kind, type))
    for event in list(engine._event_handlers):
        pairs = zip(unwrapped_handlers(engine, event), engine._event_handlers[event])
        engine._event_handlers[event] = [kept for handler, kept in pairs if not isinstance(handler, classes)]
    engine._event_handlers.pop(Events.EXCEPTION_RAISED, None)
