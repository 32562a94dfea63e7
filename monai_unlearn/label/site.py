"""What a site says of its model: which bundle it is, how its data is read, and what is accepted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from monai_unlearn.bundle import bundle_path, hint

__all__ = ["Accept", "Site", "read_site"]

# The part of the bundle that reads files of an ending.
PARTS = {".dcm": "dicom", ".gz": "nifti", ".nii": "nifti"}
DEFAULT_PART = "images"
METHODS = ("auto", "saliency", "random_labeling", "finetune", "retrain")


@dataclass(frozen=True)
class Accept:
    """What an unlearned model has to keep to, so that it is served.

    Args:
        test_loss: by how much test accuracy (mean AUROC of findings) may fall below the present model's, in [0, 1].
        attack_auc: how well forgotten images may be told from unseen ones, whichever way: the attack's AUC, or 1 less
            it, at the end of its interval that is nearer to 0.5; in [0.5, 1], where 1 asks for nothing.
        verdicts: verdicts of the audit that are accepted; all of them by default.
    """

    test_loss: float = 0.05
    attack_auc: float = 1.0
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """The settings of an app.

    Args:
        studies: folder of the datastore.
        model: what clients call the model.
        parts: configs that are added to the method's, by name or path: they read the images and make the network.
        options: settings of the recipe: ``{"train_epochs": 20, "image_size": [64, 64]}``.
        labels_file: CSV table of labels, by file or patient; None: they stand in the datastore's image info.
        class_names: names of the classes in the order of the network's outputs, or of the findings.
        multi_label: whether these are findings.
        checkpoint: a trained model to begin with.
        methods: bundles of methods that clients may choose from, the default first.
        accept: what an unlearned model has to keep to.
        finalise_after_days: after how many days earlier versions are removed; None: when somebody asks for it.
    """

    studies: Path
    model: str = "classifier"
    parts: tuple[str, ...] = (DEFAULT_PART,)
    options: Mapping[str, Any] = field(default_factory=dict)
    labels_file: Path | None = None
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    checkpoint: Path | None = None
    methods: tuple[str, ...] = METHODS
    accept: Accept = Accept()
    finalise_after_days: float | None = None

    @property
    def folder(self) -> Path:
        """Where queue, quarantine, versions and reports are: on the file system of the images, which move there."""
        return self.studies / ".unlearning"

    @property
    def finalise_after(self) -> timedelta | None:
        """How long earlier versions are kept."""
        return None if self.finalise_after_days is None else timedelta(days=self.finalise_after_days)

    def configs(self, method: str) -> list[str]:
        """Config files of a bundle on this site's data, the method's first.

        Raises:
            ValueError: if there is no such method or part.
        """
        parts = [*self.parts, *(["multi_label"] if self.multi_label and "multi_label" not in self.parts else [])]
        names = [method, *parts]
        return [name if name.endswith(".json") else str(bundle_path(name)) for name in names]


def read_site(studies: str | os.PathLike, conf: Mapping[str, str]) -> Site:
    """Read an app's settings: a JSON file that ``--conf site FILE`` names, or the defaults for what the folder holds.

    Paths in the file are relative to it.

    Args:
        studies: folder of the datastore.
        conf: what ``--conf`` gave.

    Raises:
        ValueError: if the datastore is no folder, or a setting is misspelt or of the wrong kind.
        FileNotFoundError: if the file does not exist.
    """
    if str(studies).startswith(("http://", "https://")):
        raise ValueError(
            "The unlearning app needs a folder of studies, since images of withdrawn patients are moved out of it, "
            f"but got the address {str(studies)!r}. Use --studies DIR."
        )
    root = Path(studies).resolve()
    given: dict[str, Any] = {}
    base = root
    if conf.get("site"):
        path = Path(conf["site"])
        if not path.is_file():
            raise FileNotFoundError(f"--conf site should name a JSON file, but {str(path)!r} does not exist.")
        base = path.resolve().parent
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is no JSON: {error}.") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path.name} should hold one JSON object, but holds a {type(given).__name__}.")
    known = [each.name for each in fields(Site) if each.name != "studies"]
    for name in given:
        if name not in known:
            raise ValueError(
                f"There is no setting {name!r} of a site.{hint(name, known)} There are: {', '.join(known)}."
            )
    for name in ("parts", "methods", "class_names"):
        if name in given:
            given[name] = tuple(_strings(name, given[name]))
    for name in ("labels_file", "checkpoint"):
        if given.get(name) is not None:
            given[name] = (base / str(given[name])).resolve()
    given.setdefault("parts", (_part_for(root),))
    given["parts"] = tuple(str((base / part).resolve()) if part.endswith(".json") else part for part in given["parts"])
    given["accept"] = _accept(given.get("accept", {}))
    if not isinstance(given.get("options", {}), dict):
        raise ValueError(f"options should be an object of settings, but got {given['options']!r}.")
    days = given.get("finalise_after_days")
    if days is not None and not (isinstance(days, (int, float)) and math.isfinite(days) and days >= 0):
        raise ValueError(f"finalise_after_days should be a number of at least 0, or null, but got {days!r}.")
    if not isinstance(given.get("model", ""), str) or given.get("model") == "unlearn":
        raise ValueError(f"model should be a name other than 'unlearn', but got {given['model']!r}.")
    site = Site(studies=root, **given)
    if not site.methods:
        raise ValueError("methods should name at least one method, but is empty.")
    for method in site.methods:
        site.configs(method)
    return site


def _part_for(root: Path) -> str:
    endings = [path.suffix.lower() for path in root.iterdir() if path.is_file()] if root.is_dir() else []
    return next((PARTS[ending] for ending in endings if ending in PARTS), DEFAULT_PART)


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} should be a list of names, but got {value!r}.")
    return value


def _accept(given: Any) -> Accept:
    known = [each.name for each in fields(Accept)]
    if not isinstance(given, dict):
        raise ValueError(f"accept should be an object with {', '.join(known)}, but got {given!r}.")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"There is no threshold {name!r}.{hint(name, known)} There are: {', '.join(known)}.")
        if name == "verdicts":
            _strings(name, value)
            continue
        low = 0.5 if name == "attack_auc" else 0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 1:
            raise ValueError(f"{name} should be a number in [{low}, 1], but got {value!r}.")
    return Accept(**{**given, "verdicts": tuple(given.get("verdicts", ()))})
