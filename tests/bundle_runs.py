"""Bundles run in this process on a data set of a few kilobytes: fixtures for the tests of whole runs.

PYTEST_DONT_REWRITE: a plugin that tests also import from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.data import ImageData, LabeledImages

METHODS = (
    "random_labeling",
    "retrain",
    "saliency",
    "finetune",
    "gradient_ascent",
    "neg_grad_plus",
    "scrub",
    "bad_teacher",
    "delete",
    "synaptic_dampening",
    "influence",
    "rum",
    "masked_small_gradients",
    "conv_transpose",
    "weight_noise",
    "l1_sparse",
    "cf_k",
    "eu_k",
    "reference_guided",
    "boundary_shrink",
    "amun",
    "auto",
)
ONLY_CLASSES = ("delete", "amun")  # they refuse findings
WITHOUT_EPOCHS = ("retrain", "synaptic_dampening", "influence", "auto")  # no setting for them
FEWEST_EPOCHS = {"rum": 2}  # of a method that needs more than one
CONFIGS = ("train", "audit", *METHODS)
PARTS = (
    "chexpert",
    "dicom",
    "images",
    "nifti",
    "multi_label",
    "resnet18",
    "resnet50",
    "tune",
    "overlay",
    "study",
)  # not alone
TRAIN, VALIDATION, TEST = 120, 40, 30
# A network of a few hundred weights, trained for a moment: the tests are about the run, not about the model.
TINY = {
    "network_def::block_inplanes": [4, 4, 8, 8],
    "network_def::layers": [1, 1, 1, 1],
    "train_epochs": 4,
    "batch_size": 16,
    "device": "cpu",
}
PATIENTS = [f"Zq7-{number:04d}-Xw" for number in range(24)]


def easy_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey 12 × 12 images of three classes, told apart by which third is bright."""
    random = np.random.RandomState(seed)
    labels = np.arange(n) % 3
    images = random.randint(0, 60, (n, 12, 12))
    for label in range(3):
        images[labels == label, 4 * label : 4 * label + 4] += 150
    return images.astype(np.uint8), labels.astype(np.int64)


def medmnist_arrays() -> dict[str, np.ndarray]:
    """Contents of a file in MedMNIST's format."""
    arrays = {}
    for seed, (split, n) in enumerate((("train", TRAIN), ("val", VALIDATION), ("test", TEST))):
        images, labels = easy_images(n, seed)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.uint8)[:, None]}
    return arrays


def with_patients() -> ImageData:
    """A small stand-in for the embedded data: five images a patient, whose ids occur nowhere by chance."""

    def part(first: int, patients: int, seed: int) -> LabeledImages:
        images, labels = easy_images(5 * patients, seed)
        names = np.repeat(PATIENTS[first : first + patients], 5)
        return LabeledImages(images, labels, pd.DataFrame({"patient": names}))

    return ImageData("synthetic cells", ("a", "b", "c"), part(0, 12, 0), part(12, 8, 1), part(20, 4, 2), embedded=True)


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_below(folder: Path) -> dict[str, str]:
    """Path → hash of every file in a folder, hidden ones too."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished_below(folder: Path) -> list[str]:
    """What runs have left half-written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part*"))


def messages(error: BaseException) -> str:
    """The messages of an error and of all that MONAI wrapped in it."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(texts)


def checked_bundle(name: str, overlay: dict | None = None, **overrides: Any) -> Bundle:
    """A bundle as MONAI hands it to a run, overrides included, with its settings checked."""
    shipped = ConfigParser.load_config_file(bundle_path(name))
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path(name)) | (overlay or {}))
    parser.update({key.replace("#", "::"): value for key, value in overrides.items()})
    bundle = Bundle(parser, shipped, overlay or ())
    bundle.check()
    return bundle


class Workplace:
    """A user's working directory, with a data set in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "tiny.npz"
        np.savez(self.data, **medmnist_arrays())

    @property
    def models(self) -> Path:
        return self.folder / "runs" / "models"

    def train(self, **settings: Any) -> None:
        monai.bundle.run(
            "train", config_file=str(bundle_path("train")), **{**TINY, "dataset_file": str(self.data), **settings}
        )

    def unlearn(self, method: str = "saliency", overlays: tuple[Path, ...] = (), **settings: Any) -> Path:
        """Run a method's bundle; returns its output folder."""
        own = {"dataset_file": str(self.data), "reference_models": 1} | (
            {} if method in WITHOUT_EPOCHS else {"epochs": FEWEST_EPOCHS.get(method, 1)}
        )
        files = [str(bundle_path(method)), *map(str, overlays)]
        monai.bundle.run("unlearn", config_file=files if overlays else files[0], **{**TINY, **own, **settings})
        return self.folder / settings.get("output_dir", f"runs/{method}")

    def audit(self, **settings: Any) -> Path:
        """Run an audit; returns its output folder. Without ``run`` it is of this data set and network."""
        own = {} if "run" in settings else {**TINY, "dataset_file": str(self.data)}
        defaults = {"relearn_epochs": 2, "output_dir": "runs/audit"}
        monai.bundle.run("audit", config_file=str(bundle_path("audit")), **{**own, **defaults, **settings})
        return self.folder / {**defaults, **settings}["output_dir"]

    def original(self) -> dict[str, torch.Tensor]:
        """State of the original model of seed 0, which is kept from the start."""
        return torch.load(self._kept("original"), weights_only=True)

    def kept(self) -> dict[str, Path]:
        """``"original"`` or ``"retrained"`` → checkpoint, of the models that are kept from the start."""
        return {what: self._kept(what) for what in ("original", "retrained")}

    def _kept(self, what: str) -> Path:
        for record in sorted(self.models.glob("*/training.json")):
            if json.loads(record.read_text())["what"] == what:
                return record.parent / "model.pt"
        raise LookupError(what)

    def network(self, classes: int = 3, channels: int = 1) -> nn.Module:
        """A new network of the bundles' architecture."""
        parser = ConfigParser(ConfigParser.load_config_file(bundle_path("saliency")))
        parser.update({key: value for key, value in TINY.items() if key.startswith("network_def")})
        parser.update({"network_def::num_classes": classes, "network_def::n_input_channels": channels})
        return parser.get_parsed_content("network_def")


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """A bundle sets logging up for its process; these tests share theirs with others."""
    loggers = [logging.getLogger(), logging.getLogger("monai_unlearn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def empty_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _logging_as_before: None) -> Workplace:
    """A working directory in which nothing has run yet."""
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


@pytest.fixture(scope="session")
def kept_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/models`` after a training and one run of unlearning: an original and a retrained model of seed 0."""
    workplace = Workplace(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace.folder)
        workplace.train()
        workplace.unlearn("random_labeling")
    return workplace.models


@pytest.fixture
def workplace(empty_workplace: Workplace, kept_models: Path) -> Workplace:
    """A working directory in which original and retrained model are there already."""
    shutil.copytree(kept_models, empty_workplace.models)
    return empty_workplace
