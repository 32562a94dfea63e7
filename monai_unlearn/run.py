"""What every command begins with: data, split, and the networks' outputs on each part."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.utils import set_determinism
from torch.utils.data import DataLoader, Subset

from monai_unlearn.bundle import Bundle, device_of
from monai_unlearn.checkpoint import Checkpoint, load_checkpoint
from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.data import (
    ID_COLUMNS,
    ImageData,
    ImageFiles,
    LabeledImages,
    Split,
    people,
    read_request,
    remove_cached,
)
from monai_unlearn.evaluation import SPLITS, Facts, SplitResult, evaluate
from monai_unlearn.handlers import SCORES, read_history
from monai_unlearn.training import HISTORY, TrainedModel, find_model, train_model

__all__ = ["Run", "near_chance", "refuse_near_chance", "remembered_outputs"]

logger = logging.getLogger("monai_unlearn")

# Balanced accuracy on its own training data, as the share of the way from chance to 1, below which something is
# wrong with the transforms, the labels' order or the checkpoint rather than with the model.
NEAR_CHANCE = 0.1
# How many models' outputs are kept where runs share them: those of an original and some retrained ones.
REMEMBERED = 24
_remembered: dict[str, dict[str, SplitResult]] | None = None


@dataclass(frozen=True)
class Run:
    """A bundle with its data at hand.

    Args:
        bundle: the running bundle.
        settings: its settings.
        data: the data set.
        data_digest: hash of the data set.
        device: where networks run.
        caching: what it cost to bring the images into memory, or into the cache on disk.
        evaluation: what evaluating networks has cost so far.
    """

    bundle: Bundle
    settings: dict[str, Any]
    data: ImageData
    data_digest: str
    device: torch.device
    caching: Cost
    evaluation: Cost = field(default_factory=Cost)

    @classmethod
    def start(cls, bundle: Bundle) -> Run:
        """Read the data, and check that the network fits it."""
        set_determinism(bundle.settings()["seed"])
        data = bundle.build("data")
        bundle.share(data=data)
        device = device_of(bundle.build("device"))
        bundle.share(device=device)
        caching = Cost()
        if not bundle.depends_on("train_dataset", "train_seed"):  # files, perhaps in a cache: made once for all runs
            with seconds_of(caching, "cpu"):
                bundle.share(train_dataset=bundle.build("train_dataset"))
        first = bundle.build("evaluation_dataset", evaluation_part=data.train)[0]["image"][None]
        _check_network(bundle.build("network"), first, data.num_classes)
        patients = data.train.patients
        logger.info(
            "Data: %s, %d %s, %d training images%s",
            data.name,
            data.num_classes,
            ("finding" if data.num_classes == 1 else "findings") if data.multi_label else "classes",
            len(data.train),
            "" if patients is None else f" of {len(np.unique(people(patients)))} patients",
        )
        run = cls(bundle, bundle.settings(), data, data.digest(), device, caching)
        bundle.share(difficulty=_difficulty(run))
        bundle.share(split=bundle.build("split"), current_run=run)
        return run

    @cached_property
    def split(self) -> Split:
        """Who is in which part."""
        return self.bundle.build("split")

    def model_folder(self, seed: int, forget: bool) -> Path:
        """Where a model of the recipe is kept, named by a hash of all that it depends on."""
        parts = [self.data_digest, self.split.digest() if forget else "all", str(seed)]
        return Path(self.settings["models_dir"]) / self.bundle.recipe_hash(*parts)

    def parts(self) -> dict[str, tuple[LabeledImages | ImageFiles, np.ndarray]]:
        """Split → the part of the data that it is of, and its rows there."""
        data, split = self.data, self.split
        return {
            "forget": (data.train, split.forget),
            "retain": (data.train, split.retain),
            "selection": (data.validation, split.selection),
            "validation": (data.validation, split.validation),
            "test": (data.validation if data.test is None else data.test, split.test),
        }

    def loader(self, part: LabeledImages | ImageFiles, rows: np.ndarray | None = None) -> DataLoader:
        """Images for evaluation: as in training, in order and without augmentation."""
        dataset = self.bundle.build("evaluation_dataset", evaluation_part=part)
        return self.bundle.build(
            "evaluation_loader", evaluation_dataset=dataset if rows is None else Subset(dataset, rows.tolist())
        )

    def fill_cache(self) -> None:
        """Decode all images once where there is a cache on disk: else the first network that sees them would pay."""
        if self._caches_on_disk:
            with seconds_of(self.caching, "cpu"):
                for _ in self.loader(self.data.train):
                    pass

    def remove_cached_copies(self) -> list[str]:
        """Remove the forgotten people's decoded images from a cache on disk, and say so for the report."""
        part = self.data.train
        if not self._caches_on_disk or not isinstance(part, ImageFiles):
            return []
        removed = remove_cached(part, self.split.forget, self.settings["cache_dir"])
        note = f"{removed} decoded copies of images of the people forgotten were removed from the cache on disk."
        logger.info("%s", note)
        return [note]

    @property
    def _caches_on_disk(self) -> bool:
        return self.settings.get("cache") == "disk"

    def facts(self) -> dict[str, Facts]:
        """What an audit knows of the images of each split; no ids."""
        found = {}
        for name, (part, rows) in self.parts().items():
            table = part.attributes.iloc[rows].reset_index(drop=True) if len(part.attributes.columns) else None
            columns = pd.DataFrame(index=range(len(rows))) if table is None else table
            found[name] = Facts(
                people=None if part.patients is None else people(part.patients[rows]),
                columns=columns.drop(columns=[c for c in columns if c in ID_COLUMNS]),
            )
        return found

    @cached_property
    def loaders(self) -> dict[str, DataLoader]:
        """Loader of each split that is audited."""
        with seconds_of(self.caching, "cpu"):
            return {name: self.loader(*self.parts()[name]) for name in SPLITS}

    def evaluate(
        self, evaluator: Any, network: torch.nn.Module, loaders: Mapping[str, DataLoader] | None = None
    ) -> dict[str, SplitResult]:
        """Figures of a network on each of the loaders, by default those of the audited splits; on the clock.

        Within ``remembered_outputs``, the same network is evaluated on the same audited splits once.
        """
        if _remembered is not None and loaders is None:
            key = self._evaluation_hash(network)
            if key not in _remembered:
                _remembered[key] = self.evaluate(evaluator, network, self.loaders)
                while len(_remembered) > REMEMBERED:
                    del _remembered[next(iter(_remembered))]
            return _remembered[key]
        names = self.data.class_names if self.data.multi_label else None
        with seconds_of(self.evaluation, self.device):
            results = evaluate(evaluator, network, self.loaders if loaders is None else loaders, names)
        n = sum(result.n for result in results.values())
        self.evaluation.samples += n
        self.evaluation.forward += n
        return results

    def _evaluation_hash(self, network: torch.nn.Module) -> str:
        """Hash of all that a network's outputs on the audited splits depend on."""
        components = ("network", "evaluator", "evaluation_dataset", "evaluation_loader")
        sha = hashlib.sha256(self.bundle.recipe_hash(self.data_digest, str(self.device), of=components).encode())
        for _, rows in self.parts().values():
            sha.update(f"{rows.shape}{rows.dtype.str}".encode() + rows.tobytes())
        for name, value in network.state_dict().items():
            sha.update(f"{name}{value.shape}{value.dtype}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def original(self) -> tuple[Path, Checkpoint]:
        """The original model: the user's, one that an earlier run trained, or for the embedded data a new one."""
        settings = self.settings
        if settings["original_checkpoint"] is not None:
            path = Path(settings["original_checkpoint"])
            return path, load_checkpoint(path, settings["network_key"])
        folder = self.model_folder(settings["seed"], forget=False)
        if find_model(folder) is None:
            if not self.data.embedded:
                raise ValueError(
                    f"There is no original model of {self.data.name} to unlearn from. Name yours with "
                    "--original_checkpoint FILE, or train one with the same data, seed and settings: the same command "
                    "with `run train`, and bundles/train.json in the place of the method's file."
                )
            logger.info("No --original_checkpoint given: training an original model on the embedded data first.")
        path = train_model(self.bundle, folder, settings["seed"], None, "original").path
        return path, load_checkpoint(path)

    def retrained(self) -> list[TrainedModel]:
        """Models trained by the recipe without the forget set, of as many seeds as the settings say; kept or new."""
        settings = self.settings
        if not settings["reference"]:
            return []
        number = settings["reference_models"]
        if number < 1:
            raise ValueError(
                f"reference_models should be at least 1, but got {number}. Use --reference false for no retrained "
                "model."
            )
        first = self.bundle.build("reference_seed")
        models = []
        for seed in range(first, first + number):
            name = "retrained" if number == 1 else f"retrained model {seed - first + 1} of {number}"
            folder = self.model_folder(seed, forget=True)
            models.append(train_model(self.bundle, folder, seed, self.split.forget_set(), "retrained", name))
        return models

    def hidden_names(self) -> set[str]:
        """Patients and file names of the forget set, which nothing that is written may show."""
        names: set[str] = set()
        part, rows = self.parts()["forget"]
        if part.patients is not None:
            names |= {str(patient) for patient in part.patients[rows]}
        if isinstance(part, ImageFiles):
            names |= {Path(file).name.partition(".")[0] for file in part.files[rows]}
        return names - {"", "nan", "None"}


@contextmanager
def remembered_outputs() -> Iterator[None]:
    """Within this block, runs of this process share the outputs of models that they have in common."""
    global _remembered
    before, _remembered = _remembered, {}
    try:
        yield
    finally:
        _remembered = before


def refuse_near_chance(original: Mapping[str, SplitResult], num_classes: int, multi_label: bool, path: Path) -> None:
    """Refuse an original that knows nothing of its own training data: it was loaded or fed wrongly.

    Args:
        original: its figures, ``forget`` and ``retain`` among them.
        num_classes: number of classes, or findings.
        multi_label: whether they are findings.
        path: its file.

    Raises:
        ValueError: if it is near chance.
    """
    near = near_chance(original, num_classes, multi_label)
    if near is not None:
        raise ValueError(
            f"The original model {path.name} has {near}. Check that the images are scaled as in its training, that the "
            "labels have the same order, and that the checkpoint is the trained one."
        )


def near_chance(results: Mapping[str, SplitResult], num_classes: int, multi_label: bool) -> str | None:
    """A model's figure in words, if it is near chance or below on the forget and the retain set; otherwise None."""
    figure, chance = ("auroc", 0.5) if multi_label else ("balanced_accuracy", 1 / num_classes)
    values = [getattr(results[name], figure) for name in ("forget", "retain")]
    best = max((value for value in values if value is not None), default=1.0)
    if best >= chance + NEAR_CHANCE * (1 - chance):
        return None
    name = figure.replace("_", " ").replace("auroc", "mean AUROC")
    where = "near" if best >= chance * (1 - NEAR_CHANCE) else "below"
    return f"a {name} of {best:.3f} on its own training data, {where} the chance of {chance:.3f}"


def _difficulty(run: Run) -> pd.DataFrame | None:
    """Scores that the request asks for and the data does not have, or the method: recorded in training, or computed."""
    file = run.settings.get("forget_request")
    wanted = set() if file is None else read_request(file).score_columns - set(run.data.train.index())
    unknown = sorted(wanted - {"difficulty", *SCORES})
    if unknown:
        raise ValueError(
            f"The request should go by a score that there is, but goes by {', '.join(unknown)}. The data has no such "
            f"column; without one there are difficulty, {', '.join(SCORES)} (see docs/difficulty.md)."
        )
    score = run.settings.get("score", "difficulty")  # the method's; difficulty it computes by itself
    if score not in ("difficulty", *SCORES):
        raise ValueError(f"score should be one of difficulty, {', '.join(SCORES)}, but got {score!r}.")
    wanted |= {score} - {"difficulty"}
    if not wanted:
        return None
    path, checkpoint = run.original()
    n = len(run.data.train)
    scores = pd.DataFrame(index=range(n))
    recorded = sorted(wanted - {"difficulty"})
    if recorded:
        history = path.parent / HISTORY
        if not history.is_file():
            raise ValueError(
                f"The run goes by {', '.join(recorded)}, which the training of the original model records, but no "
                f"{HISTORY} lies beside {path.name}. Train the original with bundles/train.json, or take the score "
                "difficulty."
            )
        scores[recorded] = read_history(history, n)[recorded]
    if "difficulty" in wanted:
        evaluator, network = run.bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        result = run.evaluate(evaluator, network, {"training": run.loader(run.data.train)})
        scores["difficulty"] = result["training"].difficulty
        logger.info("Difficulty of the training images: as the original model sees them (see docs/difficulty.md)")
    return scores


def _check_network(network: torch.nn.Module, image: torch.Tensor, num_classes: int) -> None:
    """A network that does not fit the data should be refused in one sentence."""
    network.eval()
    try:
        with torch.no_grad():
            outputs = network(image)
    except RuntimeError as error:
        raise ValueError(
            f"network_def does not take images of shape {tuple(image.shape[1:])} (channels first): {error}"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, num_classes):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(
            f"network_def should give one logit for each of the data's {num_classes} classes, shape "
            f"(1, {num_classes}) for one image, but gives {shape}. Set its number of classes to that of the data."
        )
