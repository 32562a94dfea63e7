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
from filelock import FileLock

from monai_unlearn.data import quiet_pydicom, read_labels
from monai_unlearn.label.site import Site
from monai_unlearn.output import write_json

__all__ = [
    "Datastore",
    "Quarantine",
    "UnknownImagesError",
    "image_table",
    "images_of",
    "link_files",
    "with_split",
    "write_table",
]

# What MONAI Label and its clients keep in an image's info that says nothing of the image.
NO_ATTRIBUTES = ("ts", "name", "path", "checksum", "user", "client_id", "strategy", "logs", "membership")
HEADER = {"patient": "PatientID", "sex": "PatientSex", "modality": "Modality"}
LOCK_SECONDS = 60
SPLIT_SEED = 701515
TRAIN, VALIDATION = 0.7, 0.85


class UnknownImagesError(LookupError):
    """Images or patients that the datastore does not have."""


class Datastore(Protocol):
    """What is used of MONAI Label's ``LocalDatastore``."""

    def json(self) -> dict[str, Any]:
        """``objects``: id → ``image`` and ``labels`` (by tag), each with ``ext`` and ``info``."""

    def refresh(self) -> None:
        """Look for files that came or went."""

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known of an image."""


def image_table(datastore: Datastore, site: Site) -> pd.DataFrame:
    """One row for each image of the datastore.

    What is known comes from the image's info in the datastore (``PUT /datastore/image/info``), from the site's table of
    labels, and patient, sex and modality from the header of a DICOM file; what comes first goes before. An image
    without a patient counts as a patient of its own.

    Args:
        datastore: the app's datastore.
        site: the app's settings.

    Returns:
        Columns ``image`` (id), ``file`` (in the datastore's folder), ``patient``, and whatever else is known:
        ``label``, findings, ``split``, attributes. All text; missing is None.
    """
    objects = datastore.json()["objects"]
    rows = [_row(image, about["image"]) for image, about in objects.items()]
    table = pd.DataFrame(rows, columns=None if rows else ["image", "file"], dtype=object)
    labels = None if site.labels_file is None else read_labels(site.labels_file)
    key = None if labels is None else next((name for name in ("image", "file", "patient") if name in labels), None)
    if labels is not None and key is None:
        raise ValueError("labels_file should have a column file, image or patient, by which images are found.")
    if labels is not None and key != "patient":
        table = _filled(table, labels, key)
    headers = [_header(site.studies / file) for file in table["file"]]
    for name in HEADER:
        found = pd.Series([header.get(name) for header in headers], index=table.index, dtype=object)
        if name in table:
            table[name] = table[name].where(table[name].notna(), found)
        elif found.notna().any() or name == "patient":
            table[name] = found
    if labels is not None and key == "patient":
        table = _filled(table, labels, key)
    table["patient"] = table["patient"].where(table["patient"].notna(), table["image"])
    return table


def _row(image: str, about: dict[str, Any]) -> dict[str, Any]:
    info = about["info"]
    labels = info.get("labels")
    known = {**info, **labels} if isinstance(labels, dict) else info
    row = {
        str(name): str(value)
        for name, value in known.items()
        if name not in NO_ATTRIBUTES and isinstance(value, (str, int, float)) and value not in ("", None)
    }
    # The file's name is the datastore's own: clients may write anything into the info, but not decide what is moved.
    return {**row, "image": image, "file": f"{image}{about['ext']}"}


_headers: dict[tuple[str, float], dict[str, str]] = {}


def _header(path: Path) -> dict[str, str]:
    """What a DICOM file's header says; pixels are not read."""
    if path.suffix.lower() != ".dcm":
        return {}
    try:
        key = (str(path), path.stat().st_mtime)
        if key not in _headers:
            with quiet_pydicom():
                data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER.values()))
                values = {name: str(data.get(keyword) or "").strip() for name, keyword in HEADER.items()}
            _headers[key] = {name: value for name, value in values.items() if value}
        return _headers[key]
    except Exception:  # pydicom raises whatever a damaged file makes it trip over; the image has no patient then
        return {}


def _filled(table: pd.DataFrame, labels: pd.DataFrame, key: str | None) -> pd.DataFrame:
    """Add the columns of a table of labels where nothing is known yet."""
    labels = labels[labels[key].notna()].drop_duplicates(key).set_index(key)
    joined = labels.reindex(table[key]).reset_index(drop=True)
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
        """Move images and their labels out of the datastore; the same again finishes what was begun.

        Args:
            request: the request's id.
            table: rows of ``image_table``.
            datastore: told afterwards.
        """
        folder = self._folder(request)
        rows = {row["image"]: row for row in self.rows(request)}
        objects = datastore.json()["objects"]
        for row in table.to_dict("records"):
            if not _plain(row["file"]):
                raise ValueError("An image should lie in the datastore's folder itself, but one does not.")
            kept = {name: value for name, value in row.items() if isinstance(value, str)}
            about = objects.get(row["image"], {"image": {"info": {}}, "labels": {}})
            labels = [f"{tag}/{row['image']}{label['ext']}" for tag, label in about.get("labels", {}).items()]
            rows[row["image"]] = {**kept, "info": about["image"]["info"], "label_files": labels}
        with self.moving():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The list first: what is killed in the middle is then known.
            part = folder / ".images.json.part"
            write_json(list(rows.values()), part)
            os.replace(part, folder / "images.json")
            for row in rows.values():
                _move(self.studies / row["file"], folder / "files" / row["file"])
                for label in row["label_files"]:
                    _move(self.studies / "labels" / label, folder / "labels" / label)
        datastore.refresh()

    def moving(self) -> FileLock:
        """Held while files move, and while a run takes stock of them."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(str(self.folder.with_name("moving.lock")), timeout=LOCK_SECONDS)

    def holds(self, request: str, images: Collection[str]) -> bool:
        """Whether all of a request's images are here."""
        rows = {row["image"]: row["file"] for row in self.rows(request)}
        folder = self._folder(request) / "files"
        return set(images) <= set(rows) and all(os.path.lexists(folder / rows[image]) for image in images)

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
                known = {name: value for name, value in row.items() if isinstance(value, str)}
                rows.append({**known, "file": (inside / row["file"]).as_posix()})
        return pd.DataFrame(rows, dtype=object)

    def give_back(self, request: str, datastore: Datastore) -> int:
        """Move a request's images back into the datastore; returns how many.

        Raises:
            ValueError: if another file has their name there by now; nothing is moved then.
        """
        rows, folder = self.rows(request), self._folder(request)
        taken = sum(
            os.path.lexists(folder / "files" / row["file"]) and os.path.lexists(self.studies / row["file"])
            for row in rows
        )
        if taken:
            raise ValueError(f"{taken} of {len(rows)} images can't return: files of their name have been added since.")
        with self.moving():
            for row in rows:
                _move(folder / "files" / row["file"], self.studies / row["file"])
                for label in row["label_files"]:
                    _move(folder / "labels" / label, self.studies / "labels" / label)
        datastore.refresh()
        known = datastore.json()["objects"]
        for row in rows:
            if row["image"] in known:
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


def _plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, and none of ours."""
    return Path(name).name == name and not name.startswith(".") and "\\" not in name


def _move(path: Path, to: Path) -> None:
    if not os.path.lexists(path):  # moved before
        return
    to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.is_symlink():  # a relative one would point elsewhere from there
        os.symlink(os.path.realpath(path), to)
        path.unlink()
    else:
        os.replace(path, to)


def link_files(table: pd.DataFrame, studies: Path, folder: Path) -> pd.DataFrame:
    """Give a run its images under names that say nothing, so that none can be moved away under it.

    Args:
        table: rows of ``image_table``.
        studies: the datastore's folder.
        folder: where hard links to the files are made; on the same file system, so that nothing is copied.

    Returns:
        The table with the new names.
    """
    folder.mkdir(parents=True)
    names = []
    for number, (image, file) in enumerate(zip(table["image"], table["file"])):
        ending = "".join(Path(file).name[len(image) :])
        names.append(f"{number:06d}{ending}")
        source = os.path.realpath(studies / file)
        try:
            os.link(source, folder / names[-1])
        except OSError:
            if (studies / file).is_symlink():  # to another file system, where nobody moves it
                os.symlink(source, folder / names[-1])
            else:  # a file system without hard links
                shutil.copyfile(source, folder / names[-1])
    return table.assign(file=names)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table that a bundle reads: without ids of other kinds than file and patient."""
    table.drop(columns=[name for name in ("image", "study", "series", "instance") if name in table]).to_csv(
        path, index=False
    )
