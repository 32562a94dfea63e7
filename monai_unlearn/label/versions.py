"""Versions of the served model: a new one beside the old, a pointer that is switched in one step, and the way back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from monai_unlearn.checkpoint import Checkpoint, file_hash, load_checkpoint
from monai_unlearn.label.queue import now
from monai_unlearn.output import new_folder, write_json

__all__ = ["NoModelError", "Version", "Versions"]

MODEL, ABOUT, TRAINED_ON, POINTER = "model.pt", "version.json", "trained_on.json", "served.json"


class NoModelError(RuntimeError):
    """No model is served yet, or what is served can't be read."""


@dataclass(frozen=True)
class Version:
    """One version of the model.

    Args:
        name: its number, ``"0001"`` and so on.
        made: how: ``trained``, ``imported`` or ``unlearned``.
        at: when (UTC).
        sha256: hash of the checkpoint file.
        class_names: of classes, or findings.
        channels: of an image.
        multi_label: whether these are findings.
        requests: ids of the deletion requests that it was made for.
        path: the checkpoint.
    """

    name: str
    made: str
    at: str
    sha256: str
    class_names: tuple[str, ...]
    channels: int
    multi_label: bool
    requests: tuple[str, ...]
    path: Path

    def public(self) -> dict[str, Any]:
        """What may be shown."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


class Versions:
    """The versions of one model in a folder, of which one is served.

    Args:
        folder: where they lie; made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def current(self) -> Version | None:
        """The version that is served; None before there is any.

        Raises:
            NoModelError: if the folder is damaged.
        """
        pointer = self._pointer()
        return None if pointer is None else self._read(pointer["current"])

    def served(self) -> Version:
        """The same, where there has to be one.

        Raises:
            NoModelError: if there is none.
        """
        version = self.current()
        if version is None:
            raise NoModelError("No model is served yet. Train one (POST /train/), or name yours with `checkpoint`.")
        return version

    def earlier(self) -> list[Version]:
        """Versions from before that are still kept, the latest first."""
        pointer = self._pointer()
        return [] if pointer is None else [self._read(name) for name in reversed(pointer["earlier"])]

    def trained_on(self, version: Version) -> dict[str, str]:
        """Salted hash of each image that a version's data was made of → its part: train, validation or test."""
        return json.loads((version.path.parent / TRAINED_ON).read_text(encoding="utf-8"))

    def publish(self, checkpoint: str | os.PathLike, made: str, trained_on: Mapping[str, str], **about: Any) -> Version:
        """Keep a checkpoint as a new version and serve it.

        Args:
            checkpoint: file that is copied.
            made: how it was made.
            trained_on: as in ``trained_on``.
            about: ``class_names``, ``channels``, ``multi_label`` and ``requests``.

        Raises:
            ValueError: if the checkpoint is damaged; the version before stays the served one.
        """
        load_checkpoint(checkpoint)
        pointer = self._pointer()
        numbers = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
        last = 0 if pointer is None else pointer["last"]
        name = f"{max([*numbers, last]) + 1:04d}"  # no number is used twice, also not after a rollback
        folder = self.folder / name
        with new_folder(folder) as unfinished:
            shutil.copyfile(checkpoint, unfinished / MODEL)
            about = {"requests": (), **about, "name": name, "made": made, "at": now()}
            about["sha256"] = file_hash(unfinished / MODEL)
            write_json(about, unfinished / ABOUT)
            write_json(dict(trained_on), unfinished / TRAINED_ON)
        earlier = [] if pointer is None else [*pointer["earlier"], pointer["current"]]
        self._point(name, earlier)
        return self._read(name)

    def rollback(self) -> Version:
        """Serve the version before again; the present one is removed.

        Raises:
            NoModelError: if there is none before.
        """
        pointer = self._pointer()
        if pointer is None or not pointer["earlier"]:
            raise NoModelError("There is no earlier version to go back to: it was finalised, or there never was one.")
        *earlier, before = pointer["earlier"]
        version = self._read(before)
        self.load(version)
        self._point(before, earlier)
        shutil.rmtree(self.folder / pointer["current"], ignore_errors=True)
        return version

    def finalise(self, older_than: timedelta = timedelta(0)) -> int:
        """Remove versions from before, which were trained on what is forgotten: there is no way back to them then.

        Args:
            older_than: how long ago the version after it has to have taken its place.

        Returns:
            How many were removed.
        """
        pointer = self._pointer()
        if pointer is None:
            return 0
        names = [*pointer["earlier"], pointer["current"]]
        ended = dict(zip(names, (datetime.fromisoformat(self._read(after).at) for after in names[1:])))
        now_ = datetime.now(timezone.utc)
        kept = [name for name in pointer["earlier"] if now_ - ended[name] < older_than]
        self._point(pointer["current"], kept)
        gone = [path for path in self.folder.iterdir() if path.name.isdecimal() and path.name not in (*kept, names[-1])]
        for path in gone:
            shutil.rmtree(path)
        return len(gone)

    def load(self, version: Version) -> Checkpoint:
        """A version's weights.

        Raises:
            ValueError: if the file is damaged, or is another than was published.
        """
        checkpoint = load_checkpoint(version.path)
        if file_hash(version.path) != version.sha256:
            raise ValueError(
                f"{version.path.name} of version {version.name} could not be read as a checkpoint that was published "
                "here: it was changed since. Restore it from your backup."
            )
        return checkpoint

    def _pointer(self) -> dict[str, Any] | None:
        path = self.folder / POINTER
        if not path.exists():
            return None
        try:
            pointer = json.loads(path.read_text(encoding="utf-8"))
            return {
                "current": str(pointer["current"]),
                "earlier": list(pointer["earlier"]),
                "last": int(pointer["last"]),
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoModelError(
                f"{POINTER} of the model's versions is damaged ({type(error).__name__}): restore it from your backup. "
                "It names one of the folders beside it: {'current': '0001', 'earlier': [], 'last': 1}."
            ) from None

    def _point(self, current: str, earlier: list[str]) -> None:
        before = self._pointer() if (self.folder / POINTER).exists() else None
        last = max(int(current), 0 if before is None else before["last"])
        part = self.folder / f".{POINTER}.part{os.getpid()}"
        try:
            write_json({"current": current, "earlier": earlier, "last": last}, part)
            os.replace(part, self.folder / POINTER)
        finally:
            part.unlink(missing_ok=True)

    def _read(self, name: str) -> Version:
        folder = self.folder / name
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            return Version(
                name=name,
                path=folder / MODEL,
                class_names=tuple(about["class_names"]),
                requests=tuple(about["requests"]),
                **{key: about[key] for key in ("made", "at", "sha256", "channels", "multi_label")},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoModelError(
                f"Version {name} of the model can't be read ({type(error).__name__}). Restore its folder from your "
                "backup, or go back to the version before."
            ) from None
