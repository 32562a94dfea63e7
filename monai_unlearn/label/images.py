"""The datastore's images as a table, whose they are, and the quarantine of those that are withdrawn."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pydicom

from monai_unlearn.data import read_labels
from monai_unlearn.label.site import Site
from monai_unlearn.output import write_json

__all__ = ["Datastore", "Quarantine", "UnknownImagesError", "image_table", "images_of", "with_split", "write_table"]

# What MONAI Label and its clients keep in an image's info that says nothing of the image.
NO_ATTRIBUTES = ("ts", "name", "path", "checksum", "user", "client_id", "strategy", "logs", "membership")
HEADER = {"patient": "PatientID", "sex": "PatientSex", "modality": "Modality"}
SPLIT_SEED = 701515
TRAIN, VALIDATION = 0.7, 0.85


class UnknownImagesError(LookupError):
    """Images or patients that the datastore does not have."""


class Datastore(Protocol):
    """What is used of MONAI Label's ``LocalDatastore``."""

    def list_images(self) -> list[str]:
        """Ids of all images."""

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image; of an id that there is none of, nothing."""

    def refresh(self) -> None:
        """Look for files that came or went."""

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known of an image."""


def image_table(datastore: Datastore, site: Site, images: Iterable[str] | None = None) -> pd.DataFrame:
    """One row for each image of the datastore.

    Patient and sex come from the header of a DICOM file, everything from the image's info in the datastore
    (``PUT /datastore/image/info``), and from the site's table of labels; what comes first goes before. An image without
    a patient counts as a patient of its own.

    Args:
        datastore: the app's datastore.
        site: the app's settings.
        images: only these; by default all.

    Returns:
        Columns ``image`` (id), ``file`` (relative to the datastore's folder), ``patient``, and whatever else is known:
        ``label``, findings, ``split``, attributes. All text; missing is None.
    """
    rows = [_row(datastore, image) for image in (datastore.list_images() if images is None else images)]
    table = pd.DataFrame(rows, columns=None if rows else ["image", "file"], dtype=object)
    if site.labels_file is not None:
        table = _with_labels(table, read_labels(site.labels_file))
    if "patient" not in table:
        table["patient"] = None
    table["patient"] = table["patient"].where(table["patient"].notna(), table["image"])
    return table


def _row(datastore: Datastore, image: str) -> dict[str, Any]:
    info = datastore.get_image_info(image)
    labels = info.pop("labels", None)
    known = {**info, **labels} if isinstance(labels, dict) else info
    row = {
        str(name): str(value)
        for name, value in known.items()
        if name not in NO_ATTRIBUTES and isinstance(value, (str, int, float)) and value not in ("", None)
    }
    return {**_header(Path(info["path"])), **row, "image": image, "file": str(info.get("name") or image)}


_headers: dict[tuple[str, float], dict[str, str]] = {}


def _header(path: Path) -> dict[str, str]:
    """What a DICOM file's header says; pixels are not read."""
    if path.suffix.lower() != ".dcm":
        return {}
    try:
        key = (str(path), path.stat().st_mtime)
        if key not in _headers:
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER.values()))
            values = {name: str(data.get(keyword) or "").strip() for name, keyword in HEADER.items()}
            _headers[key] = {name: value for name, value in values.items() if value}
        return _headers[key]
    except Exception:  # pydicom raises whatever a damaged file makes it trip over; the image has no patient then
        return {}


def _with_labels(table: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of a table of labels where the datastore says nothing."""
    if "image" in labels:
        key, own = "image", table["image"]
    elif "file" in labels:
        key, own = "file", table["file"]
    elif "patient" in labels and "patient" in table:
        key, own = "patient", table["patient"]
    else:
        raise ValueError("labels_file should have a column file, image or patient, by which images are found.")
    labels = labels[labels[key].notna()].drop_duplicates(key).set_index(key)
    joined = labels.reindex(own).reset_index(drop=True)
    for column in joined:
        given = joined[column].astype(object)
        table[column] = table[column].where(table[column].notna(), given) if column in table else given
    return table


def with_split(table: pd.DataFrame) -> pd.DataFrame:
    """Put every patient into training, validation or test where no column ``split`` says it.

    A patient's place depends on nothing but their id, so that it stays where others come and go: about 70, 15 and 15 %.
    """
    place = {patient: _place(patient) for patient in table["patient"].unique()}
    drawn = table["patient"].map(place)
    given = table["split"] if "split" in table else pd.Series(None, index=table.index, dtype=object)
    return table.assign(split=given.where(given.notna(), drawn))


def _place(patient: str) -> str:
    share = int.from_bytes(hashlib.sha256(f"{SPLIT_SEED}:{patient}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < TRAIN else "validation" if share < VALIDATION else "test"


def images_of(table: pd.DataFrame, images: Collection[str], patients: Collection[str]) -> pd.DataFrame:
    """All images of the patients that are named, or of whom an image is named.

    Raises:
        UnknownImagesError: if one is not there; how many, but not which.
    """
    strange = set(images) - set(table["image"])
    nobody = set(patients) - set(table["patient"])
    if strange or nobody:
        what = [f"{len(strange)} of {len(set(images))} images"] * bool(strange)
        what += [f"{len(nobody)} of {len(set(patients))} patients"] * bool(nobody)
        raise UnknownImagesError(
            f"{' and '.join(what)} are not in the datastore; ids are not repeated here. Check how they are spelt "
            "(GET /datastore/?output=all lists images). Nothing was changed."
        )
    people = set(patients) | set(table.loc[table["image"].isin(set(images)), "patient"])
    return table[table["patient"].isin(people)]


class Quarantine:
    """Images that the datastore no longer shows, but that unlearning and audit still need.

    A request's images lie in a folder of its own on the datastore's file system, so that moving them there is one step
    for each, and none is ever copied.

    Args:
        folder: where they lie.
        studies: the datastore's folder.
    """

    def __init__(self, folder: str | os.PathLike, studies: Path) -> None:
        self.folder = Path(folder)
        self.studies = studies

    def take(self, request: str, table: pd.DataFrame, datastore: Datastore) -> None:
        """Move images and their labels out of the datastore; what was moved already stays.

        Args:
            request: the request's id.
            table: rows of ``image_table``.
            datastore: told afterwards.
        """
        folder = self._folder(request)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = {row["image"]: row for row in self.rows(request)}
        for row in table.to_dict("records"):
            kept = {name: value for name, value in row.items() if isinstance(value, str)}
            info = {name: value for name, value in datastore.get_image_info(row["image"]).items() if name != "path"}
            rows[row["image"]] = {**kept, "info": info}
        # The list first: what is killed in the middle is then known, and is finished by the next call.
        part = folder / ".images.json.part"
        write_json(list(rows.values()), part)
        os.replace(part, folder / "images.json")
        self._finish(request)
        datastore.refresh()

    def _finish(self, request: str) -> None:
        folder = self._folder(request)
        for row in self.rows(request):
            _move(self.studies / row["file"], folder / "files" / row["file"])
            for label in self._labels(row["image"]):
                _move(label, folder / "labels" / label.parent.name / label.name)

    def _labels(self, image: str) -> list[Path]:
        labels = self.studies / "labels"
        tags = [path for path in labels.iterdir() if path.is_dir()] if labels.is_dir() else []
        return [path for tag in tags for path in tag.iterdir() if path.is_file() and _stem(path.name, image)]

    def rows(self, request: str) -> list[dict[str, Any]]:
        """What is known of the images of a request."""
        path = self._folder(request) / "images.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def table(self, requests: Iterable[str]) -> pd.DataFrame:
        """Images of some requests as rows of ``image_table``, ``file`` pointing into the quarantine."""
        rows = []
        for request in requests:
            inside = self._folder(request).relative_to(self.studies) / "files"
            for row in self.rows(request):
                known = {name: value for name, value in row.items() if name != "info"}
                rows.append({**known, "file": (inside / row["file"]).as_posix()})
        return pd.DataFrame(rows, dtype=object)

    def give_back(self, request: str, datastore: Datastore) -> int:
        """Move a request's images back into the datastore; returns how many."""
        rows, folder = self.rows(request), self._folder(request)
        for row in rows:
            _move(folder / "files" / row["file"], self.studies / row["file"])
        for label in sorted((folder / "labels").glob("*/*")):
            _move(label, self.studies / "labels" / label.parent.name / label.name)
        datastore.refresh()
        for row in rows:
            datastore.update_image_info(row["image"], dict(row["info"]))
        shutil.rmtree(folder, ignore_errors=True)
        return len(rows)

    def erase(self, request: str) -> int:
        """Delete a request's images; returns how many."""
        count = len(self.rows(request))
        if self._folder(request).exists():
            shutil.rmtree(self._folder(request))
        return count

    def names(self) -> set[str]:
        """Everything in quarantine that may name somebody: for logs, which must not."""
        found: set[str] = set()
        for folder in self.folder.iterdir() if self.folder.is_dir() else []:
            for row in self.rows(folder.name):
                found |= {row["image"], row["file"], row.get("patient", "")}
        return found - {""}

    def _folder(self, request: str) -> Path:
        return self.folder / request


def _stem(name: str, image: str) -> bool:
    """Whether a file is of an image: its id, and an ending."""
    return name == image or (name.startswith(f"{image}.") and "/" not in name)


def _move(path: Path, to: Path) -> None:
    if not os.path.lexists(path):  # moved before
        return
    to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.replace(path, to)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table that a bundle reads: without ids of other kinds than file and patient."""
    table.drop(columns=[name for name in ("image", "study", "series", "instance") if name in table]).to_csv(
        path, index=False
    )
