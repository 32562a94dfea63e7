"""The queue of deletion requests: one file that survives a restart, and names nobody once a request is done."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["OPEN", "STATES", "Queue", "QueuedRequest", "UnknownRequestError", "now"]

# What may come after each state. Back to `resolved` goes what was interrupted, and what is tried again. What is served
# fails if a rollback brings back a model that holds it, and is served again once a model without it is trained.
NEXT = {
    "received": ("resolved", "failed"),
    "resolved": ("unlearning", "failed"),
    "unlearning": ("audited", "served", "resolved", "failed"),
    "audited": ("served", "resolved", "failed"),
    "served": ("failed",),
    "failed": ("resolved", "served"),
}
STATES = tuple(NEXT)
OPEN = ("received", "resolved", "unlearning", "audited")
LOCK_SECONDS = 30


class UnknownRequestError(LookupError):
    """There is no request of this id."""


@dataclass
class QueuedRequest:
    """A deletion request and what became of it.

    Args:
        id: its name, drawn by chance.
        source: how it came: ``train``, ``datastore`` or ``tag``.
        state: one of ``STATES``.
        patients: ids of the patients, until it is served; then salted hashes.
        images: ids of all their images in the datastore, likewise.
        hashed: whether these are hashes.
        options: settings of the run that it asked for.
        message: what a person should know of its state, without names.
        notes: what unlearning and audit said beside their figures.
        version: the version of the model that it led to.
        history: each state and when it was reached (UTC).
    """

    id: str
    source: str
    state: str = "received"
    patients: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    hashed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    notes: list[str] = field(default_factory=list)
    version: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def go(self, state: str, message: str = "") -> None:
        """Reach another state.

        Raises:
            ValueError: if that can't follow.
        """
        if state not in NEXT[self.state]:
            raise ValueError(f"A request that is {self.state} can't become {state}.")
        self.state, self.message = state, message
        self.history.append({"state": state, "at": now()})

    def public(self) -> dict[str, Any]:
        """What may be shown: numbers instead of names."""
        shown = asdict(self)
        del shown["patients"], shown["images"], shown["hashed"]
        return {**shown, "n_patients": len(self.patients), "n_images": len(self.images)}


class Queue:
    """Deletion requests in the order in which they came, in ``queue.json``.

    Every change is made under a lock, on what the file holds at that moment, and written to a new file that takes the
    old one's place: the server and its background tasks are several processes.

    Args:
        folder: where the file lies; made if it is not there, and readable by its owner alone.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = self.folder / "queue.json"
        self._lock = FileLock(str(self.folder / "queue.lock"), timeout=LOCK_SECONDS)

    def requests(self) -> list[QueuedRequest]:
        """All requests, the oldest first.

        Raises:
            ValueError: if the file is damaged; it is left as it is.
        """
        if not self.path.exists():
            return []
        names = {each.name for each in fields(QueuedRequest)}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            found = [QueuedRequest(**{name: value for name, value in one.items() if name in names}) for one in content]
            if any(one.state not in STATES for one in found):
                raise ValueError("unknown state")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path.name} of the deletion requests is damaged ({error}). Nothing was changed: restore it from "
                "your backup, or move it away to begin with an empty queue."
            ) from None
        return found

    def get(self, id: str) -> QueuedRequest:
        """One request.

        Raises:
            UnknownRequestError: if there is none of this id.
        """
        return _find(self.requests(), id)

    def claim(self) -> list[str]:
        """Begin what waits: all requests that are ``resolved`` become ``unlearning`` at once; returns their ids."""
        with self._all() as requests:
            waiting = [one for one in requests if one.state == "resolved"]
            for one in waiting:
                one.go("unlearning")
            return [one.id for one in waiting]

    def add(self, source: str, **content: Any) -> QueuedRequest:
        """Take a request in, in the state ``received``."""
        request = QueuedRequest(id=f"r{secrets.token_hex(6)}", source=source, **content)
        request.history.append({"state": "received", "at": now()})
        with self._all() as requests:
            requests.append(request)
        return request

    @contextmanager
    def change(self, id: str) -> Iterator[QueuedRequest]:
        """Change one request; nothing is kept if the block raises.

        Raises:
            UnknownRequestError: if there is none of this id.
        """
        with self._all() as requests:
            yield _find(requests, id)

    def remove(self, id: str) -> None:
        """Take a request out.

        Raises:
            UnknownRequestError: if there is none of this id.
        """
        with self._all() as requests:
            requests.remove(_find(requests, id))

    def forget_names(self, id: str) -> None:
        """Put salted hashes in the place of a request's patients and images."""
        with self.change(id) as request:
            if not request.hashed:
                request.patients = [self.hash(patient) for patient in request.patients]
                request.images = [self.hash(image) for image in request.images]
                request.hashed = True

    def hash(self, name: str) -> str:
        """Salted hash of a patient's or an image's id: the same one for the same id, and only with this site's key."""
        return hmac.new(self._key(), name.encode(), hashlib.sha256).hexdigest()

    def served(self, names: Iterable[str]) -> set[str]:
        """Those of some patients whose request has been served."""
        done = {patient for one in self.requests() if one.hashed for patient in one.patients}
        return {name for name in names if self.hash(name) in done} if done else set()

    def _key(self) -> bytes:
        path = self.folder / "key"
        with self._lock:
            if not path.exists():
                _write(path, secrets.token_hex(32))
            return bytes.fromhex(path.read_text(encoding="utf-8"))

    @contextmanager
    def _all(self) -> Iterator[list[QueuedRequest]]:
        with self._lock:
            requests = self.requests()
            yield requests
            _write(self.path, json.dumps([asdict(one) for one in requests], indent=1))


def now() -> str:
    """The time as requests note it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _find(requests: list[QueuedRequest], id: str) -> QueuedRequest:
    found = next((one for one in requests if one.id == id), None)
    if found is None:
        raise UnknownRequestError(f"There is no deletion request {id!r}.")
    return found


def _write(path: Path, text: str) -> None:
    """A file that appears whole or not at all, and that its owner alone can read."""
    part = path.with_name(f".{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
