"""Shadow models for U-LiRA: those that trained on an image and unlearned it, and those that never saw it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.utils import set_determinism
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from monai_unlearn.bundle import Bundle
from monai_unlearn.checkpoint import Checkpoint, file_hash
from monai_unlearn.cost import Cost
from monai_unlearn.data import ImageData, ImageFiles, LabeledImages, Split, people
from monai_unlearn.evaluation import evaluate
from monai_unlearn.output import new_folder, write_json
from monai_unlearn.provenance import machine
from monai_unlearn.training import costs_of, run_trainer

__all__ = ["ShadowScores", "shadow_hash", "shadow_scores"]

logger = logging.getLogger("monai_unlearn")

FEWEST = 4
# The components that make a shadow's scores.
COMPONENTS = ("recipe", "trainer", "methods", "evaluation_dataset")
# An evaluator's figures, on which no score depends.
FIGURES = ("key_val_metric", "additional_metrics")


@dataclass(frozen=True)
class ShadowScores:
    """What S shadow models say of N targets: the forget images, then the unseen ones.

    Args:
        in_scores: S × N log-odds by models that trained on the target and unlearned it; NaN elsewhere.
        out_scores: S × N log-odds by models that never saw the target; NaN elsewhere. A target without a known
            finding is NaN in both.
        folder: where they are kept.
        cost: what training and unlearning of all S models cost, as measured then.
    """

    in_scores: np.ndarray
    out_scores: np.ndarray
    folder: Path
    cost: Cost


def shadow_hash(
    bundle: Bundle, data_digest: str, split: Split, forget_rows: np.ndarray, unseen_rows: np.ndarray, seed: int
) -> str:
    """Hash of everything that shadow models' scores depend on, but for the number of models: a name for their folder.

    Args:
        bundle: the running bundle: its recipe, its method with all settings, and how images are prepared.
        data_digest: the data's ``digest()``.
        split: who is forgotten.
        forget_rows: the forget images that are targets, positions in the training images.
        unseen_rows: the unseen images that are targets, positions in the validation images.
        seed: seed of halves and trainings.
    """
    evaluator = {key: value for key, value in bundle.config["evaluator"].items() if key not in FIGURES}
    rows = [",".join(map(str, np.asarray(part).tolist())) for part in (forget_rows, unseen_rows)]
    parts = [data_digest, split.digest(), *rows, str(seed), json.dumps(evaluator, sort_keys=True, default=str)]
    return bundle.recipe_hash("shadow", *parts, of=COMPONENTS)


def shadow_scores(
    bundle: Bundle,
    data: ImageData,
    split: Split,
    forget_rows: np.ndarray,
    unseen_rows: np.ndarray,
    folder: Path,
    models: int,
    seed: int = 0,
    seconds_per_model: float | None = None,
) -> ShadowScores:
    """Train shadow models on the retain set and half of the targets, have them unlearn that half, and score all.

    Shadow k trains by the bundle's recipe, from a seed of its own, on the retain set and S_k, a half of the targets
    (of the forget images and of the unseen ones alike), and unlearns S_k by the bundle's own method: both as the run
    under audit does it. Whole patients are in one half, and equal images too. Shadow 2j + 1 takes the half that shadow
    2j leaves, so that each target is in exactly half of the sets. The halves do not depend on the number of models.

    Each shadow's scores are kept in a folder of their own as soon as they are there, and found again by a second
    audit, or by one that goes on after a kill or asks for more models. The models themselves are functions of the
    forget set that nobody needs any more: they are not kept. No name, patient or position is written.

    Args:
        bundle: the running bundle, with the components ``recipe``, ``trainer``, ``methods`` and ``evaluator``.
        data: the data under audit.
        split: who is forgotten.
        forget_rows: the forget images that are targets: positions in ``data.train``, all of them in ``split.forget``.
        unseen_rows: images never trained or tuned on that are targets: positions in ``data.validation``.
        folder: where the shadows are kept; name it by ``shadow_hash``.
        models: number of shadow models S, even and at least 4.
        seed: seed of halves and trainings.
        seconds_per_model: what training one took, for the estimate; without it, the first one is timed.

    Returns:
        The scores, forget images first, both in the given order.

    Raises:
        ValueError: if the number of models is odd or under 4, rows are no forget images or no validation images, all
            targets are of one patient, or a shadow that is kept was damaged or is of another audit.

    References:
        Hayes et al., Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy, 2024,
        arXiv:2403.01218.
    """
    if isinstance(models, bool) or not isinstance(models, int) or models < FEWEST or models % 2:
        raise ValueError(f"models should be an even number of at least {FEWEST}, but got {models!r}.")
    forget_rows, unseen_rows = _rows(forget_rows, unseen_rows, data, split)
    targets = _Targets(data, forget_rows, unseen_rows)
    depends_on = shadow_hash(bundle, data.digest(), split, forget_rows, unseen_rows, seed)
    shadows = [
        _Shadow(folder / f"shadow-{k:03d}", k, targets.half(k, seed), f"{depends_on}-{k}") for k in range(models)
    ]
    to_train = [shadow for shadow in shadows if not shadow.is_kept()]
    _say_what_comes(models, len(to_train), seconds_per_model, folder)

    if to_train:
        evaluator = bundle.build("evaluator")
        target_images = bundle.build("evaluation_dataset", evaluation_part=targets.part(data))
        loader = bundle.build("evaluation_loader", evaluation_dataset=target_images)
    for i, shadow in enumerate(to_train):
        start = time.perf_counter()
        with new_folder(shadow.folder) as unfinished:
            own_data, own_split = _training_data(data, split, targets, shadow.inside)
            name = f"shadow model {shadow.number + 1} of {models}"
            network, cost = _train(bundle, own_data, own_split, _seed(seed, shadow.number), name, unfinished)
            result = evaluate(evaluator, network, {"target": loader}, data.class_names if data.multi_label else None)
            shadow.write(result["target"].scores, cost, evaluator.state.device, unfinished)
        seconds = time.perf_counter() - start
        left = len(to_train) - 1 - i
        if i == 0 and left and seconds_per_model is None:
            logger.info("Shadow models: about %s for the other %d (%.0f s each)", _time(left * seconds), left, seconds)

    scores, costs = zip(*(shadow.read() for shadow in shadows))
    inside = np.stack([shadow.inside for shadow in shadows])
    return ShadowScores(np.where(inside, scores, np.nan), np.where(inside, np.nan, scores), folder, sum(costs, Cost()))


class _Targets:
    """The images that the attack reports on, forget images first, and their halves."""

    def __init__(self, data: ImageData, forget_rows: np.ndarray, unseen_rows: np.ndarray) -> None:
        self.forget_rows, self.unseen_rows = forget_rows, unseen_rows
        self.is_forget = np.arange(len(forget_rows) + len(unseen_rows)) < len(forget_rows)
        self.person = _people(data, forget_rows, unseen_rows)
        if len(np.unique(self.person)) < 2:
            raise ValueError(
                "Shadow models need targets of at least two patients, half of whom each is trained on, but all "
                f"{len(self.person)} images are of one. Leave the shadow models out."
            )

    def part(self, data: ImageData) -> LabeledImages | ImageFiles:
        """The targets as a part of their own, in their order."""
        return _joined(data.train, self.forget_rows, data.validation, self.unseen_rows)

    def half(self, k: int, seed: int) -> np.ndarray:
        """Which of the targets shadow k trains on and unlearns: whole people, about half of either kind."""
        inside = np.zeros(len(self.person), dtype=bool)
        of_forget = np.isin(self.person, self.person[self.is_forget])
        for kind in (of_forget, ~of_forget):
            names, sizes = np.unique(self.person[kind], return_counts=True)
            if not len(names):
                continue
            # By SHA-256, so that it is the same on every platform and with every version of NumPy.
            draws = [hashlib.sha256(f"{seed}:{k // 2}:{name}".encode()).digest() for name in names]
            order = np.array(sorted(range(len(names)), key=draws.__getitem__))
            middle = np.cumsum(sizes[order]) - sizes[order] / 2
            # The person in the very middle goes inside with the forget images and not with the others, so that no
            # half is empty even where there is one person of each kind.
            first = middle <= sizes.sum() / 2 if kind is of_forget else middle < sizes.sum() / 2
            inside |= np.isin(self.person, names[order[first]])
        return ~inside if k % 2 else inside


@dataclass(frozen=True)
class _Shadow:
    """A shadow model's place on disk, what it trains on and unlearns, and a hash of what its scores depend on."""

    folder: Path
    number: int
    inside: np.ndarray
    depends_on: str

    def is_kept(self) -> bool:
        """Whether it was trained already; raises as ``read`` does."""
        return self.folder.is_dir() and bool(self.read())

    def read(self) -> tuple[np.ndarray, Cost]:
        """Its scores on all targets, and what it cost.

        Raises:
            ValueError: if what is kept was damaged, or is of another audit.
        """
        file = self.folder / "scores.npz"
        try:
            record = json.loads((self.folder / "record.json").read_text(encoding="utf-8"))
            intact = file_hash(file) == record["sha256"]
            cost, ours = Cost(**record["cost"]), record["depends_on"] == self.depends_on
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise ValueError(
                f"The shadow model kept in {self.folder} was changed or damaged since. Remove that folder to train it "
                "anew."
            )
        if not ours:
            raise ValueError(
                f"The shadow model kept in {self.folder} is of other data, another request, method, setting or seed. "
                "Remove that folder, or keep this audit's shadow models elsewhere."
            )
        with np.load(file, allow_pickle=False) as stored:
            return stored["scores"], cost

    def write(self, scores: np.ndarray, cost: Cost, device: torch.device, folder: Path) -> None:
        """Write scores and record into a folder that is about to become its own."""
        np.savez(folder / "scores.npz", scores=scores, inside=self.inside)
        content = {
            "shadow": self.number,
            "depends_on": self.depends_on,
            "cost": cost.as_dict(),
            "machine": machine(device),
            "sha256": file_hash(folder / "scores.npz"),
        }
        write_json(content, folder / "record.json")


def _train(
    bundle: Bundle, data: ImageData, split: Split, seed: int, name: str, unfinished: Path
) -> tuple[nn.Module, Cost]:
    """Train by the recipe and unlearn by the method, as the run under audit does; the network then, and the cost."""
    changes: dict[str, Any] = {"data": data, "split": split, "seed": seed, "train_seed": seed}
    if "train_dataset" in bundle.config:  # the run may share a finished one, of all its training images
        changes["train_dataset"] = copy.deepcopy(bundle.config["train_dataset"])

    set_determinism(seed)
    trainer = bundle.build("recipe::trainer", **changes)
    cost = run_trainer(trainer, name)
    trained = Checkpoint({key: value.detach().clone() for key, value in trainer.network.state_dict().items()})

    private = unfinished / "private"  # a mask, say, which is a function of what is unlearned
    private.mkdir()
    set_determinism(seed)
    trainer, methods = bundle.build("trainer", "methods", private_dir=str(private), **changes)
    trained.load_into(trainer.network)
    cost += run_trainer(trainer, f"{name}, unlearning")
    shutil.rmtree(private)
    return trainer.network, sum(costs_of(methods).values(), cost)


def _training_data(data: ImageData, split: Split, targets: _Targets, inside: np.ndarray) -> tuple[ImageData, Split]:
    """The retain set and the targets inside as training images, the latter to be forgotten."""
    forget = targets.forget_rows[inside[targets.is_forget]]
    unseen = targets.unseen_rows[inside[~targets.is_forget]]
    part = _joined(data.train, np.concatenate([split.retain, forget]), data.validation, unseen)
    retain = len(split.retain)
    own_split = replace(split, retain=np.arange(retain), forget=np.arange(retain, len(part)))
    return replace(data, train=part), own_split


def _joined(
    train: LabeledImages | ImageFiles, rows: np.ndarray, other: LabeledImages | ImageFiles, other_rows: np.ndarray
) -> LabeledImages | ImageFiles:
    """Some images of the training part, then some of another."""
    labels = np.concatenate([train.labels[rows], other.labels[other_rows]])
    attributes = pd.concat([_attributes(train, rows), _attributes(other, other_rows)], ignore_index=True)
    if isinstance(train, LabeledImages) and isinstance(other, LabeledImages):
        images = [train.images[rows], other.images[other_rows]]
        if train.images.dtype != other.images.dtype:
            images = [(part / np.float32(255) if part.dtype == np.uint8 else part) for part in images]
        return replace(train, images=np.concatenate(images), labels=labels, attributes=attributes)
    if isinstance(train, ImageFiles) and isinstance(other, ImageFiles):
        # The training part's root and names stay as they are: a cache on disk knows its copies by them.
        same = os.path.abspath(train.root) == os.path.abspath(other.root)
        names = [file if same else os.path.abspath(os.path.join(other.root, file)) for file in other.files[other_rows]]
        files = np.array([*train.files[rows], *names], dtype=object)
        return replace(train, files=files, labels=labels, attributes=attributes, name="")
    raise ValueError(
        "Shadow models need training and validation images of one kind, all in memory or all on disk, but got "
        f"{type(train).__name__} and {type(other).__name__}."
    )


def _attributes(part: LabeledImages | ImageFiles, rows: np.ndarray) -> pd.DataFrame:
    return part.attributes.iloc[rows] if len(part.attributes.columns) else pd.DataFrame(index=range(len(rows)))


def _people(data: ImageData, forget_rows: np.ndarray, unseen_rows: np.ndarray) -> np.ndarray:
    """Number of the person on each target; whose images equal another's counts as the same one."""
    sides = ((data.train, forget_rows), (data.validation, unseen_rows))
    patients = [
        np.full(len(rows), None, dtype=object) if part.patients is None else part.patients[rows].astype(object)
        for part, rows in sides
    ]
    person = people(np.concatenate(patients))
    content = [hashlib.sha256(part.content(row)).digest() for part, rows in sides for row in rows]
    _, image = np.unique(np.array(content, dtype=object), return_inverse=True)
    size = person.max() + 1
    links = coo_matrix((np.ones(len(person)), (person, size + image)), shape=[size + image.max() + 1] * 2)
    return connected_components(links, directed=False)[1][person]


def _rows(
    forget_rows: np.ndarray, unseen_rows: np.ndarray, data: ImageData, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """The targets' positions as arrays, checked."""
    allowed = {"forget_rows": split.forget, "unseen_rows": np.setdiff1d(range(len(data.validation)), split.selection)}
    what = {"forget_rows": "forget images", "unseen_rows": "validation images outside the selection half"}
    checked = []
    for name, given in (("forget_rows", forget_rows), ("unseen_rows", unseen_rows)):
        rows = np.asarray(given)
        wrong = rows.size - len(np.intersect1d(rows, allowed[name]))
        if rows.ndim != 1 or not len(rows) or wrong:
            raise ValueError(
                f"{name} should be positions of at least one of the {len(allowed[name])} {what[name]}, each once, but "
                f"got {rows.size}, of which {wrong} are others or repeat one."
            )
        checked.append(rows.astype(np.int64))
    return checked[0], checked[1]


def _seed(seed: int, k: int) -> int:
    """A shadow's own seed, of no other model of the run."""
    return int.from_bytes(hashlib.sha256(f"shadow:{seed}:{k}".encode()).digest()[:4], "big") >> 1


def _say_what_comes(models: int, to_train: int, seconds: float | None, folder: Path) -> None:
    if to_train < models:
        logger.info("Shadow models: %d of %d taken from %s", models - to_train, models, folder)
    if to_train and seconds is not None:
        logger.info(
            "Shadow models: training %d models, about %s (%.0f s each, as the original took)",
            to_train,
            _time(to_train * seconds),
            seconds,
        )
    elif to_train:
        logger.info("Shadow models: training %d models; how long that takes is told after the first", to_train)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
