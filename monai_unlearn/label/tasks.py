"""MONAI Label's tasks: train, unlearn, classify, score, and the strategy that shows the most exposed images first."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monai.transforms import Compose
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list
from torch import nn

from monai_unlearn.bundle import device_of
from monai_unlearn.label.images import image_table
from monai_unlearn.label.unlearning import Options, Unlearning, read_options
from monai_unlearn.label.versions import NoModelError, Version
from monai_unlearn.metrics import finding_log_odds, log_odds

__all__ = ["Classify", "Membership", "MostExposed", "TrainModel", "Unlearn"]

logger = logging.getLogger("monai_unlearn")

SCORE = "membership"


class Unlearn(TrainTask):
    """The train task ``unlearn``: carries out the deletion requests that wait.

    Args:
        unlearning: the app's.
    """

    def __init__(self, unlearning: Unlearning) -> None:
        super().__init__("Makes the model unlearn withdrawn patients: name images or patients, separated by commas")
        self.unlearning = unlearning

    def config(self) -> dict[str, Any]:
        """What the clients' option panels show."""
        default = Options()
        return {
            "images": "",
            "patients": "",
            "method": list(self.unlearning.site.methods),
            "budget": default.budget,
            "epochs": default.epochs,
            "ratio": default.ratio,
            "reference": default.reference,
            "dry_run": default.dry_run,
            "device": device_list(),
        }

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Carry out what waits, as MONAI Label's background process."""
        given = {name: value for name, value in request.items() if name not in ("images", "patients", "request")}
        done = self.unlearning.run(datastore, read_options(given, self.unlearning.site.methods))
        return {"requests": [one.public() for one in done]}


class TrainModel(TrainTask):
    """The train task of the model itself, on the labelled images of the datastore.

    Args:
        unlearning: the app's.
    """

    def __init__(self, unlearning: Unlearning) -> None:
        super().__init__("Trains the classifier on the labelled images, and serves it")
        self.unlearning = unlearning

    def config(self) -> dict[str, Any]:
        """What the clients' option panels show; 0 epochs are the recipe's own."""
        return {"max_epochs": 0, "device": device_list()}

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Train, as MONAI Label's background process."""
        device, epochs = (request.get(name) for name in ("device", "max_epochs"))
        settings = {"device": device[0] if isinstance(device, list) else device, "train_epochs": epochs or None}
        return self.unlearning.train(datastore, settings).public()


class Served:
    """The network that is served, on its device; another version takes its place when it is published.

    Args:
        unlearning: the app's.
    """

    def __init__(self, unlearning: Unlearning) -> None:
        self.unlearning = unlearning
        self._lock = threading.Lock()
        self._version: Version | None = None
        self._network: nn.Module | None = None
        self._preprocessing: Compose | None = None
        self._device = torch.device("cpu")

    def get(self, device: str | None) -> tuple[Version, nn.Module, Compose, torch.device]:
        """Version, network, transforms and device.

        Raises:
            NoModelError: if none is served.
            ValueError: if its checkpoint is damaged.
        """
        wanted = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with self._lock:
            version = self.unlearning.versions.served()
            if self._network is None or self._preprocessing is None or version != self._version:
                checkpoint = self.unlearning.versions.load(version)
                bundle = self.unlearning.bundle(version)
                network, preprocessing = bundle.build("network_def", "preprocessing")
                checkpoint.load_into(network)
                self._network, self._preprocessing = network.eval(), Compose(preprocessing)
                self._version, self._device = version, torch.device("cpu")
                del checkpoint
                _give_memory_back()
            if wanted != self._device:
                self._network.to(wanted)
                self._device = wanted
            return version, self._network, self._preprocessing, wanted

    def logits(self, path: str | Path, device: str | None = None) -> tuple[Version, torch.Tensor]:
        """The network's outputs for one image, shape C, on the CPU.

        Raises:
            NoModelError: if none is served.
            ValueError: if its checkpoint is damaged, or the image can't be read.
        """
        version, network, preprocessing, on = self.get(device)
        try:
            image = preprocessing({"image": str(path)})["image"]
        except Exception as error:  # readers raise whatever a damaged file makes them trip over
            raise ValueError(
                f"The image could not be read as this model's images are ({type(error).__name__})."
            ) from None
        with torch.inference_mode():
            return version, network(image[None].to(on))[0].float().cpu()


def _give_memory_back() -> None:
    """Return freed memory to the system: the C library keeps what each of the server's threads frees, weights too."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)


class Classify(InferTask):
    """Classification by the served model: the class, or the findings, and their probabilities.

    Args:
        served: the served network.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        super().__init__(InferType.CLASSIFICATION, [], 2, "Classifies by the model that is served now")

    def info(self) -> dict[str, Any]:
        """What clients show of it."""
        try:
            version = self.served.unlearning.versions.current()
        except NoModelError:
            version = None
        labels = [] if version is None else list(version.class_names)
        return {**super().info(), "labels": labels, "version": None if version is None else version.name}

    def is_valid(self) -> bool:
        """Whether there is anything to show: always, so that clients can say that no model is there yet."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The checkpoint, which ``GET /model/`` offers for download."""
        version = self.served.unlearning.versions.current()
        return None if version is None else str(version.path)

    def __call__(self, request: dict[str, Any]) -> tuple[None, dict[str, Any]]:
        """Classify one image; there is no file to give back."""
        path = request.get("image")
        # MONAI Label classifies any file of the server that it is given the path of; quarantine is nobody's to see.
        inside = self.served.unlearning.site.folder.resolve()
        if not isinstance(path, str) or not path or inside in Path(path).resolve().parents:
            raise HTTPException(404, "There is no such image in the datastore.")
        device = request.get("device")
        try:
            version, logits = self.served.logits(path, device if isinstance(device, str) else None)
        except NoModelError as error:
            raise HTTPException(409, str(error)) from None
        except ValueError as error:
            raise HTTPException(500 if "checkpoint" in str(error) else 422, str(error)) from None
        values = logits.sigmoid() if version.multi_label else logits.softmax(0)
        scores = {name: round(float(value), 6) for name, value in zip(version.class_names, values)}
        best = (
            [n for n, v in scores.items() if v >= 0.5] if version.multi_label else max(scores, key=scores.__getitem__)
        )
        return None, {"label": best, "scores": scores, "version": version.name, "model": version.made}


class Membership(ScoringMethod):
    """Writes each image's membership score into its info: how much it looks like one that the model was trained on.

    The score is the log-odds of the image's own label, the one that the audit's population attack goes by. High scores
    are no proof of membership: easy images have them too.

    Args:
        served: the served network.
    """

    def __init__(self, served: Served) -> None:
        super().__init__("How much an image looks like one that the model was trained on")
        self.served = served

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Score all images, as MONAI Label's background process."""
        unlearning = self.served.unlearning
        try:
            version = unlearning.versions.served()
        except NoModelError as error:
            return {"executed": 0, "skipped": len(datastore.list_images()), "message": str(error)}
        table = image_table(datastore, unlearning.site)
        scored = 0
        for row in table.to_dict("records"):
            label = _label(row, version)
            if label is None:
                continue
            path = unlearning.site.studies / row["file"]
            if not path.is_file():  # withdrawn meanwhile
                continue
            logits = self.served.logits(path, request.get("device"))[1][None]
            score = finding_log_odds(logits, label) if version.multi_label else log_odds(logits, label)
            datastore.update_image_info(
                row["image"], {SCORE: {"score": round(float(score), 4), "version": version.name}}
            )
            scored += 1
        return {"executed": scored, "skipped": len(table) - scored}


def _label(row: Mapping[str, Any], version: Version) -> torch.Tensor | None:
    """The label as the network's loss takes it, in a batch of one; None where it is not known."""
    if version.multi_label:
        values = [row.get(name) for name in version.class_names]
        known = [
            float(value) if isinstance(value, str) and value in ("0", "1", "0.0", "1.0") else float("nan")
            for value in values
        ]
        return None if all(value != value for value in known) else torch.tensor([known])
    label = row.get("label")
    return torch.tensor([version.class_names.index(label)]) if label in version.class_names else None


class MostExposed(Strategy):
    """Shows the image first that looks most like one that the model was trained on."""

    def __init__(self) -> None:
        super().__init__("The image with the highest membership score first")

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any] | None:
        """The next image to look at."""
        scores = {}
        for image in datastore.list_images():
            info = datastore.get_image_info(image).get(SCORE)
            if isinstance(info, dict) and isinstance(info.get("score"), (int, float)):
                scores[image] = float(info["score"])
        if not scores:
            return None
        # Those that were shown already come last, so that asking again goes on to the next.
        shown = {image for image in scores if "most_exposed" in datastore.get_image_info(image).get("strategy", {})}
        best = max(scores, key=lambda image: (image not in shown, scores[image]))
        return {"id": best, SCORE: scores[best]}
